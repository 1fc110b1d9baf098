"""Stage `index`: every shard read once and checked, so that samples can be addressed by position.

index.json lists the shards (split, samples, bytes, SHA-256); beside it one small .npz a shard holds
keys, offsets and sizes of its samples, read only when that shard is. Whatever a tar reader would
pass over in silence (cut archives, half samples, repeated or dotted keys) stops the run here.
"""

from __future__ import annotations

import contextlib
import os
import re
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from distpc.artifacts.cache import Cache, current
from distpc.artifacts.files import atomic_path, file_digest, read_json, write_json
from distpc.artifacts.place import Place
from distpc.artifacts.stage import StageContext
from distpc.data.archive import regular_members
from distpc.data.codec import SampleCodec
from distpc.data.existing import SUFFIX, known_digests, shards_place
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
        place: that holds the tar.
        table_path: of its sample table.
        cache: for copies of the tar, where its place is an object store.
    """

    name: str
    split: str
    num_samples: int
    bytes: int
    sha256: str
    place: Place
    table_path: Path
    cache: Cache = field(default_factory=current)

    @property
    def where(self) -> str:
        """Path or URL of the tar."""
        return self.place.at(f"{self.name}{SUFFIX}")

    @property
    def path(self) -> Path:
        """The tar, where its place is a folder."""
        return Path(self.where)

    @contextlib.contextmanager
    def local(self) -> Iterator[Path]:
        """A file with the tar's bytes, which stays while the block runs.

        Raises:
            PlaceError: it is missing, has changed since it was indexed, or cannot be reached.
            ResourceError: the cache or its disk is too small.
        """
        file = f"{self.name}{SUFFIX}"
        with self.cache.hold(self.place, file, self.bytes, self.sha256) as (path, _):
            yield path

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
        folder: of the stage `shards`: what lies beside the tars, wherever these are.
    """

    spec: DatasetSpec
    entries: tuple[ShardEntry, ...]
    folder: Path

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
        place = shards_place(shards)
        entries = [
            ShardEntry(
                **entry,
                place=place,
                table_path=folder / f"{entry['name']}.npz",
            )
            for entry in value["shards"]
        ]
        return cls(DatasetSpec.from_json(value["dataset"]), tuple(entries), shards)

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
    shards = ctx.input("shards")
    index = build_index(shards.path, ctx.out, known_digests(shards.metadata.get("identity")))
    splits = sorted({entry.split for entry in index.entries})
    ctx.metadata["num_samples"] = {split: index.num_samples(split) for split in splits}
    ctx.metadata["num_shards"] = {split: len(index.shards(split)) for split in splits}
    written = shards.metadata.get("num_samples", ctx.metadata["num_samples"])
    if ctx.metadata["num_samples"] != written:
        # A tar that was cut and padded ends early without being broken.
        raise DataError(
            "the shards hold other samples than were written",
            where=shards_place(shards.path),
            found=ctx.metadata["num_samples"],
            expected=written,
            fix="remove the shards stage's folder and run the same command again",
        )


def build_index(shards: Path, out: Path, known: Mapping[str, str] | None = None) -> ShardIndex:
    """Index the shards of the stage with folder `shards` into folder `out`.

    Args:
        known: SHA-256 that shards must have, by their files' names.

    Raises:
        DataError: as `run`.
        PlaceError: the shards' place cannot be read.
    """
    spec = DatasetSpec.load(shards)
    place = shards_place(shards)
    files = _shard_files(place)
    first_seen: dict[str, str] = {}
    described = []
    with Progress("index", len(files), "shards") as progress:
        for file, size in files.items():
            expected = (known or {}).get(file)
            with current().hold(place, file, size, expected) as (path, digest):
                table = scan_shard(path, spec, place.at(file))
                digest = file_digest(path) if place.is_local else digest
                described.append(_describe(file, path, digest, table))
            if expected not in (None, digest):
                raise _replaced(place.at(file), digest, expected)
            _refuse_repeats(table, file, first_seen, place)
            _write_table(out / f"{described[-1]['name']}.npz", table)
            progress.advance()
    _check_splits(described, place)
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


