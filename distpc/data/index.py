"""Stage `index`: every shard read once and checked, so that samples can be addressed by position.

index.json lists the shards (split, samples, bytes, SHA-256); beside it one small .npz a shard holds
keys, offsets and sizes of its samples, read only when that shard is. Whatever a tar reader would
pass over in silence (cut archives, half samples, repeated or dotted keys) stops the run here.
"""

from __future__ import annotations

import os
import re
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from distpc.artifacts.files import atomic_path, file_digest, read_json, write_json
from distpc.artifacts.stage import StageContext
from distpc.data.archive import regular_members
from distpc.data.codec import SampleCodec
from distpc.data.spec import DatasetSpec
from distpc.errors import ArtifactError, DataError
from distpc.parallel.progress import Progress

FORMAT_VERSION = 1
INDEX = "index.json"
SHARD_NAME = re.compile(r"(train|valid|test)-(\d{6,})\.tar")
DECODE_ROWS = 1024
"""Samples decoded at once while their values are checked."""


@dataclass(frozen=True)
class SampleTable:
    """Where a shard's samples lie, in the order of the tar.

    Attributes:
        keys: of the N samples.
        offsets: (N,) int64, byte at which a sample's file starts in the tar.
        sizes: (N,) int64, bytes of that file.
    """

    keys: list[str]
    offsets: np.ndarray
    sizes: np.ndarray


@dataclass(frozen=True)
class ShardEntry:
    """One shard, as the index found it.

    Attributes:
        name: without suffix, for example train-000000; later stages name their files after it.
        split: train, valid or test.
        num_samples: samples in it.
        bytes: length of the tar.
        sha256: of the tar, in hexadecimal digits.
        path: of the tar.
        table_path: of its sample table.
    """

    name: str
    split: str
    num_samples: int
    bytes: int
    sha256: str
    path: Path
    table_path: Path

    def samples(self) -> SampleTable:
        """The shard's sample table (kept in memory for the shards used last)."""
        try:
            status = self.table_path.stat()
        except OSError as error:
            raise _broken_table(self.table_path, error) from error
        # A process may index the same folder twice; a new file has another time.
        return _read_table(self.table_path, status.st_mtime_ns, status.st_size)


@dataclass(frozen=True)
class ShardIndex:
    """All shards of a data set.

    Attributes:
        spec: of the samples.
        entries: train, valid, test, each in order of number.
    """

    spec: DatasetSpec
    entries: tuple[ShardEntry, ...]

    @classmethod
    def load(cls, folder: Path) -> ShardIndex:
        """Read the index in `folder`, the out folder of stage `index`.

        Raises:
            ArtifactError: it is missing, broken, or of another format version.
        """
        value = read_json(folder / INDEX)
        version = value.get("format_version") if isinstance(value, dict) else None
        if version != FORMAT_VERSION:
            raise ArtifactError(
                "an index has a format version that this code does not read",
                where=folder / INDEX,
                found=version,
                expected=FORMAT_VERSION,
                fix="remove the index stage's folder and run the same command again",
            )
        # By name, links left alone: a run's stages may be links to those of another run.
        shards = Path(os.path.normpath(folder.absolute() / value["shards_folder"]))
        entries = [
            ShardEntry(
                **entry,
                path=shards / f"{entry['name']}.tar",
                table_path=folder / f"{entry['name']}.npz",
            )
            for entry in value["shards"]
        ]
        return cls(DatasetSpec.from_json(value["dataset"]), tuple(entries))

    def shards(self, split: str) -> list[ShardEntry]:
        """The shards of `split`, in order."""
        return [entry for entry in self.entries if entry.split == split]

    def num_samples(self, split: str) -> int:
        """Samples in `split`."""
        return sum(entry.num_samples for entry in self.shards(split))


def run(ctx: StageContext) -> None:
    """Check every shard and write index.json and its tables into `ctx.out`.

    Raises:
        DataError: naming the shard, and the key where there is one, of what is wrong.
    """
    index = build_index(ctx.input("shards").path, ctx.out)
    splits = sorted({entry.split for entry in index.entries})
    ctx.metadata["num_samples"] = {split: index.num_samples(split) for split in splits}
    ctx.metadata["num_shards"] = {split: len(index.shards(split)) for split in splits}
    written = ctx.input("shards").metadata.get("num_samples", ctx.metadata["num_samples"])
    if ctx.metadata["num_samples"] != written:
        # A tar that was cut and padded ends early without being broken.
        raise DataError(
            "the shards hold other samples than were written",
            where=ctx.input("shards").path,
            found=ctx.metadata["num_samples"],
            expected=written,
            fix="remove the shards stage's folder and run the same command again",
        )


def build_index(shards: Path, out: Path) -> ShardIndex:
    """Index the shards in folder `shards` into folder `out`.

    Raises:
        DataError: as `run`.
    """
    spec = DatasetSpec.load(shards)
    paths = _shard_files(shards)
    first_seen: dict[str, str] = {}
    described = []
    with Progress("index", len(paths), "shards") as progress:
        for path in paths:
            table = scan_shard(path, spec)
            for key in table.keys:
                if key in first_seen:
                    raise DataError(
                        "a key is repeated",
                        where=f"{path}, key {key}",
                        found=f"also in {first_seen[key]}",
                        expected="one sample a key over all shards",
                        fix="remove the shards stage's folder and run the same command again",
                    )
                first_seen[key] = path.name
            _write_table(out / f"{path.stem}.npz", table)
            described.append(_describe(path, table))
            progress.advance()
    _check_splits(described, shards)
    write_json(
        out / INDEX,
        {
            "format_version": FORMAT_VERSION,
            # Relative, so that a run folder can be moved.
            "shards_folder": os.path.relpath(shards, out),
            "dataset": spec.to_json(),
            "shards": described,
        },
    )
    return ShardIndex.load(out)


