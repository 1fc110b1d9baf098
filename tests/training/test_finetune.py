import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import POISONED_STEP, prepare, variant
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from distpc.artifacts.stage import StageContext
from distpc.circuits.io import load_model
from distpc.errors import ArtifactError, ConfigError, TrainingError
from distpc.parallel.launch import run_ranks
from distpc.parallel.meter import FIGURES
from distpc.training import finetune
from distpc.training.checkpoint import Checkpoint, Checkpoints
from distpc.training.last_good import LAST_GOOD

HERE = Path(__file__).parent
NUM_STEPS = 29
RARE_USE = 0.81
"""Share of an even use below which some of the circuit's states lie early on."""


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> StageContext:
    return prepare(
        tmp_path_factory.mktemp("run"),
        num_epochs=2,
        evaluate_every_epochs=0.5,
        batch_size=101,
        micro_batch_size=30,
        checkpoint_every_seconds=0.0,
    )


def events_of(ctx: StageContext) -> EventAccumulator:
    events = EventAccumulator(str(ctx.tensorboard / "finetune"))
    events.Reload()
    return events


def newest(ctx: StageContext) -> Checkpoint:
    found = Checkpoints(ctx.out / "checkpoints", finetune.identity_of(ctx)).newest()
    assert found is not None
    return found


def assert_same(first: Checkpoint, second: Checkpoint, **tolerance: float) -> None:
    ours, theirs = first.statistics(), second.statistics()
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        torch.testing.assert_close(tensor, theirs[name], **(tolerance or {"rtol": 0, "atol": 0}))


@pytest.fixture(scope="module")
def stages(base: StageContext) -> dict[str, Any]:
    """Fine-tuned by one process, and by two ranks under every ZeRO stage; and a poisoned one."""
    alone = variant(base, "alone", num_ranks=1)
    shared = {f"zero{stage}": variant(base, f"zero{stage}", zero_stage=stage) for stage in range(4)}
    shared["offloaded"] = variant(base, "offloaded", zero_stage=2, offload=True)
    # Where no process ever holds the whole circuit.
    never_whole: dict[str, Any] = {"whole_circuit_gib": 0.0}
    shared["node"] = variant(base, "node", node_parallel=2, recompute_messages=True, **never_whole)
    reseeding = {"reseed_every_epochs": 0.6, "reseed_below": RARE_USE}
    restarted = variant(base, "restarted", reseeding, num_ranks=1)
    shared["restarted_shared"] = variant(base, "restarted_shared", reseeding, zero_stage=3)
    shared["restarted_node"] = variant(base, "restarted_node", reseeding, node_parallel=2)
    poisoned = variant(base, "poisoned", zero_stage=3, **never_whole)
    payload = {
        "contexts": [ctx.to_json() for ctx in shared.values()],
        "poisoned": poisoned.to_json(),
    }
    options: dict[str, Any] = {"threads_per_rank": 1, "log_folder": base.out.parent / "logs"}
    fused = variant(base, "fused", {"fused": True, "micro_batch_size": 101}, num_ranks=1)
    single = {"contexts": [ctx.to_json() for ctx in (alone, restarted, fused)]}
    run_ranks("runs:train_each", single, num_ranks=1, **options)
    with pytest.raises(TrainingError) as caught:
        run_ranks("runs:train_each", payload, num_ranks=2, **options)
    others = {"alone": alone, "restarted": restarted, "fused": fused, "poisoned": poisoned}
    return {**others, **shared, "error": caught.value}


@pytest.mark.parametrize("layout", ["zero0", "zero1", "zero2", "zero3", "offloaded", "node"])
def test_every_layout_gives_the_statistics_of_one_process(
    stages: dict[str, Any], layout: str
) -> None:
    alone, shared = newest(stages["alone"]), newest(stages[layout])
    assert alone.facts.step == shared.facts.step == NUM_STEPS
    assert_same(shared, alone, rtol=1e-4, atol=1e-5)
    for figure in ("bits", "impossible"):
        assert alone.facts.best is not None and shared.facts.best is not None
        assert shared.facts.best[figure] == pytest.approx(alone.facts.best[figure], abs=1e-5)


