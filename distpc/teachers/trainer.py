"""Training of a teacher, one rank of it.

The result is a function of the data, the configuration and R (the number of ranks): a run that was
killed goes on from its last checkpoint to the same weights, and on another R to the same ones up
to the rounding of sums.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from distpc.artifacts.manifest import LOGS
from distpc.artifacts.stage import StageContext
from distpc.config.teachers import TrainingConfig
from distpc.data.index import ShardIndex
from distpc.data.loader import Batch, Loader
from distpc.data.plan import evaluation_ranges, num_steps, rank_share
from distpc.data.reader import iterate_split
from distpc.data.spec import DatasetSpec
from distpc.errors import TrainingError
from distpc.parallel.collectives import barrier, sum_across
from distpc.parallel.engine import Engine
from distpc.parallel.mesh import Mesh
from distpc.parallel.meter import Meter, by_member
from distpc.parallel.progress import Progress
from distpc.teachers.checkpoint import (
    TrainingState,
    checkpoint_path,
    load_checkpoint,
    save_checkpoint,
)
from distpc.teachers.monitor import Monitor
from distpc.teachers.registry import build_teacher
from distpc.teachers.trainable import Trainable

CHECKPOINT_SECONDS = 30.0
"""Longest training between two checkpoints; one is also written after every epoch."""

# The second is He et al.'s for masked autoencoders: gradients change with each batch's ratio.
_BETAS = (0.9, 0.95)
_EVALUATION_BATCH = 256
_NUM_PICTURES = 8
_TRAIN_DRAWS, _VALID_DRAWS = 1, 2


def learning_rate(step: int, total_steps: int, config: TrainingConfig) -> float:
    """Rate of step 0 .. total_steps - 1: linear warm-up to the peak, then a cosine towards 0."""
    warmup = round(config.warmup_fraction * total_steps)
    if step < warmup:
        return config.learning_rate * (step + 1) / warmup
    done = (step - warmup) / max(1, total_steps - warmup)
    return config.learning_rate * 0.5 * (1 + math.cos(math.pi * done))


class TeacherTrainer:
    """The training loop of one rank.

    Args:
        ctx: the stage's context, with inputs shards and index.
        mesh: this process among the ranks.
    """

    def __init__(self, ctx: StageContext, mesh: Mesh) -> None:
        section = ctx.config.teacher.training
        assert section is not None
        self.ctx, self.mesh, self.config = ctx, mesh, section
        self.spec = DatasetSpec.load(ctx.input("shards").path)
        self.index = ShardIndex.load(ctx.input("index").path)
        data = ctx.config.data
        model = build_teacher(
            ctx.config.teacher, self.spec, data.patch_size_pixels, ctx.config.seed
        )
        assert isinstance(model, Trainable)
        self.model: Trainable = model.to(mesh.device)
        trained = [weight for weight in model.parameters() if weight.requires_grad]
        self.optimizer = torch.optim.AdamW(
            trained, lr=0.0, betas=_BETAS, weight_decay=self.config.weight_decay
        )
        self.state = load_checkpoint(
            checkpoint_path(ctx.out), self.model, self.optimizer, ctx.fingerprint
        )
        self.engine = Engine(self.model, self.optimizer, mesh=mesh, zero_stage=0)
        self.loader = Loader(
            self.index,
            self.spec,
            "train",
            global_batch=self.config.batch_size,
            mesh_rank=mesh.rank,
            num_ranks=mesh.world_size,
            seed=ctx.config.seed,
            cache_bytes=data.cache_bytes,
            state=self.state.loader,
        )
        self.num_samples = self.config.num_epochs * self.loader.num_samples
        self.total_steps = num_steps(self.num_samples, self.config.batch_size)
        self.monitor = Monitor(
            ctx.tensorboard / "teacher",
            enabled=mesh.is_main,
            first_step=self.state.step,
            total_steps=self.total_steps,
            figure=model.figure,
        )
        self.meter = Meter(mesh, None, ctx.config.parallel.measure_every_steps, ctx.out / LOGS)

    def train(self) -> None:
        """Train to the end and write the teacher (rank 0).

        Raises:
            TrainingError: the error is no longer finite; nothing of that step is kept.
            DataError: the training split is smaller than a batch.
        """
        start, started = self.state, time.monotonic()
        saved = started
        valid = None
        with Progress("teacher", self.total_steps, unit="steps") as progress:
            progress.advance(start.step)
            for batch in self.loader.batches(self.num_samples):
                ends_epoch = batch.state.epoch > self.state.loader.epoch
                train = self._measured_step(batch)
                now = time.monotonic()
                seconds = start.seconds + now - started
                self.state = TrainingState(self.state.step + 1, batch.state, seconds)
                figures: dict[str, Any] = {f"train_{self.model.figure}": train}
                progress.advance(**figures)
                self.monitor.train(self.state.step, train, self.optimizer.param_groups[0]["lr"])
                valid = self.evaluate() if ends_epoch else None
                if ends_epoch or now - saved > CHECKPOINT_SECONDS:
                    self._checkpoint()
                    saved = time.monotonic()
        self._finish(self.evaluate() if valid is None else valid)

    def _measured_step(self, batch: Batch) -> float:
        """A step; of some also where each rank's time went."""
        meter, step = self.meter, self.state.step + 1
        waited = self.loader.seconds_waiting
        train = meter.run(step, len(batch.x), waited, lambda: self._step(batch))
        if meter.measured_step == step:
            self.monitor.scalars(step, by_member(meter.figures, "ranks"))
        return train

    def _step(self, batch: Batch) -> float:
        """One optimizer step; the figure of the global batch."""
        mesh, step = self.mesh, self.state.step
        draws = seeded_generator(self.ctx.config.seed, _TRAIN_DRAWS, step)
        # Drawn for the global batch, so that draws do not depend on the number of ranks.
        drawn = self.model.draw(batch.global_size, draws, self.config, True)
        first, last = rank_share(batch.global_size, mesh.rank, mesh.world_size)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(step, self.total_steps, self.config)
        measured = self.engine(batch.x.to(mesh.device), *self._rows(drawn, first, last))
        sums = sum_across(measured.detach().sum(dim=0), mesh)
        loss, figure = float(sums[0]) / batch.global_size, float(sums[1] / sums[2])
        if not math.isfinite(loss):
            raise TrainingError(
                "teacher training diverged",
                where=f"step {step + 1} of {self.total_steps}",
                found=f"a loss of {loss}",
                expected="a finite number",
                fix=f"lower teacher.{self.model.kind}.learning_rate",
            )
        self.engine.backward(measured[:, 0].sum(), global_count=batch.global_size)
        self.engine.step()
        self.model.after_step(step / self.total_steps, self.config)
        return figure

    @torch.no_grad()
    def evaluate(self) -> float:
        """The figure on the validation split, with the same draws each time and on any number of
        ranks. Collective."""
        self.model.eval()
        total = torch.zeros(2, dtype=torch.float64)
        for x, drawn in self._valid_batches():
            measured = self.model(x.to(self.mesh.device), *drawn)
            total += measured[:, 1:].double().sum(dim=0).cpu()
        self.model.train()
        figure, weight = sum_across(total, self.mesh).tolist()
        if self.monitor.enabled:
            self.monitor.valid(self.state.step, figure / weight, self._picture())
        return float(figure / weight)

    @torch.no_grad()
    def baseline(self) -> float:
        """The figure of the best constant prediction on the validation split. Collective."""
        self.model.eval()
        shares = [
            self.model.statistics(x.to(self.mesh.device), *drawn).cpu()
            for x, drawn in self._valid_batches()
        ]
        self.model.train()
        return self.model.baseline(sum_across(torch.stack(shares).sum(dim=0), self.mesh))

    def _rows(self, drawn: tuple[Tensor, ...], first: int, last: int) -> list[Tensor]:
        return [tensor[first:last].to(self.mesh.device) for tensor in drawn]

    def _valid_batches(self) -> Iterator[tuple[Tensor, list[Tensor]]]:
        """This rank's share of each validation batch: x (b, V), and its rows of the draws."""
        rank, num_ranks = self.mesh.rank, self.mesh.world_size
        total = self.index.num_samples("valid")
        ranges = evaluation_ranges(total, _EVALUATION_BATCH, rank, num_ranks)
        shares = iterate_split(
            self.index, self.spec, "valid", _EVALUATION_BATCH, rank=rank, num_ranks=num_ranks
        )
        for number, ((start, stop), x) in enumerate(zip(ranges, shares, strict=True)):
            offset = number * _EVALUATION_BATCH
            draws = seeded_generator(self.ctx.config.seed, _VALID_DRAWS, number)
            drawn = self.model.draw(_EVALUATION_BATCH, draws, self.config, False)
            rows = self._rows(drawn, start - offset, stop - offset)
            yield torch.from_numpy(x).long(), rows

    def _picture(self) -> np.ndarray | None:
        batch = next(iterate_split(self.index, self.spec, "valid", _NUM_PICTURES))
        draws = seeded_generator(self.ctx.config.seed, _VALID_DRAWS)
        return self.model.picture(torch.from_numpy(batch).long(), draws)

    def _checkpoint(self) -> None:
        # At ZeRO stage 0 every rank holds everything, so rank 0 needs nobody's help.
        if self.mesh.is_main:
            path = checkpoint_path(self.ctx.out)
            save_checkpoint(path, self.model, self.optimizer, self.state, self.ctx.fingerprint)

    def _finish(self, valid: float) -> None:
        baseline = self.baseline()
        self.monitor.close()
        if self.mesh.is_main:
            facts = {
                "fingerprint": self.ctx.fingerprint,
                f"valid_{self.model.figure}": valid,
                self.model.baseline_name: baseline,
                "explained": 1 - valid / baseline if baseline > 0 else None,
                "seconds": round(self.state.seconds, 3),
                "num_steps": self.state.step,
                "ranks": self.meter.figures,
            }
            self.model.save(self.ctx.out, training=facts)
        barrier(self.mesh)


def seeded_generator(*seed: int) -> torch.Generator:
    """A generator fixed by several numbers."""
    state = np.random.SeedSequence(seed).generate_state(1, np.uint64)
    return torch.Generator().manual_seed(int(state[0] >> np.uint64(1)))
