"""UTF-8 text as tokens, cut into chunks of equal length; a document never straddles splits."""

from __future__ import annotations

import zlib
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from distpc.config.sources import TextSource
from distpc.data.documents import save_documents
from distpc.data.sources.base import Source, TrainingGroups, existing
from distpc.data.spec import MISSING, DatasetSpec
from distpc.data.tokenizers import FOLDER, Tokenizer, load_tokenizer, make_tokenizer
from distpc.errors import DataError

Checksums = tuple[tuple[str, int, int], ...]
"""Name, bytes and CRC-32 of every document."""


class Text(Source):
    """Documents (files) in order of name, each cut into chunks of tokens.

    All documents are held in memory as tokens, one to four bytes each. A tokenizer is trained on
    the training split's documents (on all of a single one, whose chunks are shared out).
    """

    group_name = "documents"

    def __init__(self, config: TextSource, training: TrainingGroups | None = None) -> None:
        self._config, self._length = config, config.chunk_length_tokens
        self._root, files = _files(config)
        self._checksums, self._empty = _read_checksums(self._root, files)
        if not self._checksums:
            raise DataError(
                "the source holds no text",
                where=self._root,
                found=f"{len(files)} .txt files, {len(self._empty)} of them empty",
                expected="at least one file with content",
            )
        count = len(self._checksums)
        learnt = range(count) if training is None or count == 1 else training(count).tolist()
        self.tokenizer, self._documents, end = _tokenised(
            config, self._root, self._checksums, frozenset(learnt)
        )
        chunks = [-(-len(document) // self._length) for document in self._documents]
        self._firsts = np.cumsum([0, *chunks])
        self.num_samples = int(self._firsts[-1])
        if len(self._documents) > 1:
            self.groups = np.repeat(np.arange(len(chunks)), chunks)
        size = self.tokenizer.size + (end == self.tokenizer.size)
        self.spec = DatasetSpec(
            name=Path(config.path).expanduser().stem,
            kind="text",
            num_variables=self._length,
            num_categories=(size,) * self._length,
            has_missing=any(len(document) % self._length for document in self._documents),
            tokens=self.tokenizer.makes,
            tokenizer=self.tokenizer.digest,
            end_token=end,
        )

    def read(self, position: int) -> np.ndarray:
        """(chunk length,) int32, padded with MISSING behind a document's last token."""
        number = int(np.searchsorted(self._firsts, position, side="right")) - 1
        start = (position - int(self._firsts[number])) * self._length
        chunk = self._documents[number][start : start + self._length]
        values = np.full(self._length, MISSING, dtype=np.int32)
        values[: len(chunk)] = chunk
        return values

    def identity(self) -> dict[str, Any]:
        """Size and checksum of every document, and the digest of a tokenizer made elsewhere."""
        return _identity(self._config, self._checksums, self.tokenizer)

    def facts(self) -> dict[str, Any]:
        """How many documents, bytes and tokens, and which files were empty."""
        return {
            "num_documents": len(self._documents),
            "num_bytes": sum(size for _, size, _ in self._checksums),
            "num_tokens": sum(len(document) for document in self._documents),
            "vocabulary": int(self.spec.num_categories[0] or 0),
            "empty_files": self._empty,
        }

    def write_beside(self, folder: Path) -> None:
        """The tokenizer, and where documents begin; the chunks of only one are shared out."""
        self.tokenizer.save(folder / FOLDER)
        if self.groups is not None:
            save_documents(folder, self._firsts)


def text_identity(config: TextSource) -> dict[str, Any]:
    """As `Text.identity`, without making any tokens.

    Raises:
        DataError: as opening the source.
    """
    root, files = _files(config)
    folder = config.tokenizer.folder
    tokenizer = None if folder is None else load_tokenizer(Path(folder).expanduser())
    return _identity(config, _read_checksums(root, files)[0], tokenizer)


def _identity(
    config: TextSource, checksums: Checksums, tokenizer: Tokenizer | None
) -> dict[str, Any]:
    own: dict[str, Any] = {}
    if config.tokenizer.kind == "folder" and tokenizer is not None:
        own[""] = tokenizer.digest
    elif config.tokenizer.kind == "bpe":
        # It follows from the documents, the configuration and whose documents it is trained on.
        own[""] = "trained on the training split"
    return {**{name: [size, crc] for name, size, crc in checksums}, **own}


def _files(config: TextSource) -> tuple[Path, list[Path]]:
    root = existing(config.path, "path")
    return (root, sorted(root.rglob("*.txt"))) if root.is_dir() else (root.parent, [root])


def _read_checksums(root: Path, files: list[Path]) -> tuple[Checksums, list[str]]:
    """Of the documents with content, and the names of those without.

    Raises:
        DataError: a file is not UTF-8.
    """
    found, empty = [], []
    for file in files:
        content = file.read_bytes()
        try:
            content.decode("utf-8")
        except UnicodeDecodeError as error:
            raise DataError(
                "a text file is not UTF-8",
                where=f"{file}, byte {error.start}",
                found=f"byte 0x{content[error.start]:02x}: {error.reason}",
                fix="convert it, for example with iconv -f latin1 -t utf-8",
            ) from error
        name = str(file.relative_to(root))
        if content:
            found.append((name, len(content), zlib.crc32(content)))
        else:
            empty.append(name)
    return tuple(found), empty


@lru_cache(maxsize=1)
def _tokenised(
    config: TextSource, root: Path, checksums: Checksums, learnt: frozenset[int]
) -> tuple[Tokenizer, list[np.ndarray], int | None]:
    """The tokenizer, the documents' tokens, and the token that ends them.

    Tokenizers are trained on the documents `learnt`; the characters of a vocabulary are all that
    occur, since there is no token for one that does not. Kept, because a run opens its source
    several times.
    """
    # Not `read_text`, which would turn \r\n into \n.
    texts = [(root / name).read_bytes().decode("utf-8") for name, _, _ in checksums]
    if config.tokenizer.kind == "bpe":
        tokenizer = make_tokenizer(config.tokenizer, [texts[number] for number in sorted(learnt)])
    else:
        tokenizer = make_tokenizer(config.tokenizer, texts)
    end = None
    if config.end_of_document:
        name = config.tokenizer.end_token
        end = tokenizer.size if name is None else tokenizer.id_of(name)
    last = np.array([] if end is None else [end], dtype=np.int32)
    top = tokenizer.size if end is None else max(end, tokenizer.size)
    documents = [
        np.concatenate([tokenizer.encode(text), last]).astype(np.min_scalar_type(top))
        for text in texts
    ]
    return tokenizer, documents, end
