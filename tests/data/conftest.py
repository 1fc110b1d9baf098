"""Real shards and indexes for the tests of distpc.data, made by the stages themselves."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from distpc.artifacts import Artifact, StageContext
from distpc.config import parse_config
from distpc.data import index, shards
from distpc.data.index import ShardIndex
from distpc.data.spec import DatasetSpec

Build = Callable[..., ShardIndex]


def run_shards(folder: Path, data: dict[str, Any], seed: int = 0) -> StageContext:
    """Run stage `shards` into folder / "shards"."""
    config = parse_config({"name": "test", "seed": seed, "data": data}, where="test")
    ctx = StageContext(config, folder / "shards", {}, "f" * 16, folder / "tb")
    ctx.out.mkdir(parents=True, exist_ok=True)
    shards.run(ctx)
    return ctx


def run_index(ctx: StageContext) -> ShardIndex:
    """Run stage `index` beside the shards of `ctx`."""
    artifact = Artifact.seal(ctx.out, "shards", ctx.fingerprint, 0.0, ctx.metadata)
    out = ctx.out.parent / "index"
    out.mkdir(exist_ok=True)
    inner = StageContext(ctx.config, out, {"shards": artifact}, "f" * 16, ctx.tensorboard)
    index.run(inner)
    return ShardIndex.load(out)


@pytest.fixture
def build(tmp_path: Path) -> Build:
    """build(data, seed=0): run both stages in tmp_path; the index."""

    def make(data: dict[str, Any], seed: int = 0) -> ShardIndex:
        return run_index(run_shards(tmp_path, data, seed))

    return make


@pytest.fixture
def rows_index(tmp_path: Path) -> Callable[[Sequence[int]], ShardIndex]:
    """rows_index([10, 10, 7]): an index of train shards of these sizes.

    The one variable of a sample is its number, so that samples can be told apart.
    """

    def make(sizes: Sequence[int]) -> ShardIndex:
        folder = tmp_path / f"rows-{len(list(tmp_path.iterdir()))}"
        (folder / "shards").mkdir(parents=True)
        (folder / "index").mkdir()
        total = sum(sizes)
        spec = DatasetSpec("rows", "array", 1, (max(total, 2),))
        spec.save(folder / "shards")
        source = Numbered(spec, total + 2)
        writer = shards.ShardWriter(folder / "shards", source, 0)
        first = 0
        for number, size in enumerate(sizes):
            members = np.arange(first, first + size)
            writer._write(folder / "shards" / f"train-{number:06d}.tar", members)
            first += size
        for split, position in (("valid", total), ("test", total + 1)):
            writer._write(folder / "shards" / f"{split}-000000.tar", np.array([position]))
        return index.build_index(folder / "shards", folder / "index")

    return make


class Numbered(shards.Source):
    """Samples that are their own position (modulo the categories)."""

    def __init__(self, spec: DatasetSpec, num_samples: int) -> None:
        self.spec = spec
        self.num_samples = num_samples

    def read(self, position: int) -> np.ndarray:
        """(1,) the position."""
        return np.array([position % (self.spec.num_categories[0] or 1)])

    def identity(self) -> dict[str, Any]:
        """Nothing but the count."""
        return {"num_samples": self.num_samples}
