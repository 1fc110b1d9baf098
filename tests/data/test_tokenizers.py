"""Tokenizers, and text sources that use them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from distpc.artifacts.files import write_json
from distpc.config import RunConfig
from distpc.config.sources import TextSource, TokenizerConfig, TokenSamplesSource
from distpc.data.documents import iterate_documents, save_documents
from distpc.data.index import build_index
from distpc.data.shards import ShardWriter, open_split, split_positions
from distpc.data.sources import open_source
from distpc.data.sources.text import Text, text_identity
from distpc.data.spec import MISSING, DatasetSpec
from distpc.data.tokenizers import (
    FOLDER,
    Bytes,
    Characters,
    check_tokenizer,
    copy_tokenizer,
    load_tokenizer,
    make_tokenizer,
    tokenizer_of,
    train_bpe,
)
from distpc.errors import DataError

WORDS = "the cat sat on the mat, à côté — and the dog lay on the log; who knows why? "
TEXTS = [WORDS * 3, "another text: " + WORDS, "🙂 third\r\n" + WORDS * 2]


@pytest.mark.parametrize("kind", ["bytes", "characters", "bpe"])
def test_a_tokenizer_gives_back_the_text(kind: str, tmp_path: Path) -> None:
    made = make_tokenizer(TokenizerConfig(kind=kind, vocabulary_size=300), TEXTS)
    for text in TEXTS:
        tokens = made.encode(text)
        assert tokens.min() >= 0 and tokens.max() < made.size
        assert made.decode(tokens.tolist()) == text
    assert bool(made.digest) == (kind != "bytes")
    if kind == "bytes":
        return
    made.save(tmp_path / FOLDER)
    spec = DatasetSpec("t", "text", 8, (made.size,) * 8, tokens=made.makes, tokenizer=made.digest)
    copy_tokenizer(tmp_path, tmp_path / "model")
    again = tokenizer_of(spec, tmp_path / "model")
    assert (
        again.digest == made.digest and again.encode(WORDS).tolist() == made.encode(WORDS).tolist()
    )


def test_byte_pairs_are_learnt_alike_each_time_and_not_beyond_the_text() -> None:
    assert train_bpe(TEXTS, 290).digest == train_bpe(list(TEXTS), 290).digest
    assert len(train_bpe(TEXTS, 290).encode(WORDS)) < len(WORDS.encode())
    with pytest.raises(DataError, match="too small for its vocabulary"):
        train_bpe(["abab"], 1000)


def test_other_tokenizers_are_refused(tmp_path: Path) -> None:
    one, other = train_bpe(TEXTS, 280), train_bpe(TEXTS, 281)
    spec = DatasetSpec("t", "text", 8, (280,) * 8, tokens="tokens", tokenizer=one.digest)
    check_tokenizer(spec, one, "here")
    for wrong in (other, Bytes(), Characters("abc")):
        with pytest.raises(DataError, match="not the one that the data were made with"):
            check_tokenizer(spec, wrong, "here")
    other.save(tmp_path / FOLDER)
    with pytest.raises(DataError, match=one.digest):
        tokenizer_of(spec, tmp_path)
    with pytest.raises(DataError, match="there is no tokenizer"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(DataError, match="cannot be read"):
        load_tokenizer(tmp_path)


def test_characters_outside_the_vocabulary_are_named() -> None:
    with pytest.raises(DataError, match="character 3 of the text") as caught:
        Characters("abc").encode("abcd")
    assert caught.value.found == "'d'"


def texts(folder: Path, **more: Any) -> Text:
    for number, text in enumerate(TEXTS):
        (folder / f"{number}.txt").write_bytes(text.encode())
    config = {"kind": "text", "path": str(folder), "chunk_length_tokens": 10, **more}
    source = open_source(TextSource.model_validate(config), folder)
    assert isinstance(source, Text)
    return source


def test_documents_end_in_a_token_of_their_own(tmp_path: Path) -> None:
    source = texts(tmp_path, tokenizer={"kind": "characters"}, end_of_document=True)
    end = source.tokenizer.size
    assert source.spec.end_token == end and source.spec.num_categories == (end + 1,) * 10
    rows = np.stack([source.read(position) for position in range(source.num_samples)])
    assert source.groups is not None
    for number, text in enumerate(TEXTS):
        tokens = rows[source.groups == number].ravel()
        assert tokens[len(text)] == end and (tokens[len(text) + 1 :] == MISSING).all()
        assert source.tokenizer.decode(tokens[: len(text)].tolist()) == text
    assert source.spec.unit == "bpc" and source.spec.counted == "values"
    assert source.facts()["num_tokens"] == sum(map(len, TEXTS)) + 3


def test_a_tokenizer_made_elsewhere_may_have_an_end_token(tmp_path: Path) -> None:
    (tmp_path / "texts").mkdir()
    made = train_bpe(TEXTS, 270)
    made.save(tmp_path / "made")
    values = {"kind": "folder", "folder": str(tmp_path / "made"), "end_token": "a"}
    source = texts(tmp_path / "texts", tokenizer=values, end_of_document=True)
    assert source.spec.end_token == made.id_of("a") and source.spec.num_categories[0] == 270
    assert source.spec.unit == "bpt"
    values["end_token"] = "no such token"
    with pytest.raises(DataError, match="no such token"):
        texts(tmp_path / "texts", tokenizer=values, end_of_document=True)
    # Its content is part of what the shards are made from, its folder is not.
    config = TextSource.model_validate(
        {"kind": "text", "path": str(tmp_path / "texts"), "tokenizer": {**values, "end_token": "a"}}
    )
    assert text_identity(config) == source.identity()
    train_bpe(TEXTS, 271).save(tmp_path / "made")
    assert text_identity(config) != source.identity()


def test_a_tokenizer_learns_from_training_documents_alone(tmp_path: Path) -> None:
    """Every document repeats a word of its own, which only a token learnt from it holds whole."""
    words = [letter * 8 for letter in "ABCDEFGHIJ"]
    for number, word in enumerate(words):
        (tmp_path / f"{number}.txt").write_text(f"{word} " * 50)
    config = RunConfig.model_validate(
        {
            "name": "words",
            "data": {
                "source": {
                    "kind": "text",
                    "path": str(tmp_path),
                    "tokenizer": {"kind": "bpe", "vocabulary_size": 270},
                },
                "split": {"train": 0.6, "valid": 0.2, "test": 0.2},
            },
        }
    )
    source = open_split(config, tmp_path)
    assert isinstance(source, Text) and source.groups is not None
    positions = split_positions(source, config.data, config.split_seed)
    trained = set(source.groups[positions["train"]].tolist())
    lengths = [len(source.tokenizer.encode(word)) for word in words]
    assert len(trained) == 6
    assert all((lengths[number] < 8) == (number in trained) for number in range(10))
    assert source.identity() == text_identity(source._config)


def test_chunks_are_read_document_by_document(tmp_path: Path) -> None:
    (tmp_path / "texts").mkdir()
    source = texts(tmp_path / "texts", tokenizer={"kind": "bpe", "vocabulary_size": 280})
    shards, out = tmp_path / "shards", tmp_path / "index"
    shards.mkdir()
    out.mkdir()
    writer = ShardWriter(shards, source, 0)
    groups = source.groups
    assert groups is not None
    splits = {"train": 2, "valid": 0, "test": 1}
    writer.write_all({name: np.flatnonzero(groups == g) for name, g in splits.items()}, 4)
    source.spec.save(shards)
    source.write_beside(shards)
    index = build_index(shards, out)
    parts = list(iterate_documents(index, shards, "train"))
    assert {document for document, _ in parts} == {2} and len(parts) > 1
    tokens = np.concatenate([rows.ravel() for _, rows in parts])
    tokenizer = tokenizer_of(index.spec, shards)
    assert tokenizer.decode(tokens[tokens >= 0].tolist()) == TEXTS[2]
    save_documents(shards, np.array([0, 1]))
    with pytest.raises(DataError, match="does not belong to the shards"):
        list(iterate_documents(index, shards, "test"))


def samples(folder: Path, rows: np.ndarray, **facts: Any) -> TokenSamplesSource:
    Characters("abcdef").save(folder / FOLDER)
    np.save(folder / "samples-000000.npy", rows)
    known = {"length": 4, "vocabulary_size": 6, "end_token": None, "model": "m", "seed": 0}
    write_json(folder / "samples.json", {**known, "temperature": 1.0, "complete": True, **facts})
    return TokenSamplesSource(kind="token_samples", path=str(folder))


def test_token_samples_are_a_source(tmp_path: Path) -> None:
    rows = np.array([[0, 1, 2, 3], [5, 4, -1, -1]], dtype=np.int32)
    source = open_source(samples(tmp_path, rows), tmp_path)
    assert [source.read(position).tolist() for position in range(2)] == rows.tolist()
    assert source.spec.num_categories == (6,) * 4 and source.spec.has_missing
    before = source.identity()
    assert open_source(samples(tmp_path, rows[::-1]), tmp_path).identity() != before


def test_token_samples_that_are_cut_or_outside_the_vocabulary(tmp_path: Path) -> None:
    rows = np.array([[0, 1, 2, 6]], dtype=np.int32)
    source = open_source(samples(tmp_path, rows), tmp_path)
    with pytest.raises(DataError, match="outside the vocabulary"):
        source.read(0)
    with pytest.raises(DataError, match="not complete"):
        open_source(samples(tmp_path, rows, complete=False), tmp_path)
    source = open_source(samples(tmp_path, rows[:, :3]), tmp_path)
    with pytest.raises(DataError, match="another length"):
        source.read(0)


def test_the_config_names_tokenizers_by_kind() -> None:
    for bad in ({"kind": "folder"}, {"kind": "bpe", "folder": "x"}, {"end_token": "x"}):
        with pytest.raises(ValueError, match="tokenizer"):
            TokenizerConfig.model_validate(bad)
    old = TextSource.model_validate({"kind": "text", "path": "x", "chunk_length_bytes": 7})
    assert old.chunk_length_tokens == 7
    assert json.loads(old.model_dump_json())["chunk_length_tokens"] == 7
