"""Stage `shards`: from a source to WebDataset shards, split by a seeded permutation.

The same seed and source give the same bytes: members carry fixed times and owners, a sample's key
is its position in the source, and a shard's content depends on nothing but its split and number.
Each shard is whole or absent, so an interrupted stage goes on where it stopped.
"""

from __future__ import annotations

import shutil
import tarfile
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from distpc.artifacts.files import atomic_path, fingerprint, read_json, write_json
from distpc.artifacts.manifest import Artifact
from distpc.artifacts.stage import StageContext
from distpc.config.schema import DataConfig, RunConfig
from distpc.config.sources import ImageFolderSource, ShardsSource, TextSource
from distpc.data import existing
from distpc.data.codec import SampleCodec
from distpc.data.color import NUM_CATEGORIES
from distpc.data.plan import seeded_permutation
from distpc.data.sources import BadSampleError, Source, open_source
from distpc.data.sources.image_folder import image_identity
from distpc.data.sources.text import text_identity
from distpc.data.spec import DatasetSpec
from distpc.errors import ConfigError, DataError, ResourceError
from distpc.parallel.progress import Progress

SPLITS = ("train", "valid", "test")
LAYOUT = "layout.json"
TAR_BLOCK = 512


def run(ctx: StageContext) -> None:
    """Write dataset.json, layout.json and {train,valid,test}-000000.tar ... into `ctx.out`.

    Raises:
        ConfigError: splits or colour space contradict the source.
        DataError: the source is not what it claims, has fewer samples than the splits need, or
            more bad samples than `data.max_bad_samples`.
        ResourceError: the disk is full, or certain to become so.
    """
    data = ctx.config.data
    if isinstance(data.source, ShardsSource):
        existing.take_over(ctx, data.source)
        return
    source = open_split(ctx.config, ctx.out)
    try:
        spec = colored(source.spec, data.color)
        seed = ctx.config.split_seed
        positions = split_positions(source, data, seed)
        _keep_matching(ctx.out, source, data, seed)
        writer = ShardWriter(ctx.out, source, data.max_bad_samples)
        writer.write_all(positions, data.samples_per_shard)
        spec.save(ctx.out)
        source.write_beside(ctx.out)
        ctx.metadata.update(
            dataset=spec.name,
            num_samples=writer.num_written,
            bad_samples=writer.bad_samples,
            source=source.facts(),
            identity=source.identity(),
        )
    finally:
        source.close()


def source_identity(config: RunConfig, folder: Path) -> dict[str, Any]:
    """What changes when the source's content does.

    Finished shards in `folder` speak for a source that is no longer there.

    Raises:
        DataError: neither a readable source nor finished shards.
    """
    try:
        if isinstance(config.data.source, ShardsSource):
            return existing.identity(config.data.source)
        if isinstance(config.data.source, ImageFolderSource):
            return image_identity(config.data.source)
        if isinstance(config.data.source, TextSource):
            return text_identity(config.data.source)
        with tempfile.TemporaryDirectory() as scratch:
            source = open_split(config, Path(scratch))
            try:
                return source.identity()
            finally:
                source.close()
    except DataError:
        shards = Artifact.find(folder)
        if shards is None:
            raise
        return shards.metadata["identity"]


def source_spec(config: RunConfig) -> DatasetSpec:
    """What the shards of this run's source will hold, without writing any.

    Raises:
        ConfigError, DataError: as `run`, as far as opening the source shows it.
    """
    data = config.data
    if isinstance(data.source, ShardsSource):
        return existing.load_spec(data.source, data.color)
    with tempfile.TemporaryDirectory() as scratch:
        source = open_split(config, Path(scratch))
        try:
            return colored(source.spec, data.color)
        finally:
            source.close()


