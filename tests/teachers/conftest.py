"""Real shards of the digits, and contexts of the teacher stage on them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from distpc.artifacts import Artifact, StageContext
from distpc.config import RunConfig
from distpc.data import index, shards

ContextMaker = Callable[..., StageContext]


@pytest.fixture(scope="session")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Artifact]:
    """The artifacts of stages shards and index."""
    folder = tmp_path_factory.mktemp("data")
    made: dict[str, Artifact] = {}
    for name, stage in (("shards", shards.run), ("index", index.run)):
        ctx = _context(folder / name, made, {"kind": "pixels"}, 1)
        stage(ctx)
        made[name] = Artifact.seal(ctx.out, name, "0" * 16, 0.0, ctx.metadata)
    return made


@pytest.fixture
def make_context(tmp_path: Path, inputs: dict[str, Artifact]) -> ContextMaker:
    """`make_context(teacher={...}, num_ranks=1, folder="a")`: a context with its own folders."""

    def make(teacher: dict[str, Any], num_ranks: int = 1, folder: str = "run") -> StageContext:
        return _context(tmp_path / folder / "teacher", inputs, teacher, num_ranks)

    return make


def _context(
    out: Path, inputs: dict[str, Artifact], teacher: dict[str, Any], num_ranks: int
) -> StageContext:
    config = RunConfig.model_validate(
        {
            "name": "digits",
            "seed": 5,
            "data": {"source": {"kind": "digits"}, "samples_per_shard": 256},
            "teacher": teacher,
            "parallel": {"num_ranks": num_ranks},
        }
    )
    out.mkdir(parents=True, exist_ok=True)
    return StageContext(config, out, inputs, "f" * 16, out.parent / "tb")
