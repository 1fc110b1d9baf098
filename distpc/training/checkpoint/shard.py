"""One rank's file of a checkpoint: element ranges of tensors, in the safetensors format.

keys      banks.0.statistics            a parameter or buffer
          banks.0.statistics#mean       what the optimizer keeps beside it, here `mean`
in files  banks.0.statistics@1200       its elements from the 1200th on, flattened
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from distpc.artifacts.tensors import Entry, dtype_name, stream_tensors
from distpc.errors import ArtifactError
from distpc.parallel.places import Split

SLOT = "#"


class Piece(NamedTuple):
    """Consecutive elements of one flattened tensor.

    Attributes:
        key: names the tensor.
        shape: of the whole tensor.
        start: first element.
        values: (n,) on the CPU.
        split: how its elements are counted, where ranks share the tensor; None: flattened.
    """

    key: str
    shape: tuple[int, ...]
    start: int
    values: Tensor
    split: Split | None = None


def write_shard(path: Path, pieces: Sequence[Piece]) -> dict[str, Any]:
    """Write pieces to `path`, whole or not at all.

    Returns:
        JSON facts for the manifest: `bytes` and `sha256` of the file, `ranges` [key, start, stop],
        and of every `tensors` key its whole shape, its type and, if it has one, its split.

    Raises:
        ResourceError: the disk is full.
    """
    num_bytes, digest = stream_tensors(
        path,
        [
            Entry(
                _entry(piece.key, piece.start),
                dtype_name(piece.values),
                (piece.values.numel(),),
                piece.values.element_size(),
                lambda values=piece.values: [values],  # type: ignore[misc]
            )
            for piece in pieces
        ],
    )
    return {
        "bytes": num_bytes,
        "sha256": digest,
        "ranges": [[p.key, p.start, p.start + p.values.numel()] for p in pieces],
        "tensors": {piece.key: _kind(piece) for piece in pieces},
    }


def _kind(piece: Piece) -> dict[str, Any]:
    kind: dict[str, Any] = {"shape": list(piece.shape), "dtype": dtype_name(piece.values)}
    if piece.split is not None:
        kind["split"] = [piece.split.dim, piece.split.parts]
    return kind


def read_range(path: Path, key: str, first: int, start: int, stop: int) -> Tensor:
    """Elements start .. stop - 1 of a tensor, (stop - start,) on the CPU.

    Args:
        path: a file that `write_shard` wrote.
        key: of the tensor.
        first: where the piece in the file starts that holds them.
        start, stop: elements of the flattened whole tensor.

    Raises:
        ArtifactError: the file is missing or damaged.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            return file.get_slice(_entry(key, first))[start - first : stop - first]
    except (SafetensorError, OSError) as error:
        raise ArtifactError(
            "a checkpoint's tensors cannot be read",
            where=f"{path}, '{key}' from element {first}",
            found=error,
            expected=f"elements {start}:{stop}",
            fix="remove this checkpoint and run the same command again: the one before continues",
        ) from error


def _entry(key: str, start: int) -> str:
    return f"{key}@{start}"