def scan_shard(path: Path, spec: DatasetSpec) -> SampleTable:
    """Read one shard from end to end: its members, keys, and every sample's values.

    Raises:
        DataError: the tar is cut; a member is no plain file; a sample is half or its key has dots
            or is repeated; an image is of another size; a value lies outside its categories.
    """
    codec = SampleCodec(spec)
    table = SampleTable([], np.empty(0, np.int64), np.empty(0, np.int64))
    extents: list[tuple[int, int]] = []
    with path.open("rb") as handle:
        for member in regular_members(handle, path):
            table.keys.append(_key_of(member.name, codec.extension, path))
            extents.append((member.offset_data, member.size))
        _check_repeats(table.keys, path)
        for first in range(0, len(extents), DECODE_ROWS):
            files = list(_read_extents(handle, extents[first : first + DECODE_ROWS]))
            codec.decode(files, table.keys[first : first + DECODE_ROWS], path)
    both = np.array(extents, dtype=np.int64).reshape(-1, 2)
    return SampleTable(table.keys, both[:, 0].copy(), both[:, 1].copy())


def _read_extents(handle: Any, extents: list[tuple[int, int]]) -> Iterator[bytes]:
    for offset, size in extents:
        handle.seek(offset)
        yield handle.read(size)


def _key_of(name: str, extension: str, path: Path) -> str:
    key, _, found = name.partition(".")
    where = f"{path}, key {key}"
    if "." in found or not key or "/" in name:
        raise DataError(
            "a key has dots or slashes",
            where=where,
            found=name,
            expected=f"KEY.{extension} with no other dot in the name",
            fix="name samples by plain numbers",
        )
    if found != extension:
        raise DataError(
            "a sample is half, or holds more than its values",
            where=where,
            found=name,
            expected=f"one file {key}.{extension} a sample",
            fix="remove the shards stage's folder and run the same command again",
        )
    return key


def _check_repeats(keys: list[str], path: Path) -> None:
    seen: set[str] = set()
    for key in keys:
        if key in seen:
            raise DataError(
                "a key is repeated",
                where=f"{path}, key {key}",
                expected="one sample a key",
                fix="remove the shards stage's folder and run the same command again",
            )
        seen.add(key)


def _shard_files(folder: Path) -> list[Path]:
    """The shards in a folder, splits in order, numbers without gaps.

    Raises:
        DataError: a number is missing, or a tar has another name.
    """
    found: dict[str, list[Path]] = {"train": [], "valid": [], "test": []}
    for path in sorted(folder.glob("*.tar")):
        match = SHARD_NAME.fullmatch(path.name)
        if match is None:
            raise DataError(
                "a tar in the shards folder has an unknown name",
                where=path,
                expected="train-000000.tar, valid-..., test-...",
                fix="remove it",
            )
        split, number = match.group(1), int(match.group(2))
        if number != len(found[split]):
            raise DataError(
                "a shard is missing",
                where=folder,
                found=f"{path.name} after {len(found[split])} shards of {split}",
                expected=f"{split}-{len(found[split]):06d}.tar",
                fix="remove the shards stage's folder and run the same command again",
            )
        found[split].append(path)
    return [path for paths in found.values() for path in paths]


def _describe(path: Path, table: SampleTable) -> dict[str, Any]:
    return {
        "name": path.stem,
        "split": path.stem.partition("-")[0],
        "num_samples": len(table.keys),
        "bytes": path.stat().st_size,
        "sha256": file_digest(path),
    }


def _check_splits(described: list[dict[str, Any]], shards: Path) -> None:
    counts = dict.fromkeys(("train", "valid", "test"), 0)
    for entry in described:
        counts[entry["split"]] += entry["num_samples"]
    if min(counts.values()) == 0:
        raise DataError(
            "a split is empty",
            where=shards,
            found=counts,
            expected="samples in train, valid and test",
            fix="give more data or other fractions in data.split",
        )


def _write_table(path: Path, table: SampleTable) -> None:
    keys = np.array([key.encode() for key in table.keys], dtype=np.bytes_)
    with atomic_path(path) as partial, partial.open("wb") as handle:
        np.savez(handle, keys=keys, offsets=table.offsets, sizes=table.sizes)


@lru_cache(maxsize=256)
def _read_table(path: Path, mtime_ns: int, size: int) -> SampleTable:
    try:
        with np.load(path, allow_pickle=False) as arrays:
            keys = [key.decode() for key in arrays["keys"].tolist()]
            return SampleTable(keys, arrays["offsets"], arrays["sizes"])
    except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
        raise _broken_table(path, error) from error


def _broken_table(path: Path, error: Exception) -> ArtifactError:
    return ArtifactError(
        "a shard's sample table is missing or broken",
        where=path,
        found=error,
        fix="remove the index stage's folder and run the same command again",
    )
