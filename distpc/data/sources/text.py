"""UTF-8 text as bytes, cut into chunks of equal length; a document never straddles splits."""

from __future__ import annotations

import zlib
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from distpc.config.sources import TextSource
from distpc.data.sources.base import Source, existing
from distpc.data.spec import MISSING, DatasetSpec
from distpc.errors import DataError


class Text(Source):
    """Documents (files) in order of name, each cut into chunks of bytes; values are bytes."""

    group_name = "documents"

    def __init__(self, config: TextSource) -> None:
        root = existing(config.path, "path")
        files = sorted(root.rglob("*.txt")) if root.is_dir() else [root]
        self._length = config.chunk_length_bytes
        self._root = root if root.is_dir() else root.parent
        self._documents: list[Path] = []
        self._checksums: list[tuple[int, int]] = []
        self._empty: list[str] = []
        for file in files:
            self._add(file)
        if not self._documents:
            raise DataError(
                "the source holds no text",
                where=root,
                found=f"{len(files)} .txt files, {len(self._empty)} of them empty",
                expected="at least one file with content",
            )
        chunks = [-(-size // self._length) for size, _ in self._checksums]
        self._firsts = np.cumsum([0, *chunks])
        self.num_samples = int(self._firsts[-1])
        if len(self._documents) > 1:
            self.groups = np.repeat(np.arange(len(chunks)), chunks)
        self.spec = DatasetSpec(
            name=root.stem,
            kind="text",
            num_variables=self._length,
            num_categories=(256,) * self._length,
            has_missing=any(size % self._length for size, _ in self._checksums),
        )
        self._bytes_of = lru_cache(maxsize=2)(lambda number: self._documents[number].read_bytes())

    def _add(self, file: Path) -> None:
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
        if not content:
            self._empty.append(self._name(file))
            return
        self._documents.append(file)
        self._checksums.append((len(content), zlib.crc32(content)))

    def _name(self, file: Path) -> str:
        return str(file.relative_to(self._root))

    def read(self, position: int) -> np.ndarray:
        """(chunk length,) int16, padded with MISSING behind a document's last byte."""
        number = int(np.searchsorted(self._firsts, position, side="right")) - 1
        start = (position - int(self._firsts[number])) * self._length
        chunk = self._bytes_of(number)[start : start + self._length]
        values = np.full(self._length, MISSING, dtype=np.int16)
        values[: len(chunk)] = np.frombuffer(chunk, np.uint8)
        return values

    def identity(self) -> dict[str, Any]:
        """Size and checksum of every document."""
        names = [self._name(file) for file in self._documents]
        return {name: list(facts) for name, facts in zip(names, self._checksums, strict=True)}

    def facts(self) -> dict[str, Any]:
        """How many documents and bytes, and which files were empty."""
        return {
            "num_documents": len(self._documents),
            "num_bytes": sum(size for size, _ in self._checksums),
            "empty_files": self._empty,
        }
