"""What the ranks of the tests of saving and resuming execute."""

from __future__ import annotations

import contextlib
import json
import resource
import shutil
import signal
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from distpc.data.loader import Batch, Loader
from distpc.errors import DistpcError
from distpc.parallel.collectives import barrier
from distpc.parallel.engine import Engine
from distpc.parallel.mesh import Mesh
from distpc.training import finetune
from distpc.training.checkpoint import (
    Checkpoint,
    Checkpoints,
    Piece,
    Saver,
    TrainingFacts,
    check_shapes,
    load_optimizer,
    take_snapshot,
)
from distpc.training.trainer import Trainer

ADAM_STEPS = 3
GLOBAL_BATCH = 13


def run_all(payload: dict[str, Any], mesh: Mesh) -> None:
    """Rank target: every case of the payload, in the same processes."""
    for case in payload.get("finetune", ()):
        train_and_record(case, mesh)
    for case in payload.get("adam", ()):
        train_by_adam(case, mesh)
    if "misuse" in payload:
        misuse(Path(payload["misuse"]), mesh)


def train_and_record(case: dict[str, Any], mesh: Mesh) -> None:
    """Fine-tune, from another's checkpoint where the case names one, noting every sample used.

    A resumed run first saves again what it has loaded, in its own shards.
    """
    out = Path(case["context"]["out"])
    if "source" in case:
        if mesh.is_main:
            for step in range(case["step"] + 1):
                name = f"step-{step:08d}"
                source = Path(case["source"]) / finetune.CHECKPOINTS / name
                shutil.copytree(source, out / finetune.CHECKPOINTS / name)
        barrier(mesh)
    with recorded(resaves="source" in case) as batches:
        finetune.train_rank(case["context"], mesh)
    (out / f"samples-{mesh.rank}.json").write_text(json.dumps(batches))


@contextlib.contextmanager
def recorded(resaves: bool) -> Iterator[list[list[str]]]:
    """The samples of every batch of this rank, as they are used."""
    batches_of, run = Loader.batches, Trainer.run
    batches: list[list[str]] = []

    def noting(self: Loader, total: int) -> Iterator[Batch]:
        for batch in batches_of(self, total):
            batches.append(["".join(f"{value:x}" for value in row) for row in batch.x.tolist()])
            yield batch

    def resaving(self: Trainer) -> None:
        if resaves:
            self._save()
        run(self)

    Loader.batches, Trainer.run = noting, resaving  # type: ignore[method-assign]
    try:
        yield batches
    finally:
        Loader.batches, Trainer.run = batches_of, run  # type: ignore[method-assign]


class Net(nn.Module):
    """Parameters of odd sizes, one smaller than the number of ranks, and a buffer."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(5, 7), nn.Linear(7, 1)
        self.register_buffer("mask", torch.arange(7) != 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = torch.tanh(self.first(x)) * self.mask
        return self.second(hidden).square()


def load(model: nn.Module, checkpoint: Checkpoint) -> None:
    """Set all parameters and buffers."""
    state = model.state_dict()
    shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
    check_shapes(checkpoint.path, checkpoint.shapes, shapes)
    model.load_state_dict({name: checkpoint.part(name, None, 0) for name in state})


def train_by_adam(case: dict[str, Any], mesh: Mesh) -> None:
    """A few steps of AdamW from scratch or from a checkpoint, then a checkpoint."""
    model = Net()
    checkpoints = Checkpoints(Path(case["folder"]), {})
    first = 0
    if "source" in case:
        source = Checkpoints(Path(case["source"]), {}).newest(mesh)
        assert source is not None
        first = source.facts.step
        load(model, source)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    engine = Engine(model, optimizer, mesh=mesh, zero_stage=case["stage"], reduce_bucket=20)
    saver = Saver(checkpoints, mesh)
    if "source" in case:
        load_optimizer(engine, source)
        saver.save(TrainingFacts(step=first), take_snapshot(engine))
    for step in range(first, first + ADAM_STEPS):
        x = torch.randn(GLOBAL_BATCH, 5, generator=torch.Generator().manual_seed(step))
        x = x.tensor_split(mesh.world_size)[mesh.rank]
        engine.backward(engine(x).sum(), global_count=GLOBAL_BATCH)
        engine.step()
    saver.save(TrainingFacts(step=first + ADAM_STEPS), take_snapshot(engine))
    saver.wait()


def misuse(folder: Path, mesh: Mesh) -> None:
    """What each rank is told when something goes wrong on one of them."""
    told = {}
    mine = Piece("sums.0", (20_000,), 10_000 * mesh.rank, torch.ones(10_000))
    lacking = mine._replace(values=mine.values[:9_000])
    is_second = mesh.rank == 1
    plain = Checkpoints(folder / "plain", {})
    saver = Saver(plain, mesh)
    saver.save(TrainingFacts(step=1), [mine])
    saver.wait()
    told["fine"] = _told(lambda: None)

    if is_second:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))
    saver.save(TrainingFacts(step=2), [mine])
    told["full disk"] = _told(saver.wait)
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))

    saver.save(TrainingFacts(step=3), [lacking if is_second else mine])
    told["range"] = _told(saver.wait)
    not_shared = Checkpoints(folder / f"host{mesh.rank}", {})
    elsewhere = Saver(not_shared, mesh, patience_seconds=0.2)
    elsewhere.save(TrainingFacts(step=4), [mine])
    told["not shared"] = _told(elsewhere.wait)
    unlike = Checkpoints(folder, {"fingerprint": "other" if is_second else "this"})
    told["unlike"] = _told(lambda: Saver(unlike, mesh))
    found, model = plain.at(1), Net()
    odd = replace(found, slots={"first.weight": {"exp_avg": (2, 2)}})
    engine = Engine(model, torch.optim.AdamW(model.parameters()), mesh=mesh)
    told["other state"] = _told(lambda: load_optimizer(engine, odd))
    told["other circuit"] = _told(lambda: load(model, found))
    # The saver is of use again once the cause is mended.
    saver.save(TrainingFacts(step=5), [mine])
    told["mended"] = _told(saver.wait)
    (folder / f"told-{mesh.rank}.json").write_text(json.dumps(told))


def _told(action: Any) -> list[str] | None:
    try:
        action()
    except DistpcError as error:
        return [type(error).__name__, str(error)]
    return None
