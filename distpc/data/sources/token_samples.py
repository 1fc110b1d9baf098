"""Token sequences that were sampled from a language model, see `distpc.teachers.sampling`."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from distpc.artifacts.files import file_digest, read_json
from distpc.config.sources import TokenSamplesSource
from distpc.data.sources.base import Source, existing
from distpc.data.spec import MISSING, DatasetSpec
from distpc.data.tokenizers import FOLDER, load_tokenizer
from distpc.errors import DataError

DESCRIPTION = "samples.json"
PATTERN = "samples-*.npy"


class TokenSamples(Source):
    """Files of (n, V) tokens, in order of name; -1 behind the token that ends a sequence."""

    def __init__(self, config: TokenSamplesSource) -> None:
        self._root = existing(config.path, "path")
        facts = read_json(self._root / DESCRIPTION)
        self._files = sorted(self._root.glob(PATTERN))
        if not isinstance(facts, dict) or not facts.get("complete") or not self._files:
            raise DataError(
                "the samples of a teacher are not complete",
                where=self._root,
                found=f"{len(self._files)} files",
                expected=f"{DESCRIPTION} that says complete, and {PATTERN}",
                fix="run the same distpc sample-teacher command again: it goes on",
            )
        self.tokenizer = load_tokenizer(self._root / FOLDER)
        self._read = lru_cache(maxsize=2)(self._load)
        length, size = int(facts["length"]), int(facts["vocabulary_size"])
        counts = [len(np.load(file, mmap_mode="r", allow_pickle=False)) for file in self._files]
        self._firsts = np.cumsum([0, *counts])
        self.num_samples = int(self._firsts[-1])
        self.spec = DatasetSpec(
            name=self._root.name,
            kind="text",
            num_variables=length,
            num_categories=(size,) * length,
            has_missing=True,
            tokens=self.tokenizer.makes,
            tokenizer=self.tokenizer.digest,
            end_token=facts["end_token"],
        )

    def _load(self, number: int) -> np.ndarray:
        file = self._files[number]
        rows: np.ndarray = np.load(file, allow_pickle=False)
        top = int(self.spec.num_categories[0] or 0) - 1
        wide = rows.ndim != 2 or rows.shape[1] != self.spec.num_variables
        if wide or rows.min() < MISSING or rows.max() > top:
            raise DataError(
                "a file of samples holds a token outside the vocabulary, or another length",
                where=file,
                found=f"shape {rows.shape}, values {rows.min()} .. {rows.max()}",
                expected=f"(n, {self.spec.num_variables}), values 0 .. {top}, or -1 where missing",
            )
        return rows

    def read(self, position: int) -> np.ndarray:
        """(V,) int32."""
        number = int(np.searchsorted(self._firsts, position, side="right")) - 1
        return self._read(number)[position - int(self._firsts[number])].astype(np.int32)

    def identity(self) -> dict[str, Any]:
        """Digests of the files and of the tokenizer."""
        digests = {file.name: file_digest(file) for file in self._files}
        return {**digests, FOLDER: self.tokenizer.digest}

    def facts(self) -> dict[str, Any]:
        """What the samples were drawn from."""
        facts = read_json(self._root / DESCRIPTION)
        return {name: facts[name] for name in ("model", "seed", "temperature")}

    def write_beside(self, folder: Path) -> None:
        """The tokenizer."""
        self.tokenizer.save(folder / FOLDER)
