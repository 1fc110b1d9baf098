"""Integral circuits through the engine: every layout, resuming, what is left, what is refused."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import prepare

from distpc.artifacts.manifest import Artifact
from distpc.artifacts.stage import StageContext
from distpc.circuits.integral.circuit import IntegralCircuit
from distpc.circuits.integral.io import load_networks
from distpc.circuits.integral.settings import IntegralSettings
from distpc.circuits.io import load_model
from distpc.cli import main
from distpc.config import parse_config
from distpc.data.index import ShardIndex
from distpc.data.spec import DatasetSpec
from distpc.errors import ConfigError, TrainingError
from distpc.inference import evaluate
from distpc.inference.likelihood import measure
from distpc.parallel.launch import run_ranks
from distpc.parallel.mesh import Mesh
from distpc.pipeline.describe import describe
from distpc.pipeline.runner import Pipeline
from distpc.structures import Tree, hclt_graph
from distpc.training import finetune
from distpc.training.checkpoint import Checkpoints
from distpc.training.last_good import with_last_good

NUM_STEPS = 15
SETTINGS = {
    "enabled": True,
    "width": 16,
    "num_frequencies": 8,
    "train_states": [3, 4, 6],
    "evaluate_states": [8],
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> StageContext:
    return prepare(
        tmp_path_factory.mktemp("run"),
        num_epochs=1,
        evaluate_every_epochs=0.4,
        batch_size=101,
        micro_batch_size=40,
        rule="adam",
        step_size=0.02,
        checkpoint_every_seconds=0.0,
    )


def variant(ctx: StageContext, name: str, **parallel: Any) -> StageContext:
    values = ctx.config.model_dump(mode="json")
    values["integral"] = SETTINGS
    values["parallel"].update(parallel)
    out = ctx.out.parent / name
    out.mkdir(exist_ok=True)
    return StageContext(parse_config(values, "test"), out, ctx.inputs, ctx.fingerprint, out / "tb")


def newest(ctx: StageContext) -> dict[str, torch.Tensor]:
    found = Checkpoints(ctx.out / "checkpoints", finetune.identity_of(ctx)).newest()
    assert found is not None and found.facts.step == NUM_STEPS
    return found.statistics()


@pytest.fixture(scope="module")
def stages(base: StageContext) -> dict[str, StageContext]:
    """Trained by one process, resumed from an early step, and by two ranks: ZeRO 0 to 2, and with
    the rows of sums shared."""
    alone, resumed = variant(base, "alone", num_ranks=1), variant(base, "resumed", num_ranks=1)
    shared = {f"zero{stage}": variant(base, f"zero{stage}", zero_stage=stage) for stage in range(3)}
    shared["node"] = variant(base, "node", node_parallel=2)
    options: dict[str, Any] = {"threads_per_rank": 1, "log_folder": base.out.parent / "logs"}
    payload = {
        "contexts": [alone.to_json()],
        "resumed": [(alone.to_json(), resumed.to_json())],
        "early_checkpoints": 1,
    }
    run_ranks("runs:train_and_resume", payload, num_ranks=1, **options)
    contexts = [ctx.to_json() for ctx in shared.values()]
    run_ranks("runs:train_each", {"contexts": contexts}, num_ranks=2, **options)
    return {"alone": alone, "resumed": resumed, **shared}


@pytest.mark.parametrize("layout", ["resumed", "zero0", "zero1", "zero2", "node"])
def test_every_layout_gives_the_networks_of_one_process(
    stages: dict[str, StageContext], layout: str
) -> None:
    alone, other = newest(stages["alone"]), newest(stages[layout])
    assert alone.keys() == other.keys() and any("trunk" in name for name in alone)
    tolerance = {"rtol": 0.0, "atol": 0.0} if layout == "resumed" else {"rtol": 1e-3, "atol": 2e-4}
    for name, tensor in alone.items():
        torch.testing.assert_close(other[name], tensor, **tolerance)


def test_learns_and_leaves_networks_and_a_circuit(
    stages: dict[str, StageContext], tmp_path: Path
) -> None:
    """And evaluation says how the circuits of several numbers of states do."""
    ctx = stages["zero1"]
    results = json.loads((ctx.out / finetune.RESULTS).read_text())
    assert results["valid_bpd"] < results["curve"][0][1] - 0.01
    finetune._save_best(ctx, results)
    model = ctx.out / "model"
    networks, circuit = load_networks(model), load_model(model)
    assert results["num_parameters"] == networks.num_parameters
    assert circuit.training_facts["valid_bpd"] == results["valid_bpd"]

    Artifact.seal(ctx.out, "finetune", "finetune", 0.0, results)
    inputs = {**ctx.inputs, "finetune": Artifact.open(ctx.out)}
    ending = StageContext(ctx.config, tmp_path / "evaluate", inputs, "e", tmp_path / "tb")
    ending.out.mkdir()
    evaluate.run(ending)
    found = ending.metadata["integral"]
    assert found["num_trainable_parameters"] == networks.num_parameters
    assert list(found["states"]) == ["4", "8"] and found["unit"] == "bpd"
    assert found["states"]["4"]["bits"] == pytest.approx(ending.metadata["test_bpd"], abs=1e-6)

    other = tmp_path / "other"
    command = ["materialise", str(model), "--num-states", "8"]
    assert main([*command, "--out", str(other)]) == 0
    index = ShardIndex.load(ctx.input("index").path)
    figures = measure(load_model(other), index, "test", batch_size=512)
    assert figures.bits == pytest.approx(found["states"]["8"]["bits"], abs=1e-6)
    assert load_model(other).dataset == circuit.dataset
    assert main([*command, "--out", str(model)]) == 2
    assert main(["materialise", str(other), "--num-states", "8", "--out", str(tmp_path / "x")]) == 2


def test_a_training_that_stops_leaves_networks_and_a_circuit(
    stages: dict[str, StageContext], tmp_path: Path
) -> None:
    ctx, mesh = stages["alone"], Mesh(0, 1, 0, torch.device("cpu"))
    checkpoints = Checkpoints(ctx.out / "checkpoints", finetune.identity_of(ctx))
    spec = DatasetSpec.load(ctx.input("shards").path)
    index = ShardIndex.load(ctx.input("index").path)
    blank = finetune.beginning(ctx, spec, index, None).blank
    stop = TrainingError("training diverges")
    error = with_last_good(stop, checkpoints, blank, spec, tmp_path, mesh)
    assert str(tmp_path) in str(error)
    found = checkpoints.newest()
    assert found is not None and found.facts.best is not None
    networks, circuit = load_networks(tmp_path), load_model(tmp_path)
    best = checkpoints.at(int(found.facts.best["step"])).statistics()
    for name, tensor in networks.state_dict().items():
        assert torch.equal(tensor, best[name])
    assert circuit.training_facts["valid_bpd"] == found.facts.best["bits"]
    again = networks.materialise()
    for ours, theirs in zip(circuit.parameters(), again.parameters(), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize(
    ("section", "values", "words"),
    [
        ("finetune", {"rule": "online_em"}, ["finetune.rule is online_em", "adam"]),
        ("finetune", {"initialization": "distilled"}, ["initialization"]),
        ("finetune", {"reseed_every_epochs": 1.0}, ["reseed_every_epochs: rule adam"]),
        ("parallel", {"zero_stage": 3}, ["zero_stage is 3", "0 to 2"]),
        ("parallel", {"recompute_messages": True}, ["recompute_messages"]),
        ("structure", {"kind": "chow_liu"}, ["chow_liu", "no points of a latent"]),
        ("structure", {"layer": "monarch"}, ["layer monarch"]),
        ("structure", {"num_states": 1}, ["2 or more"]),
        ("integral", {"train_states": [4, 1]}, ["integral.train_states.1"]),
        ("integral", {"rule": "simpson"}, ["integral.rule"]),
        ("integral", {"jiter": 1}, ["jiter", "did you mean 'jitter'"]),
    ],
)
def test_what_networks_do_not_go_with_is_refused(
    base: StageContext, section: str, values: dict[str, Any], words: list[str], tmp_path: Path
) -> None:
    config = base.config.model_dump(mode="json")
    config["integral"] = dict(SETTINGS)
    parse_config(config, "test")
    config[section].update(values)
    with pytest.raises(ConfigError) as caught:
        parse_config(config, "test")
    for word in words:
        assert word in str(caught.value)


def test_a_dry_run_says_how_large_the_networks_are(base: StageContext, tmp_path: Path) -> None:
    config = base.config.model_dump(mode="json")
    config["integral"] = dict(SETTINGS)
    text = describe(Pipeline(parse_config(config, "test"), tmp_path))
    graph = hclt_graph(Tree.balanced(64), base.config.structure.num_states)
    networks = IntegralCircuit(graph, [17] * 64, IntegralSettings(width=16, num_frequencies=8))
    assert f"written by networks of {networks.num_parameters:,}" in text
