"""Text models: whole documents with carried state, samples as text, what the report says."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from distpc.circuits.chain import Chain
from distpc.circuits.circuit import Circuit
from distpc.circuits.io import save_model
from distpc.config import parse_config
from distpc.data import index as index_stage
from distpc.data import shards as shards_stage
from distpc.data.index import ShardIndex
from distpc.data.spec import DatasetSpec
from distpc.data.tokenizers import copy_tokenizer, tokenizer_of, train_bpe
from distpc.errors import DataError, EvidenceError
from distpc.inference import evaluate
from distpc.inference.sample import sample_command
from distpc.inference.streaming import can_stream, measure_documents
from distpc.structures.hmm import hmm
from distpc.training.fit import fit

from .conftest import context, load_split, seal

WORDS = "the cat sat on the mat, à côté; the dog lay on the log. "


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards, index and a small hidden Markov model of byte pairs."""
    folder = tmp_path_factory.mktemp("text")
    (folder / "texts").mkdir()
    for number in range(12):
        text = WORDS[number:] + WORDS * (number % 4 + 1)
        (folder / "texts" / f"{number:02d}.txt").write_text(text, encoding="utf-8")
    source = {
        "kind": "text",
        "path": str(folder / "texts"),
        "tokenizer": {"kind": "bpe", "vocabulary_size": 270},
        "chunk_length_tokens": 8,
        "end_of_document": True,
    }
    values = {
        "name": "tiny",
        "data": {"source": source, "samples_per_shard": 16},
        "teacher": {"kind": "none"},
        "structure": {"kind": "hmm", "num_states": 6, "tied": True},
        "finetune": {"initialization": "random"},
        "evaluate": {"num_pictures": 5},
    }
    config = parse_config(values, where="test")
    made = folder / "run"
    shards = context(made, config, "shards")
    shards_stage.run(shards)
    seal(shards)
    indexed = context(made, config, "index", "shards")
    index_stage.run(indexed)
    seal(indexed)
    spec = DatasetSpec.load(made / "shards")
    circuit = Circuit(hmm(8, 6), spec.num_categories, seed=1)
    fit(circuit, load_split(made, "train"), epochs=4, batch_size=32, progress=False)
    finetune = context(made, config, "finetune", "shards", "index")
    copy_tokenizer(made / "shards", finetune.out / "model")
    save_model(circuit, finetune.out / "model", dataset=spec.to_json(), training={})
    seal(finetune)
    ctx = context(made, config, "evaluate", "shards", "index", "finetune")
    evaluate.run(ctx)
    seal(ctx)
    return made


def circuit_of(run: Path) -> Circuit:
    from distpc.circuits.io import load_model

    return load_model(run / "finetune" / "model")


def test_documents_are_read_as_if_never_cut(run: Path) -> None:
    index, shards = ShardIndex.load(run / "index"), run / "shards"
    circuit, tokenizer = circuit_of(run), tokenizer_of(index.spec, run / "shards")
    chain = Chain.of(circuit)
    firsts = np.load(shards / "documents.npy")
    nats = tokens = documents = 0.0
    for number in {
        int(np.searchsorted(firsts, int(key), side="right")) - 1
        for entry in index.shards("test")
        for key in entry.samples().keys
    }:
        path = run.parent / "texts" / f"{number:02d}.txt"
        text = [*tokenizer.encode(path.read_text(encoding="utf-8")).tolist(), 270]
        nats += float(chain.read(torch.tensor([text])).log_prob)
        tokens += len(text)
        documents += 1
    found = measure_documents(circuit, index, shards, "test")
    assert found["num_documents"] == documents > 0
    assert found["bits"] == pytest.approx(-nats / tokens / math.log(2), abs=1e-9)


def test_the_report_has_bits_a_token_and_of_documents(run: Path) -> None:
    from distpc.artifacts import Artifact

    facts = Artifact.open(run / "evaluate").metadata
    x = load_split(run, "test")
    circuit = circuit_of(run)
    nats = float(circuit.log_prob(x).double().sum())
    bits = -nats / math.log(2) / int((x >= 0).sum())
    assert facts["test_bpt"] == pytest.approx(bits, abs=1e-5)
    assert facts["perplexity"] == pytest.approx(2**bits, rel=1e-4)
    # What came before helps: chunks alone begin knowing nothing.
    assert 0 < facts["test_bpt_documents"] < 20
    assert 1 < facts["test_characters_per_token"] < 4
    assert "test_bpd" not in facts and "test_bpc" not in facts


def test_samples_are_written_as_text(run: Path, tmp_path: Path) -> None:
    lines = (run / "evaluate" / "samples.txt").read_text(encoding="utf-8").splitlines()
    assert len(lines) == 5
    model = run / "finetune" / "model"
    sample_command(model, n=4, seed=0, out=tmp_path / "made.txt")
    values = circuit_of(run).sample(4, seed=0)
    tokenizer = tokenizer_of(DatasetSpec.load(run / "shards"), run / "shards")
    first = values[0].tolist()
    first = first[: first.index(270)] if 270 in first else first
    assert (
        (tmp_path / "made.txt")
        .read_text(encoding="utf-8")
        .startswith(tokenizer.decode(first).replace("\ufffd", "\ufffd"))
    )


def test_another_tokenizer_beside_the_model_is_refused(run: Path, tmp_path: Path) -> None:
    import shutil

    shutil.copytree(run / "finetune" / "model", tmp_path / "model")
    train_bpe([WORDS], 265).save(tmp_path / "model" / "tokenizer")
    with pytest.raises(DataError, match="not the one that the data were made with"):
        sample_command(tmp_path / "model", n=1, seed=0, out=tmp_path / "made.txt")


def test_what_cannot_be_streamed(run: Path) -> None:
    index, shards = ShardIndex.load(run / "index"), run / "shards"
    assert can_stream(circuit_of(run), shards) and not can_stream(circuit_of(run), run)
    untied = Circuit(hmm(8, 3, tied=False), index.spec.num_categories)
    assert not can_stream(untied, shards)
    circuit = circuit_of(run)
    circuit.set_smoothing(0.0, 0.0, 1)
    token = int(load_split(run, "test")[0, 0])
    circuit.statistics_of(0)[:, token] = 0.0
    with pytest.raises(EvidenceError, match="impossible under the model"):
        measure_documents(circuit, index, shards, "test")


def test_shards_that_exist_bring_their_tokenizer_along(run: Path, tmp_path: Path) -> None:
    values = {
        "name": "again",
        "data": {"source": {"kind": "shards", "url": str(run / "shards")}},
        "teacher": {"kind": "none"},
        "structure": {"kind": "hmm", "num_states": 6, "tied": True},
        "finetune": {"initialization": "random"},
    }
    ctx = context(tmp_path, parse_config(values, where="test"), "shards")
    shards_stage.run(ctx)
    spec = DatasetSpec.load(ctx.out)
    assert spec == DatasetSpec.load(run / "shards")
    assert tokenizer_of(spec, ctx.out).digest == spec.tokenizer
    assert can_stream(circuit_of(run), ctx.out)
