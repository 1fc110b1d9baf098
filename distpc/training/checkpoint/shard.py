"""One rank's file of a checkpoint: element ranges of tensors, in the safetensors format.

Written here rather than by the library, whose writer copies all tensors and holds the interpreter
while training should go on; and the digest comes from the bytes as they are written.

    keys      banks.0.statistics            a parameter or buffer
              banks.0.statistics#mean       what the optimizer keeps beside it, here `mean`
    in files  banks.0.statistics@1200       its elements from the 1200th on, flattened
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from distpc.artifacts.files import atomic_path
from distpc.errors import ArtifactError
from distpc.parallel.places import Split

SLOT = "#"
_CHUNK_BYTES = 16 << 20
_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


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
    # Widest types first keeps every piece aligned for readers that map the file.
    pieces = sorted(pieces, key=lambda piece: -piece.values.element_size())
    header: dict[str, Any] = {}
    end = 0
    for piece in pieces:
        begin, end = end, end + piece.values.numel() * piece.values.element_size()
        header[_entry(piece.key, piece.start)] = {
            "dtype": _DTYPES[piece.values.dtype],
            "shape": [piece.values.numel()],
            "data_offsets": [begin, end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    digest = hashlib.sha256()
    with atomic_path(path) as partial, partial.open("wb") as file:
        for block in (len(text).to_bytes(8, "little"), text):
            file.write(block)
            digest.update(block)
        for piece in pieces:
            content = piece.values.contiguous().view(torch.uint8).numpy().data
            for first in range(0, len(content), _CHUNK_BYTES):
                chunk = content[first : first + _CHUNK_BYTES]
                file.write(chunk)
                digest.update(chunk)
    return {
        "bytes": 8 + len(text) + end,
        "sha256": digest.hexdigest(),
        "ranges": [[p.key, p.start, p.start + p.values.numel()] for p in pieces],
        "tensors": {piece.key: _kind(piece) for piece in pieces},
    }


def _kind(piece: Piece) -> dict[str, Any]:
    kind: dict[str, Any] = {"shape": list(piece.shape), "dtype": _DTYPES[piece.values.dtype]}
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