def scan_shard(path: Path, spec: DatasetSpec, where: str | None = None) -> SampleTable:
    """Read one shard from end to end: its members, keys, and every sample's values.

    Args:
        where: names the shard in errors; default: `path`.

    Raises:
        DataError: the tar is cut or empty; a member is no plain file; a sample is half or its key
            has dots or is repeated; an image is of another size; a value lies outside its
            categories.
    """
    codec = SampleCodec(spec)
    named = where or str(path)
    table = SampleTable([], np.empty(0, np.int64), np.empty(0, np.int64))
    extents: list[tuple[int, int]] = []
    with path.open("rb") as handle:
        for member in regular_members(handle, named):
            table.keys.append(_key_of(member.name, codec.extension, named))
            extents.append((member.offset_data, member.size))
        if not extents:
            raise DataError(
                "a shard is empty",
                where=named,
                expected="at least one sample in every shard",
                fix="remove it and number the others without a gap; or, if distpc wrote it, "
                "remove the shards stage's folder and lower data.max_bad_samples",
            )
        _check_repeats(table.keys, named)
        for first in range(0, len(extents), DECODE_ROWS):
            contents = list(_read_extents(handle, extents[first : first + DECODE_ROWS]))
            codec.decode(contents, table.keys[first : first + DECODE_ROWS], named)
    both = np.array(extents, dtype=np.int64).reshape(-1, 2)
    return SampleTable(table.keys, both[:, 0].copy(), both[:, 1].copy())


def _read_extents(handle: Any, extents: list[tuple[int, int]]) -> Iterator[bytes]:
    for offset, size in extents:
        handle.seek(offset)
        yield handle.read(size)


def _key_of(name: str, extension: str, path: str) -> str:
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


def _check_repeats(keys: list[str], path: str) -> None:
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


def _refuse_repeats(
    table: SampleTable, file: str, first_seen: dict[str, str], place: Place
) -> None:
    for key in table.keys:
        if key in first_seen:
            raise DataError(
                "a key is repeated",
                where=f"{place.at(file)}, key {key}",
                found=f"also in {first_seen[key]}",
                expected="one sample a key over all shards",
                fix="remove the shards stage's folder and run the same command again",
            )
        first_seen[key] = file


def _shard_files(place: Place) -> dict[str, int]:
    """Bytes of the shards in a place by name, splits in order, numbers without gaps.

    Raises:
        DataError: a number is missing, or a tar has another name.
    """
    found: dict[str, dict[str, int]] = {"train": {}, "valid": {}, "test": {}}
    for name, facts in place.list().items():
        if not name.endswith(SUFFIX) or "/" in name:
            continue
        match = SHARD_NAME.fullmatch(name)
        if match is None:
            raise DataError(
                "a tar in the shards folder has an unknown name",
                where=place.at(name),
                expected="train-000000.tar, valid-..., test-...",
                fix="remove it",
            )
        split, number = match.group(1), int(match.group(2))
        if number != len(found[split]):
            raise DataError(
                "a shard is missing",
                where=place,
                found=f"{name} after {len(found[split])} shards of {split}",
                expected=f"{split}-{len(found[split]):06d}.tar",
                fix="remove the shards stage's folder and run the same command again",
            )
        found[split][name] = facts.bytes
    return {name: size for files in found.values() for name, size in files.items()}


def _describe(file: str, path: Path, digest: str | None, table: SampleTable) -> dict[str, Any]:
    return {
        "name": file.removesuffix(SUFFIX),
        "split": file.partition("-")[0],
        "num_samples": len(table.keys),
        "bytes": path.stat().st_size,
        "sha256": digest,
    }


def _replaced(where: str, found: str | None, expected: str | None) -> DataError:
    return DataError(
        "a shard is not the one that its manifest vouches for",
        where=where,
        found=f"SHA-256 {found}",
        expected=f"SHA-256 {expected}",
        fix="bring it again from where it was written; or, if it was meant to change, remove the "
        "manifest.json beside the shards",
    )


def _check_splits(described: list[dict[str, Any]], shards: Place) -> None:
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
