"""Files of named tensors: safetensors, whole or absent, with JSON facts in their header."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from distpc.artifacts.files import atomic_path, write_bytes
from distpc.errors import ArtifactError, DistpcError

if TYPE_CHECKING:
    from torch import Tensor

_NOTES = "distpc"
_CHUNK_BYTES = 16 << 20
_DTYPES = {
    "float64": "F64",
    "float32": "F32",
    "float16": "F16",
    "bfloat16": "BF16",
    "int64": "I64",
    "int32": "I32",
    "int16": "I16",
    "int8": "I8",
    "uint8": "U8",
    "bool": "BOOL",
}


def write_tensors(
    path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, Any] | None = None
) -> int:
    """Write tensors and facts to `path`, whole or not at all.

    Args:
        path: the file; its folder is made where it is missing.
        tensors: on any device, no two sharing memory.
        metadata: JSON values.

    Returns:
        bytes written.

    Raises:
        ResourceError: the disk is full.
    """
    from safetensors.torch import save

    # One entry: safetensors writes several in an order that changes from run to run.
    notes = None if metadata is None else {_NOTES: json.dumps(dict(metadata), sort_keys=True)}
    whole = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    # Our own write: the library's hides from us that the disk is full.
    content = save(whole, notes)
    write_bytes(path, content)
    return len(content)


class Entry(NamedTuple):
    """A tensor that is written some elements at a time.

    Attributes:
        name: in the file.
        dtype: safetensors' name of its type, see `dtype_name`.
        shape: of the whole.
        element_bytes: of one element.
        blocks: gives its elements in order, as flat tensors.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    element_bytes: int
    blocks: Callable[[], Iterable[Tensor]]


def dtype_name(tensor: Tensor) -> str:
    """What safetensors calls a tensor's type."""
    return _DTYPES[str(tensor.dtype).removeprefix("torch.")]


def stream_tensors(path: Path, entries: Iterable[Entry]) -> tuple[int, str]:
    """Write tensors to `path`, whole or not at all, none of which has to be in memory.

    Not by the library, whose writer copies all tensors and holds the interpreter while other
    threads should go on; and the digest comes from the bytes as they are written.

    Returns:
        bytes written, and their SHA-256 as hexadecimal digits.

    Raises:
        ResourceError: the disk is full.
    """
    import torch

    # Widest types first keeps every tensor aligned for readers that map the file.
    ordered = sorted(entries, key=lambda entry: -entry.element_bytes)
    header: dict[str, Any] = {}
    end = 0
    for entry in ordered:
        begin, end = end, end + math.prod(entry.shape) * entry.element_bytes
        header[entry.name] = {
            "dtype": entry.dtype,
            "shape": list(entry.shape),
            "data_offsets": [begin, end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    digest = hashlib.sha256()
    with atomic_path(path) as partial, partial.open("wb") as file:
        for block in (len(text).to_bytes(8, "little"), text):
            file.write(block)
            digest.update(block)
        for entry in ordered:
            for values in entry.blocks():
                flat = values.detach().cpu().contiguous().reshape(-1)
                content = flat.view(torch.uint8).numpy().data
                for first in range(0, len(content), _CHUNK_BYTES):
                    chunk = content[first : first + _CHUNK_BYTES]
                    file.write(chunk)
                    digest.update(chunk)
    return 8 + len(text) + end, digest.hexdigest()


def read_tensors(
    path: Path,
    *,
    holds: str = "tensors",
    error: type[DistpcError] = ArtifactError,
    fix: str | None = None,
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read all tensors of a file, mapped from it, and the facts that distpc noted in its header.

    Args:
        path: the file.
        holds: what the file should hold, for errors.
        error: raised where the file cannot be read.
        fix: what to do about it.

    Returns:
        Tensors by name, and the facts; none where another program wrote the file.

    Raises:
        ArtifactError, or `error`: the file is missing, cut, or no safetensors file.
    """
    with open_tensors(path, holds=holds, error=error, fix=fix) as handle:
        tensors = {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118
        return tensors, _facts(handle.metadata())


@contextlib.contextmanager
def open_tensors(
    path: Path,
    *,
    holds: str = "tensors",
    error: type[DistpcError] = ArtifactError,
    fix: str | None = None,
) -> Iterator[Any]:
    """A file of tensors, as safetensors opens it: for reading some of them, or slices.

    Arguments and errors as `read_tensors`.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as handle:
            yield handle
    except FileNotFoundError as cause:
        raise error(
            f"a file of {holds} is missing",
            where=path,
            expected="a file that an earlier stage wrote",
            fix=fix,
        ) from cause
    except (SafetensorError, OSError) as cause:
        raise error(
            f"a file of {holds} is cut or damaged",
            where=path,
            found=cause,
            expected="a whole safetensors file",
            fix=fix,
        ) from cause


def _facts(header: dict[str, str] | None) -> dict[str, Any]:
    try:
        facts = json.loads((header or {}).get(_NOTES, "{}"))
    except ValueError:
        return {}
    return facts if isinstance(facts, dict) else {}