def open_split(config: RunConfig, scratch: Path) -> Source:
    """The source, which learns what it has to learn (a tokenizer) from the training split alone.

    Args:
        config: of the run.
        scratch: folder on whose disk compressed archives may be unpacked while they are read.

    Raises:
        DataError: it is missing, or not what its kind promises.
    """

    def training(num_groups: int) -> np.ndarray:
        return _deal(num_groups, config.data, config.split_seed, "documents")["train"]

    return open_source(config.data.source, scratch, training)


def colored(spec: DatasetSpec, color: str) -> DatasetSpec:
    """The data set as the loader gives it, in colour space `color`.

    Raises:
        ConfigError: a colour space for data that are no RGB images.
    """
    if color == "as_is":
        return spec
    if spec.image_shape is None or spec.image_shape[2] != 3:
        raise ConfigError(
            "a colour space needs RGB images",
            where="data.color",
            found=f"{color} for {spec.kind} data of shape {spec.image_shape}",
            expected="as_is",
        )
    height, width, _ = spec.image_shape
    return replace(spec, color=color, num_categories=NUM_CATEGORIES[color] * (height * width))


def split_positions(source: Source, data: DataConfig, seed: int) -> dict[str, np.ndarray]:
    """The source positions of every split, in the order in which they are written.

    Groups (documents) are permuted and dealt out whole; published test samples stay the test set.

    Raises:
        ConfigError: split.test contradicts the presence of published test samples.
        DataError: a split would get nothing.
    """
    published = source.num_published_test
    if published and data.split.test:
        raise ConfigError(
            "the source has a test set of its own",
            where="data.split.test",
            found=data.split.test,
            expected="0, with train + valid = 1 dividing the other samples",
            fix="for example data.split={train: 0.9, valid: 0.1, test: 0}",
        )
    if not published and not data.split.test:
        raise ConfigError(
            "no test data",
            where="data.split.test",
            found=0,
            expected="a fraction above 0, since the source has no test set of its own",
        )
    num_own = source.num_samples - published
    groups = np.arange(num_own) if source.groups is None else source.groups
    num_groups = int(groups.max()) + 1 if num_own else 0
    dealt = _deal(num_groups, data, seed, source.group_name)
    positions = {split: _members(groups, chosen) for split, chosen in dealt.items()}
    if published:
        positions["test"] = np.arange(num_own, source.num_samples)
    return positions


def _deal(num_groups: int, data: DataConfig, seed: int, name: str) -> dict[str, np.ndarray]:
    """The groups of every split, in a seeded order.

    Raises:
        DataError: a split would get nothing.
    """
    order = seeded_permutation(num_groups, seed)
    dealt, first = {}, 0
    for split, count in _split_counts(num_groups, data, name).items():
        dealt[split] = order[first : first + count]
        first += count
    return dealt


def _split_counts(num_groups: int, data: DataConfig, name: str) -> dict[str, int]:
    """How many groups each split gets: rounded shares, the rest to train."""
    valid = round(num_groups * data.split.valid)
    test = round(num_groups * data.split.test)
    counts = {"train": num_groups - valid - test, "valid": valid}
    if data.split.test:
        counts["test"] = test
    if min(counts.values()) < 1:
        raise DataError(
            f"too few {name} for the splits",
            where="data.split",
            found=f"{num_groups} {name}: {counts}",
            expected="at least one in every split",
            fix="give more data or larger fractions",
        )
    return counts


def _members(groups: np.ndarray, chosen: np.ndarray) -> np.ndarray:
    """Positions of the chosen groups' samples, group after group in the order of `chosen`."""
    rank = np.full(int(groups.max()) + 1, -1)
    rank[chosen] = np.arange(len(chosen))
    members = np.flatnonzero(rank[groups] >= 0)
    return members[np.argsort(rank[groups[members]], kind="stable")]


def _keep_matching(out: Path, source: Source, data: DataConfig, seed: int) -> None:
    """Drop an earlier attempt's shards unless the source is still what they were made from."""
    layout = {
        "seed": seed,
        "split": data.split.model_dump(),
        "samples_per_shard": data.samples_per_shard,
        "num_samples": source.num_samples,
        "source": data.source.model_dump(mode="json"),
        "content": fingerprint(source.identity()),
    }
    if (out / LAYOUT).is_file() and read_json(out / LAYOUT) == layout:
        return
    for shard in out.glob("*.tar"):
        shard.unlink()
    write_json(out / LAYOUT, layout)


