"""Files of features, latents and centroids: safetensors with keys beside the rows.

A shard file holds one tensor whose row i belongs to sample `keys[i]`, the keys themselves, and
the fingerprint of the stage that wrote it, so that rows can never be matched by position alone.
Tokens that a short chunk of text lacks have no latent: where a shard of features has such, it says
which are present, and their latents are NO_LATENT.
Legend: N samples of a shard, Z latents of a sample, D feature width, K clusters, L key length.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from distpc.artifacts.manifest import Artifact
from distpc.artifacts.tensors import read_tensors as read_file
from distpc.artifacts.tensors import write_tensors as write_file
from distpc.errors import LatentError
from distpc.parallel.stopwatch import part

FORMAT_VERSION = 1
SUFFIX = ".safetensors"
PRESENT = "present"
NO_LATENT = -1
"""In place of a latent, where a sample lacks the token."""
REDO = "remove the stage's folder and run the same command again"


@dataclass(frozen=True)
class StoredShard:
    """One shard's rows.

    Attributes:
        path: the file.
        rows: (N, Z, D) features or (N, Z) latents; mapped from the file, not copied.
        keys: the samples' keys, N of them.
        metadata: what the writer noted.
        present: (N, Z) bool, the rows' features that there are; None where all are.
    """

    path: Path
    rows: Tensor
    keys: list[str]
    metadata: dict[str, Any]
    present: Tensor | None = None


def shard_path(folder: Path, shard_name: str) -> Path:
    """The file of shard `train-000000` in `folder`."""
    return folder / f"{shard_name}{SUFFIX}"


def write_shard(
    path: Path,
    name: str,
    rows: Tensor,
    keys: Sequence[str],
    metadata: Mapping[str, Any],
    present: Tensor | None = None,
) -> int:
    """Write one shard, whole or not at all.

    Args:
        name: what the rows are, `features` or `latents`.
        rows: (N, ...), contiguous.
        keys: N different keys.
        metadata: JSON values; `fingerprint` must be among them.
        present: (N, Z) bool, the features that there are; default: all.

    Returns:
        bytes written.
    """
    if len(keys) != len(rows):
        raise ValueError(f"{len(keys)} keys for {len(rows)} rows")
    tensors = {name: rows.contiguous(), "keys": _pack_keys(keys)}
    if present is not None:
        tensors[PRESENT] = present.contiguous()
    return write_tensors(path, tensors, {**metadata, "holds": name})


@part("read")
def read_shard(
    path: Path,
    name: str,
    *,
    fingerprint: str | None = None,
    keys: Sequence[str] | None = None,
) -> StoredShard:
    """Read one shard and check it.

    Args:
        name: what the rows must be, `features` or `latents`.
        fingerprint: of the stage that must have written it, if known.
        keys: of the samples that it must hold, in order, if known.

    Raises:
        LatentError: missing, cut, of another version or kind, or not what was expected.
    """
    tensors, metadata = read_tensors(path, name, fingerprint)
    found = _unpack_keys(path, tensors["keys"])
    if len(found) != len(tensors[name]):
        raise LatentError(
            f"a shard of {name} has not one key a row",
            where=path,
            found=f"{len(found)} keys",
            expected=f"{len(tensors[name])} keys",
            fix=REDO,
        )
    if keys is not None and found != list(keys):
        raise _other_keys(path, name, found, list(keys))
    return StoredShard(path, tensors[name], found, metadata, tensors.get(PRESENT))


def feature_shards(features: Artifact) -> list[str]:
    """Names of the shards that the features stage wrote, in order.

    Raises:
        LatentError: there are none.
    """
    names = sorted(Path(file).stem for file in features.files if file.endswith(SUFFIX))
    if not names:
        raise LatentError("there are no feature shards", where=features.path, fix=REDO)
    return names


def load_latents(
    folder: Path, shard_name: str, fingerprint: str | None = None
) -> tuple[list[str], np.ndarray]:
    """Keys and (N, Z) int32 latents of one shard, from the folder of the assign stage; those of
    missing tokens are NO_LATENT.

    Args:
        shard_name: as in the data index, for example `train-000000`.
        fingerprint: of the assign stage that must have written it, if known.

    Raises:
        LatentError: missing, cut or of another stage, or a value outside the clusters.
    """
    shard = read_shard(shard_path(folder, shard_name), "latents", fingerprint=fingerprint)
    latents = shard.rows.numpy().copy()
    num_clusters = int(shard.metadata.get("num_clusters", 0))
    lowest = NO_LATENT if shard.metadata.get("missing") else 0
    if latents.size and not lowest <= latents.min() <= latents.max() < num_clusters:
        raise LatentError(
            "a latent value is outside the clusters",
            where=shard.path,
            found=f"values {latents.min()} .. {latents.max()}",
            expected=f"{lowest} .. {num_clusters - 1}",
            fix=REDO,
        )
    return shard.keys, latents


def left_out_keys(folder: Path, shard_name: str) -> set[str]:
    """Samples of a data shard that have no latents, because they could not be encoded.

    Raises:
        LatentError: the latent shard is missing or cut.
    """
    _, metadata = read_tensors(shard_path(folder, shard_name), "latents", None)
    return set(metadata.get("bad", {}))


@part("write")
def write_tensors(path: Path, tensors: dict[str, Tensor], metadata: Mapping[str, Any]) -> int:
    """Write named tensors and notes, whole or not at all; returns the bytes written.

    Args:
        metadata: JSON values; `holds` says what the file is.

    Raises:
        ResourceError: the disk is full.
    """
    return write_file(path, tensors, {"format_version": FORMAT_VERSION, **metadata})


@part("read")
def read_tensors(
    path: Path, name: str, fingerprint: str | None
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read the tensors and notes of a file that holds `name`.

    Args:
        fingerprint: of the stage that must have written it, if known.

    Raises:
        LatentError: missing, cut, of another version, kind or fingerprint.
    """
    tensors, metadata = read_file(path, holds=name, error=LatentError, fix=REDO)
    _check_metadata(path, name, fingerprint, metadata)
    return tensors, metadata


