"""Files of named tensors: safetensors, whole or absent, with JSON facts in their header."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distpc.artifacts.files import write_bytes
from distpc.errors import ArtifactError, DistpcError

if TYPE_CHECKING:
    from torch import Tensor

_NOTES = "distpc"


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
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as handle:
            tensors = {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118
            return tensors, _facts(handle.metadata())
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
