"""A real run folder of digits: shards, index and a small circuit fitted in seconds."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from distpc.artifacts import Artifact, StageContext
from distpc.circuits.circuit import Circuit
from distpc.circuits.io import save_model
from distpc.config import RunConfig, parse_config
from distpc.data import index as index_stage
from distpc.data import shards as shards_stage
from distpc.data.index import ShardIndex
from distpc.data.reader import iterate_split
from distpc.data.spec import DatasetSpec
from distpc.inference import evaluate
from distpc.structures.region_graph import Region, RegionGraph
from distpc.training.fit import fit

NUM_STATES = 12


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    torch.set_num_threads(1)


def config_of(
    source: dict[str, object], color: str = "as_is", **evaluate_fields: object
) -> RunConfig:
    """A configuration without a teacher, which is all that evaluation depends on."""
    values = {
        "name": "tiny",
        "data": {"source": source, "samples_per_shard": 256, "color": color},
        "teacher": {"kind": "none"},
        "structure": {"kind": "hclt", "num_states": NUM_STATES},
        "finetune": {"initialization": "random"},
        "evaluate": {"batch_size": 100, "num_pictures": 12, **evaluate_fields},
    }
    return parse_config(values, where="test")


def context(run: Path, config: RunConfig, stage: str, *inputs: str) -> StageContext:
    """The context that the pipeline gives to `stage`, with its folder present."""
    out = run / stage
    out.mkdir(parents=True, exist_ok=True)
    artifacts = {name: Artifact.open(run / name) for name in inputs}
    return StageContext(config, out, artifacts, f"fingerprint-{stage}", run / "tb")


def seal(ctx: StageContext) -> Artifact:
    """Finish a stage as the pipeline does."""
    return Artifact.seal(ctx.out, ctx.out.name, ctx.fingerprint, 1.5, ctx.metadata)


def load_split(run: Path, split: str) -> torch.Tensor:
    """(N, V) all samples of a split, as the reader gives them."""
    index = ShardIndex.load(run / "index")
    parts = [torch.as_tensor(x) for x in iterate_split(index, index.spec, split, 500)]
    x = torch.cat(parts)
    return x if x.is_floating_point() else x.long()


def make_run(run: Path, config: RunConfig, epochs: int = 8) -> Path:
    """Real shards and index, a fitted circuit, everything sealed, evaluation not yet run."""
    shards = context(run, config, "shards")
    shards_stage.run(shards)
    seal(shards)
    indexed = context(run, config, "index", "shards")
    index_stage.run(indexed)
    seal(indexed)
    spec = DatasetSpec.load(run / "shards")
    x = load_split(run, "train")
    circuit = fitted(x, spec, epochs)
    finetune = context(run, config, "finetune", "shards", "index")
    save_model(circuit, finetune.out / "model", dataset=spec.to_json(), training={"steps": 1})
    seal(finetune)
    return run


def fitted(x: torch.Tensor, spec: DatasetSpec, epochs: int) -> Circuit:
    """A hidden tree over the variables, fitted to (N, V) samples."""
    circuit = Circuit(hidden_tree(spec.num_variables), spec.num_categories, seed=0)
    fit(circuit, x, epochs=epochs, batch_size=128, progress=False)
    return circuit


def hidden_tree(num_variables: int) -> RegionGraph:
    """A hidden state for every variable, in a balanced binary tree; shallow, so quick."""
    regions: list[Region] = []

    def grow(first: int, end: int) -> int:
        middle = (first + end) // 2
        regions.append(Region("input", NUM_STATES, variable=middle))
        children = [len(regions) - 1]
        for left, right in ((first, middle), (middle + 1, end)):
            if left < right:
                regions.append(Region("sum", NUM_STATES, (grow(left, right),)))
                children.append(len(regions) - 1)
        if len(children) > 1:
            regions.append(Region("product", NUM_STATES, tuple(children)))
        return len(regions) - 1

    regions.append(Region("sum", 1, (grow(0, num_variables),)))
    return RegionGraph(regions, num_variables)


@pytest.fixture(scope="session")
def digits_config() -> RunConfig:
    """The configuration of `digits_run`."""
    return config_of({"kind": "digits"})


@pytest.fixture(scope="session")
def digits_run(tmp_path_factory: pytest.TempPathFactory, digits_config: RunConfig) -> Path:
    """A run of digits, evaluated."""
    run = make_run(tmp_path_factory.mktemp("runs") / "digits", digits_config)
    ctx = context(run, digits_config, "evaluate", "shards", "index", "finetune")
    evaluate.run(ctx)
    seal(ctx)
    return run


@pytest.fixture(scope="session")
def model_dir(digits_run: Path) -> Path:
    """The folder of the digits model."""
    return digits_run / "finetune" / "model"
