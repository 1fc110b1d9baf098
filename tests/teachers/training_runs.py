"""Real shards of the digits, and contexts of the teacher stage on them, for the tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from distpc.artifacts import Artifact, StageContext
from distpc.config import RunConfig
from distpc.data import index, shards

TINY = {"width": 16, "num_heads": 2, "encoder_blocks": 1, "feature_width": 4, "num_epochs": 3}


def make_data(folder: Path) -> dict[str, Artifact]:
    """The artifacts of stages shards and index."""
    inputs: dict[str, Artifact] = {}
    for name, stage in (("shards", shards.run), ("index", index.run)):
        ctx = _context(folder / name, inputs, _config({"kind": "pixels"}, 1))
        stage(ctx)
        inputs[name] = Artifact.seal(ctx.out, name, "0" * 16, 0.0, ctx.metadata)
    return inputs


def make_context(
    folder: Path, inputs: dict[str, Artifact], teacher: dict[str, Any], num_ranks: int = 1
) -> StageContext:
    """A context whose `out` and logs lie in `folder`."""
    return _context(folder / "teacher", inputs, _config(teacher, num_ranks))


def _config(teacher: dict[str, Any], num_ranks: int) -> RunConfig:
    return RunConfig.model_validate(
        {
            "name": "digits",
            "seed": 5,
            "data": {"source": {"kind": "digits"}, "samples_per_shard": 256},
            "teacher": teacher,
            "parallel": {"num_ranks": num_ranks},
        }
    )


def _context(out: Path, inputs: dict[str, Artifact], config: RunConfig) -> StageContext:
    out.mkdir(parents=True, exist_ok=True)
    return StageContext(config, out, inputs, "f" * 16, out.parent / "tb")