@pytest.mark.parametrize("layout", ["restarted_shared", "restarted_node"])
def test_dead_states_are_started_again_alike_under_every_layout(
    stages: dict[str, Any], layout: str
) -> None:
    alone, shared = newest(stages["restarted"]), newest(stages[layout])
    assert shared.facts.reseeded == alone.facts.reseeded > 0
    assert_same(shared, alone, rtol=1e-4, atol=1e-5)
    untouched = newest(stages["alone"]).statistics()
    assert any(not torch.equal(tensor, untouched[n]) for n, tensor in alone.statistics().items())


def test_rules_that_keep_more_than_statistics_do_not_reseed(base: StageContext) -> None:
    with pytest.raises(ConfigError, match="rule adam keeps more"):
        variant(base, "refused", {"rule": "adam", "reseed_every_epochs": 1.0})


def test_what_no_process_may_hold_is_not_reseeded(base: StageContext) -> None:
    settings = {"reseed_every_epochs": 1.0}
    ctx = variant(base, "too_large", settings, zero_stage=3, num_ranks=1, whole_circuit_gib=0.0)
    with pytest.raises(ConfigError, match="whole_circuit_gib"):
        finetune.run(ctx)


def test_the_fused_step_trains_as_the_ordinary_one(stages: dict[str, Any]) -> None:
    alone, fused = newest(stages["alone"]), newest(stages["fused"])
    ran = {
        name: json.loads((stages[name].out / finetune.RESULTS).read_text())["fused"]
        for name in ("alone", "fused")
    }
    assert ran == {"alone": False, "fused": True}
    assert alone.facts.step == fused.facts.step == NUM_STEPS
    for (_, expected), (_, found) in zip(alone.facts.curve, fused.facts.curve, strict=True):
        assert found == pytest.approx(expected, abs=2e-3)
    expected, found = alone.statistics(), fused.statistics()
    for name, tensor in found.items():
        assert (tensor - expected[name]).norm() < 2e-2 * expected[name].norm()


def test_learns_and_says_so(stages: dict[str, Any]) -> None:
    results = json.loads((stages["zero0"].out / finetune.RESULTS).read_text())
    assert results["valid_bpd"] < 2.75 and results["train_bpd"] < 2.75
    assert results["num_ranks"] == 2 and results["steps"] == NUM_STEPS
    assert results["train_impossible_samples"] == 0
    assert results["deepspeed"]["zero_optimization"]["stage"] == 0
    first, second = results["ranks"]
    assert 0 < first["device_peak_fraction"] < 1 and first["samples_per_second"] > 0
    assert min(first["communication_seconds"], second["communication_seconds"]) > 0
    assert json.loads((stages["zero0"].out / "logs" / FIGURES).read_text())["ranks"] == [
        first,
        second,
    ]
    (measured,) = events_of(stages["zero0"]).Scalars("ranks/tflops/1")
    assert measured.step == 2 and measured.value == pytest.approx(second["tflops"])


def test_figures_of_the_whole_circuit_are_left_out_where_no_rank_may_hold_it(
    stages: dict[str, Any],
) -> None:
    shown = {name: set(events_of(stages[name]).Tags()["scalars"]) for name in ("zero3", "node")}
    assert "latents/dead_states" in shown["zero3"] and "valid_bpd" in shown["node"]
    left_out = shown["zero3"] - shown["node"]
    assert {name.split("/")[0] for name in left_out} == {"latents", "sum_weight_entropy_bits"}


def test_another_training_is_refused(stages: dict[str, Any]) -> None:
    ctx = stages["alone"]
    other = StageContext(ctx.config, ctx.out, ctx.inputs, "x", ctx.tensorboard)
    with pytest.raises(ArtifactError, match="fingerprint differ") as caught:
        newest(other)
    assert caught.value.expected == "{'fingerprint': 'x'}"


