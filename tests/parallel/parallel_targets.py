"""What the ranks and workers of these tests run."""

from __future__ import annotations

import json
import os
import resource
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn

from distpc.errors import DataError
from distpc.parallel import collectives
from distpc.parallel.mesh import Mesh
from distpc.parallel.meter import Meter

GLOBAL_BATCH = 11
STEPS = 4


class OnlineMean(torch.optim.Optimizer):
    """p <- (1 - step) * p - step * gradient, the rule of online expectation maximisation."""

    def __init__(self, parameters: Any, lr: float) -> None:
        super().__init__(parameters, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter.mul_(1 - group["lr"]).add_(parameter.grad, alpha=-group["lr"])


class Net(nn.Module):
    """(B, 5) -> (B,) losses, with a buffer and a parameter that two names share."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(5, 7)
        self.second = nn.Linear(7, 3)
        self.tied = nn.Module()
        self.tied.weight = self.first.weight
        self.register_buffer("goal", torch.arange(3.0))
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (self.second(torch.tanh(self.first(x))) - self.goal).pow(2).sum(-1)


def make_optimizer(kind: str, model: nn.Module) -> torch.optim.Optimizer:
    if kind == "online":
        return OnlineMean(model.parameters(), 0.05)
    return torch.optim.AdamW(model.parameters(), 1e-2)


def global_batch(step: int) -> torch.Tensor:
    return torch.randn(GLOBAL_BATCH, 5, generator=torch.Generator().manual_seed(step))


def train_engine(payload: dict[str, Any], mesh: Mesh) -> None:
    """Every case of `payload` on these ranks; rank 0 writes the states to payload["out"]."""
    from distpc.parallel.engine import Engine

    results = {}
    for stage, kind, micro_batch, offload in payload["cases"]:
        model = Net()
        optimizer = make_optimizer(kind, model)
        engine = Engine(
            model, optimizer, mesh=mesh, zero_stage=stage, reduce_bucket=20, offload=offload
        )

        def take_steps(engine: Engine, first: int, micro_batch: int = micro_batch) -> None:
            for step in range(first, first + STEPS):
                x = global_batch(step).tensor_split(mesh.world_size)[mesh.rank]
                pieces = engine.micro_batches(
                    len(x), global_count=GLOBAL_BATCH, micro_batch=micro_batch
                )
                for piece in pieces:
                    engine.backward(engine(x[piece]).sum(), global_count=GLOBAL_BATCH)
                engine.step()

        take_steps(engine, 0)
        trained = engine.full_state()
        engine.load_full_state({name: value + 1 for name, value in trained.items()})
        loaded = engine.full_state()
        # Once more from the trained state: what was loaded must be what is trained further.
        engine.load_full_state(trained)
        optimizer.param_groups[0]["lr"] *= 0.5
        take_steps(engine, STEPS)
        resumed = engine.full_state()
        assert mesh.is_main or (trained, loaded, resumed) == ({}, {}, {})
        results[f"{stage} {kind} {micro_batch} {offload}"] = {
            "trained": _lists(trained),
            "loaded": _lists(loaded),
            "resumed": _lists(resumed),
            "num_steps": engine.num_steps,
            "config": engine.config_json,
        }
    if mesh.is_main:
        Path(payload["out"]).write_text(json.dumps(results))


def _lists(state: dict[str, torch.Tensor]) -> dict[str, Any]:
    assert all(value.device.type == "cpu" for value in state.values())
    return {name: value.tolist() for name, value in state.items()}


def misuse_engine(payload: dict[str, Any], mesh: Mesh) -> None:
    """What each of two bad calls raised, written to payload["out"]."""
    from distpc.errors import TrainingError
    from distpc.parallel.engine import Engine

    messages = []
    model = Net()
    engine = Engine(model, make_optimizer("online", model), mesh=mesh, zero_stage=3)
    state = engine.full_state()
    state.pop("second.bias", None)
    try:
        engine.load_full_state(state)
    except TrainingError as error:
        messages.append(str(error))
    try:
        engine.backward(engine(global_batch(0)).sum() * float("nan"), global_count=1)
        engine.step()
    except TrainingError as error:
        messages.append(str(error))
    Path(payload["out"]).with_suffix(f".{mesh.rank}").write_text(json.dumps(messages))


def use_collectives(payload: dict[str, Any], mesh: Mesh) -> None:
    """Every collective once; each rank writes what it got."""
    mine = torch.tensor([float(mesh.rank), 1.0])
    results = {
        "sum": collectives.sum_across(mine, mesh).tolist(),
        "mean": collectives.mean_across(mine, mesh).tolist(),
        "max": collectives.max_across(mine, mesh).tolist(),
        "own": mine.tolist(),
        "broadcast": collectives.broadcast_object({"from": mesh.rank}, mesh),
        "gather": collectives.gather_objects(f"rank {mesh.rank}", mesh),
        "threads": torch.get_num_threads(),
        "payload": payload["text"],
    }
    collectives.barrier(mesh)
    Path(payload["out"], f"{mesh.rank}.json").write_text(json.dumps(results))


def speak(payload: dict[str, Any], mesh: Mesh) -> None:
    print(f"rank {mesh.rank} of {mesh.world_size} speaks", file=sys.stderr)


def fail_on_a_full_disk(payload: dict[str, Any], mesh: Mesh) -> None:
    """No file may grow from here on, which is told like a full disk."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
    raise RuntimeError("no error file has room for this")


def raise_own_error(payload: dict[str, Any], mesh: Mesh) -> None:
    """Rank 1 raises while the others wait for it."""
    if mesh.rank == 1:
        raise DataError("a shard is cut", where="train-7", found=3, expected=4, fix="write it anew")
    collectives.barrier(mesh)


def raise_other_error(payload: dict[str, Any], mesh: Mesh) -> None:
    if mesh.rank == 1:
        raise RuntimeError("the cause")
    collectives.barrier(mesh)


def exit_with_status(payload: dict[str, Any], mesh: Mesh) -> None:
    if mesh.rank == 1:
        print("last words", file=sys.stderr)
        sys.exit(7)
    collectives.barrier(mesh)


def wait_for_ever(payload: dict[str, Any], mesh: Mesh) -> None:
    """Leave this rank's process id, and wait: rank 0 in a collective, the others in Python."""
    Path(payload["out"], f"{mesh.rank}.pid").write_text(str(os.getpid()))
    while mesh.rank > 0:
        time.sleep(0.1)
    collectives.barrier(mesh)


def stop(payload: dict[str, Any], mesh: Mesh) -> None:
    """Rank 1 is stopped from outside, so to speak; rank 0 waits for it."""
    if mesh.rank == 1:
        os.kill(os.getpid(), signal.SIGSTOP)
    collectives.barrier(mesh)


def compute_then_read(payload: dict[str, Any], mesh: Mesh) -> None:
    """Rank 0 computes for longer than may be stood still, rank 1 waits for it; both is allowed.
    Then rank 1 reads from a pipe into which nobody writes."""
    if mesh.rank == 0:
        until = time.monotonic() + 1.6 * payload["lost_seconds"]
        while time.monotonic() < until:
            torch.ones(200, 200) @ torch.ones(200, 200)
    collectives.barrier(mesh)
    Path(payload["out"], f"computed-{mesh.rank}").touch()
    if mesh.rank == 1:
        Path(payload["out"], "pipe").read_bytes()
    collectives.barrier(mesh)


def skip_a_collective(payload: dict[str, Any], mesh: Mesh) -> None:
    """Rank 1 leaves out a sum, and goes on to what the others never come to."""
    collectives.barrier(mesh)
    if mesh.rank == 0:
        collectives.sum_across(torch.ones(3), mesh)
    collectives.gather_objects(mesh.rank, mesh)


def skip_a_step(payload: dict[str, Any], mesh: Mesh) -> None:
    """Rank 1 leaves out what DeepSpeed reduces in a group of its own, and does something else."""
    from distpc.parallel.engine import Engine

    model = Net()
    engine = Engine(model, make_optimizer("online", model), mesh=mesh, zero_stage=1)
    if mesh.rank == 1:
        time.sleep(600)
    engine.backward(engine(global_batch(0)).sum(), global_count=GLOBAL_BATCH)
    engine.step()


def wait_alone(payload: dict[str, Any], mesh: Mesh) -> None:
    """Leave the numbers of this process and its parent, and wait."""
    Path(payload["out"], "pids").write_text(f"{os.getpid()} {os.getppid()}")
    time.sleep(600)


class Adder:
    """A worker: adds a base to its items; its items say how to misbehave."""

    def __init__(self, base: torch.Tensor, fail: bool = False) -> None:
        if fail:
            raise RuntimeError("cannot be constructed")
        self.base = base
        self.calls = 0

    def __call__(self, item: dict[str, Any]) -> float:
        self.calls += 1
        if "mark" in item:
            self._leave_mark(Path(item["mark"]))
        if item.get("error") == "own":
            raise DataError("a shard is cut", where="train-7", found=3, expected=4, fix="mend it")
        if item.get("error") == "other":
            raise KeyError("the cause")
        if item.get("error") == "death":
            os.kill(os.getpid(), signal.SIGKILL)
        return float(self.base.sum()) + item["value"] + sum(item.get("more", []))

    def who(self, item: Any) -> tuple[int, int]:
        """This process and its threads."""
        time.sleep(0.05)
        return os.getpid(), torch.get_num_threads()

    def slow(self, item: dict[str, Any]) -> tuple[float, int]:
        """The value, after a while, and this process; runs are noted in a folder."""
        time.sleep(item["seconds"])
        if "log" in item:
            (Path(item["log"]) / f"{item['value']}-{os.getpid()}").touch()
        return self(item), os.getpid()

    def timed(self, item: dict[str, Any]) -> tuple[float, tuple[float, float]]:
        """The value, and when it was worked on."""
        began = time.monotonic()
        value, _ = self.slow(item)
        return value, (began, time.monotonic())

    def lock(self, item: Any) -> Any:
        """What cannot be sent."""
        return threading.Lock()

    def _leave_mark(self, mark: Path) -> None:
        """The first process to come here says who it is, and waits to be killed."""
        try:
            with mark.open("x") as handle:
                handle.write(str(os.getpid()))
        except FileExistsError:
            return
        time.sleep(600)


def measure_steps(payload: dict[str, Any], mesh: Mesh) -> None:
    """Rank target: a step in which rank 0 takes longer to come to a collective of both."""
    meter = Meter(mesh, 2e6, 1)
    collectives.barrier(mesh)
    with meter.step(3, 0.25):
        if mesh.rank == 0:
            time.sleep(0.3)
        collectives.sum_across(torch.ones(10), mesh)
    Path(payload["out"]).with_suffix(f".{mesh.rank}").write_text(json.dumps(meter.figures))