def _check_metadata(
    path: Path, name: str, fingerprint: str | None, metadata: dict[str, Any]
) -> None:
    version = metadata.get("format_version")
    if version != FORMAT_VERSION or metadata.get("holds") != name:
        raise LatentError(
            f"a file of {name} is of a kind or version that this code does not read",
            where=path,
            found=f"{metadata.get('holds', 'something else')}, format version {version}",
            expected=f"{name}, format version {FORMAT_VERSION}",
            fix="use the distpc that wrote it, or remove the stage's folder and run it again",
        )
    if fingerprint is not None and metadata.get("fingerprint") != fingerprint:
        raise LatentError(
            f"a file of {name} belongs to another run of its stage",
            where=path,
            found=f"fingerprint {metadata.get('fingerprint')}",
            expected=f"fingerprint {fingerprint}",
            fix=REDO,
        )


def _pack_keys(keys: Sequence[str]) -> Tensor:
    """(N, L) uint8, UTF-8, padded with zeros."""
    encoded = np.array([key.encode() for key in keys], dtype=bytes)
    length = max(encoded.itemsize, 1)
    return torch.from_numpy(encoded.view(np.uint8).reshape(len(keys), length).copy())


def _unpack_keys(path: Path, packed: Tensor) -> list[str]:
    if packed.ndim != 2 or packed.dtype != torch.uint8 or packed.shape[1] == 0:
        raise LatentError("a shard's keys cannot be read", where=path, fix=REDO)
    rows = np.ascontiguousarray(packed.numpy()).view(f"S{packed.shape[1]}").ravel()
    return [row.decode() for row in rows]


def _other_keys(path: Path, name: str, found: list[str], expected: list[str]) -> LatentError:
    position = next(
        (i for i, (a, b) in enumerate(zip(found, expected, strict=False)) if a != b),
        min(len(found), len(expected)),
    )

    def describe(keys: list[str]) -> str:
        key = f"'{keys[position]}'" if position < len(keys) else "no key"
        return f"{len(keys)} keys, number {position} is {key}"

    return LatentError(
        f"a shard of {name} holds other samples than expected",
        where=path,
        found=describe(found),
        expected=describe(expected),
        fix=REDO,
    )
