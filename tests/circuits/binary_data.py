"""The binary data sets that lie beside the checkout."""

from __future__ import annotations

import gzip
from functools import cache
from pathlib import Path

import numpy as np
import pytest

SHARED = Path(__file__).parents[2].parent / "shared" / "data" / "debd"
FOLDERS = [SHARED, *(parent / "shared" / "data" / "debd" for parent in Path(__file__).parents[3:])]
DEBD = next((folder for folder in FOLDERS if folder.is_dir()), SHARED)

needs_binary_data = pytest.mark.skipif(
    not DEBD.is_dir(), reason="the binary data sets are not beside the checkout"
)


@cache
def read_binary(name: str, split: str) -> np.ndarray:
    """(N, V) rows of a data set."""
    with gzip.open(DEBD / f"{name}.{split}.data.gz", "rt") as handle:
        return np.loadtxt(handle, delimiter=",", dtype=np.int64)