def test_stops_at_poisoned_statistics_and_keeps_the_last_good_model(stages: dict[str, Any]) -> None:
    ctx, error = stages["poisoned"], stages["error"]
    assert error.what == "a circuit's statistics are not finite"
    assert f"step {POISONED_STEP}, parameter" in error.where and "row [" in error.where
    folder = ctx.out.parent / LAST_GOOD
    assert f"is kept in {folder}" in error.fix
    model, facts = load_model(folder), newest(ctx).facts
    assert facts.best is not None and 0 < facts.best["step"] < POISONED_STEP
    assert model.training_facts["valid_bpd"] == facts.best["bits"]
    best = Checkpoints(ctx.out / "checkpoints", finetune.identity_of(ctx)).at(
        int(facts.best["step"])
    )
    for name, tensor in best.statistics().items():
        assert bool(torch.isfinite(tensor).all())
        assert torch.equal(model.state_dict()[name], tensor)


def start(ctx: StageContext, folder: Path) -> subprocess.Popen[bytes]:
    file = folder / "context.json"
    file.write_text(json.dumps(ctx.to_json()))
    environment = {**os.environ, "PYTHONPATH": f"{HERE.parents[1]}:{HERE}", "OMP_NUM_THREADS": "1"}
    with (folder / "driver.log").open("ab") as log:
        return subprocess.Popen(
            [sys.executable, HERE / "runs.py", file], env=environment, stdout=log, stderr=log
        )


def wait_for_step(ctx: StageContext, driver: subprocess.Popen[bytes], step: int) -> None:
    folder = ctx.out / "checkpoints"
    # Two starts of Python and DeepSpeed, which take minutes where many others compute.
    deadline = time.monotonic() + 400
    while time.monotonic() < deadline and driver.poll() is None:
        found = sorted(path.name for path in folder.glob("step-*"))
        if found and found[-1] >= f"step-{step:08d}":
            return
        time.sleep(0.01)
    raise AssertionError(f"no checkpoint of step {step}; exit status {driver.poll()}")


def children(process: int) -> list[int]:
    return [
        int(pid) for pid in Path(f"/proc/{process}/task/{process}/children").read_text().split()
    ]


def is_gone(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


def test_killed_runs_resume_bit_equal(
    base: StageContext, stages: dict[str, Any], tmp_path: Path
) -> None:
    ctx = variant(base, "killed")
    driver = start(ctx, tmp_path)
    wait_for_step(ctx, driver, 5)
    os.kill(children(driver.pid)[1], signal.SIGKILL)
    assert driver.wait(timeout=200) == 1
    assert "was ended by signal 9" in (tmp_path / "driver.log").read_text()
    (stopped,) = events_of(ctx).Tensors("stopped/text_summary")
    assert b"training rank 1 of 2 was ended by signal 9" in stopped.tensor_proto.string_val[0]

    driver = start(ctx, tmp_path)
    wait_for_step(ctx, driver, 12)
    ranks = children(driver.pid)
    driver.kill()
    driver.wait()
    deadline = time.monotonic() + 120
    while not all(map(is_gone, ranks)):
        assert time.monotonic() < deadline, "ranks outlive their driver"
        time.sleep(0.1)
    assert newest(ctx).facts.step < NUM_STEPS

    assert start(ctx, tmp_path).wait(timeout=400) == 0
    undisturbed = newest(stages["zero0"])
    model = load_model(ctx.out / "model")
    best = undisturbed.facts.best
    # The best being the last, the model is where the whole training ended.
    assert best is not None and best["step"] == NUM_STEPS
    for name, tensor in undisturbed.statistics().items():
        assert torch.equal(model.state_dict()[name], tensor)
    assert model.training_facts["valid_bpd"] == best["bits"]
    assert model.dataset["name"] == "digits"
    results = json.loads((ctx.out / finetune.RESULTS).read_text())
    assert results["resumed_at_step"] >= 12
    expected = json.loads((stages["zero0"].out / finetune.RESULTS).read_text())
    for figure in ("train_bpd", "valid_bpd", "best_step", "steps", "train_impossible_samples"):
        assert results[figure] == expected[figure]
    # A finished stage holds its model once, and is not trained again for having no checkpoints.
    assert not (ctx.out / "checkpoints").exists()
    finetune.run(ctx)
    assert ctx.metadata == results
