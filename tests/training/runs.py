"""Small real runs for the tests of fine-tuning, and what their processes execute."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import Any

from hidden_trees import hidden_tree

from distpc.artifacts.files import write_json
from distpc.artifacts.manifest import Artifact
from distpc.artifacts.stage import StageContext
from distpc.config import parse_config
from distpc.parallel.mesh import Mesh
from distpc.training import finetune
from distpc.training.optimizer import CircuitOptimizer
from distpc.training.rules import AdamOnLogits

POISONED_STEP = 10


def prepare(folder: Path, **finetune_fields: Any) -> StageContext:
    """Digits as shards and index, and a small graph: all that fine-tuning reads."""
    from distpc.data import index, shards

    parallel = finetune_fields.pop("parallel", {})
    config = parse_config(
        {
            "name": "test",
            "data": {"source": {"kind": "digits"}, "samples_per_shard": 256},
            "teacher": {"kind": "none"},
            "structure": {"kind": "hclt"},
            "finetune": {"initialization": "random", "step_size": 0.3, **finetune_fields},
            "parallel": parallel,
        },
        where="test",
    )
    inputs: dict[str, Artifact] = {}
    for stage, run in (("shards", shards.run), ("index", index.run), ("structure", _structure)):
        path = folder / stage
        if Artifact.find(path) is None:
            path.mkdir(parents=True)
            ctx = StageContext(config, path, inputs, stage, folder / "tb")
            run(ctx)
            Artifact.seal(path, stage, stage, 0.0, ctx.metadata)
        inputs = {**inputs, stage: Artifact.open(path)}
    return StageContext(config, folder / "finetune", inputs, "finetune", folder / "tb")


def variant(
    ctx: StageContext, name: str, finetune: dict[str, Any] | None = None, **parallel: Any
) -> StageContext:
    """The same fine-tuning in a folder of its own, with other finetune or parallel fields."""
    values = ctx.config.model_dump(mode="json")
    values["finetune"].update(finetune or {})
    values["parallel"].update(parallel)
    out = ctx.out.parent / name
    out.mkdir(exist_ok=True)
    config = parse_config(values, where="test")
    return StageContext(config, out, ctx.inputs, ctx.fingerprint, out / "tb")


def train_each(payload: dict[str, Any], mesh: Mesh) -> None:
    """Rank target: one fine-tuning after the other in the same processes, a poisoned one last."""
    AdamOnLogits.settle_every = payload.get("adam_settles_every", AdamOnLogits.settle_every)
    for context in payload["contexts"]:
        finetune.train_rank(context, mesh)
    if "poisoned" in payload:
        train_poisoned(payload["poisoned"], mesh)


def train_and_resume(payload: dict[str, Any], mesh: Mesh) -> None:
    """Rank target of one rank: fine-tunings, some of which then go on from an early checkpoint."""
    train_each(payload, mesh)
    for done, again in payload["resumed"]:
        checkpoints = Path(done["out"]) / finetune.CHECKPOINTS
        for early in sorted(checkpoints.iterdir())[: payload["early_checkpoints"]]:
            shutil.copytree(early, Path(again["out"]) / finetune.CHECKPOINTS / early.name)
        finetune.train_rank(again, mesh)


def train_poisoned(payload: dict[str, Any], mesh: Mesh) -> None:
    """One entry of the statistics turns into NaN at a step, as bad memory may do."""
    step = CircuitOptimizer.step
    steps_done = 0

    def poisonous(self: CircuitOptimizer, closure: Any = None) -> None:
        nonlocal steps_done
        steps_done += 1
        step(self, closure)
        if steps_done == POISONED_STEP:
            self.param_groups[0]["params"][0].data.view(-1)[-1] = float("nan")

    CircuitOptimizer.step = poisonous  # type: ignore[method-assign]
    finetune.train_rank(payload, mesh)


def _structure(ctx: StageContext) -> None:
    graph = hidden_tree(num_variables=64, num_states=4)
    write_json(ctx.out / "region_graph.json", graph.to_json())


def _main(file: str) -> None:
    import json

    finetune.run(StageContext.from_json(json.loads(Path(file).read_text())))


if __name__ == "__main__":
    _main(sys.argv[1])
