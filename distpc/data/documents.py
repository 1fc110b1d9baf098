"""Which chunks of text belong together: the documents of a split, chunk after chunk.

A sample's key is its position in the source, so that a table of first positions finds the
document. The chunks of a document stand side by side in their split.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from distpc.artifacts.files import atomic_path
from distpc.data.index import ShardIndex
from distpc.data.reader import read_shard
from distpc.data.tokenizers import DOCUMENTS
from distpc.errors import DataError


def save_documents(folder: Path, firsts: np.ndarray) -> None:
    """Write the position of each document's first chunk, and the number of chunks: (D + 1,)."""
    with atomic_path(folder / DOCUMENTS) as partial, partial.open("wb") as handle:
        np.save(handle, np.asarray(firsts, dtype=np.int64))


def has_documents(folder: Path) -> bool:
    """Whether shards say which chunks belong together."""
    return (folder / DOCUMENTS).is_file()


def iterate_documents(
    index: ShardIndex, folder: Path, split: str
) -> Iterator[tuple[int, np.ndarray]]:
    """Yield (document, (n, V) its chunks in order) of a split; long ones in parts, shard by shard.

    Args:
        index: of the shards.
        folder: of the shards stage.
        split: train, valid or test.

    Raises:
        DataError: documents.npy does not describe these shards.
    """
    firsts = np.load(folder / DOCUMENTS, allow_pickle=False)
    for entry in index.shards(split):
        shard = read_shard(entry, index.spec)
        positions = np.array([int(key) for key in shard.keys])
        if positions.max() >= firsts[-1]:
            raise DataError(
                "the table of documents does not belong to the shards",
                where=folder / DOCUMENTS,
                found=f"{firsts[-1]} chunks",
                expected=f"at least {positions.max() + 1}",
                fix="remove the shards stage's folder and run the same command again",
            )
        owner = np.searchsorted(firsts, positions, side="right") - 1
        for rows in np.split(np.arange(len(owner)), np.flatnonzero(np.diff(owner)) + 1):
            yield int(owner[rows[0]]), shard.x[rows]