@dataclass
class ShardWriter:
    """Writes the shards of all splits into one folder.

    Attributes:
        out: the folder; whole shards in it are kept.
        source: where the samples come from.
        max_bad_samples: undecodable samples that are left out before writing stops.
    """

    out: Path
    source: Source
    max_bad_samples: int

    def __post_init__(self) -> None:
        self.codec = SampleCodec(self.source.spec)
        self.key_width = max(6, len(str(self.source.num_samples - 1)))
        self.num_written: dict[str, int] = {}
        self.bad_samples: list[dict[str, str]] = []

    def write_all(self, positions: dict[str, np.ndarray], samples_per_shard: int) -> None:
        """Write every shard that is not there yet."""
        shards = [
            (split, self.out / f"{split}-{number:06d}.tar", members[first:][:samples_per_shard])
            for split, members in positions.items()
            for number, first in enumerate(range(0, len(members), samples_per_shard))
        ]
        missing = sum(len(members) for _, path, members in shards if not path.exists())
        self._check_space(missing)
        with Progress("shards", self.source.num_samples, "samples") as progress:
            for split, path, members in shards:
                if path.exists():
                    written = self._recount(path, members)
                else:
                    written = self._write(path, members)
                self.num_written[split] = self.num_written.get(split, 0) + written
                progress.advance(len(members))

    def _write(self, path: Path, members: np.ndarray) -> int:
        """Write one shard; the number of samples in it."""
        from webdataset.writer import TarWriter

        written = 0
        with atomic_path(path) as partial, partial.open("wb") as stream:
            writer = TarWriter(stream, encoder=False, mtime=0, user="distpc", group="distpc")
            try:
                for position in members:
                    content = self._encode(int(position))
                    if content is not None:
                        key = f"{position:0{self.key_width}d}"
                        writer.write({"__key__": key, self.codec.extension: content})
                        written += 1
            finally:
                writer.close()
        return written

    def _encode(self, position: int) -> bytes | None:
        """A sample's file, or None if it is bad and the budget allows."""
        try:
            return self.codec.encode(self.source.read(position))
        except BadSampleError as error:
            self.bad_samples.append({"name": error.name, "reason": error.reason})
            if len(self.bad_samples) <= self.max_bad_samples:
                return None
            raise DataError(
                "a sample cannot be decoded"
                if self.max_bad_samples == 0
                else "more samples cannot be decoded than the budget allows",
                where=", ".join(bad["name"] for bad in self.bad_samples[-5:]),
                found=error.reason,
                expected=f"at most data.max_bad_samples={self.max_bad_samples} bad samples",
                fix="mend or remove the file, or raise data.max_bad_samples",
            ) from error

    def _recount(self, path: Path, members: np.ndarray) -> int:
        """Samples in a shard of an earlier attempt; what it had to leave out is listed again."""
        with tarfile.open(path, "r:") as archive:
            present = {int(name.split(".")[0]) for name in archive.getnames()}
        for position in members:
            if int(position) not in present:
                self._encode(int(position))
        return len(present)

    def _check_space(self, num_samples: int) -> None:
        """Refuse at once what cannot fit: a sample takes a header and at least one block."""
        blocks = 2
        if self.source.spec.image_shape is None:
            content = len(self.codec.encode(self.source.read(0)))
            blocks = 1 + -(-content // TAR_BLOCK)
        needed = num_samples * blocks * TAR_BLOCK
        free = shutil.disk_usage(self.out).free
        if free < needed:
            raise ResourceError(
                "the disk is too small for the shards",
                where=self.out,
                found=f"{free} bytes free",
                expected=f"at least {needed} bytes for {num_samples} samples",
                fix="free some space or choose another --out",
            )
