"""Training of the masked autoencoder, one rank of it.

The result is a function of the data, the configuration and R (the number of ranks): a run that was
killed goes on from its last checkpoint to the same weights, and on another R to the same ones up
to the rounding of sums.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from distpc.artifacts.stage import StageContext
from distpc.config.teachers import MaeConfig
from distpc.data.index import ShardIndex
from distpc.data.loader import Batch, Loader
from distpc.data.plan import evaluation_ranges, num_steps, rank_share
from distpc.data.reader import iterate_split
from distpc.data.spec import DatasetSpec
from distpc.errors import TrainingError
from distpc.parallel.collectives import barrier, sum_across
from distpc.parallel.engine import Engine
from distpc.parallel.mesh import Mesh
from distpc.parallel.progress import Progress
from distpc.teachers.checkpoint import (
    TrainingState,
    checkpoint_path,
    load_checkpoint,
    save_checkpoint,
)
from distpc.teachers.mae import MaskedAutoencoder, draw_visible
from distpc.teachers.monitor import Monitor
from distpc.teachers.pictures import reconstruction_grid
from distpc.teachers.registry import build_teacher

CHECKPOINT_SECONDS = 30.0
"""Longest training between two checkpoints; one is also written after every epoch."""

# The second is He et al.'s for masked autoencoders: gradients change with each batch's ratio.
_BETAS = (0.9, 0.95)
_EVALUATION_BATCH = 256
_NUM_PICTURES = 8
_TRAIN_MASKS, _VALID_MASKS = 1, 2


def learning_rate(step: int, total_steps: int, config: MaeConfig) -> float:
    """Rate of step 0 .. total_steps - 1: linear warm-up to the peak, then a cosine towards 0."""
    warmup = round(config.warmup_fraction * total_steps)
    if step < warmup:
        return config.learning_rate * (step + 1) / warmup
    done = (step - warmup) / max(1, total_steps - warmup)
    return config.learning_rate * 0.5 * (1 + math.cos(math.pi * done))


class MaeTrainer:
    """The training loop of one rank.

    Args:
        ctx: the stage's context, with inputs shards and index.
        mesh: this process among the ranks.
    """

    def __init__(self, ctx: StageContext, mesh: Mesh) -> None:
        self.ctx, self.mesh, self.config = ctx, mesh, ctx.config.teacher.mae
        self.spec = DatasetSpec.load(ctx.input("shards").path)
        self.index = ShardIndex.load(ctx.input("index").path)
        data = ctx.config.data
        model = build_teacher(
            ctx.config.teacher, self.spec, data.patch_size_pixels, ctx.config.seed
        )
        assert isinstance(model, MaskedAutoencoder)
        self.model = model.to(mesh.device)
        self.optimizer = torch.optim.AdamW(
            model.parameters(), lr=0.0, betas=_BETAS, weight_decay=self.config.weight_decay
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
        self.monitor = None
        if mesh.is_main:
            folder = ctx.tensorboard / "teacher"
            self.monitor = Monitor(folder, self.state.step, self.total_steps)

    def train(self) -> None:
        """Train to the end and write the teacher (rank 0).

        Raises:
            TrainingError: the error is no longer finite; nothing of that step is kept.
            DataError: the training split is smaller than a batch.
        """
        start, started = self.state, time.monotonic()
        saved = started
        valid_mse = None
        with Progress("teacher", self.total_steps, unit="steps") as progress:
            progress.advance(start.step)
            for batch in self.loader.batches(self.num_samples):
                ends_epoch = batch.state.epoch > self.state.loader.epoch
                train_mse = self._step(batch)
                now = time.monotonic()
                seconds = start.seconds + now - started
                self.state = TrainingState(self.state.step + 1, batch.state, seconds)
                progress.advance(train_mse=train_mse)
                self._log_step(train_mse)
                valid_mse = self.evaluate() if ends_epoch else None
                if ends_epoch or now - saved > CHECKPOINT_SECONDS:
                    self._checkpoint()
                    saved = time.monotonic()
        self._finish(self.evaluate() if valid_mse is None else valid_mse)

    def _step(self, batch: Batch) -> float:
        """One optimizer step; the mean error of the global batch."""
        mesh, step = self.mesh, self.state.step
        masks = seeded_generator(self.ctx.config.seed, _TRAIN_MASKS, step)
        low, high = self.config.mask_ratio_min, self.config.mask_ratio_max
        ratio = low + (high - low) * float(torch.rand((), generator=masks))
        # Drawn for the global batch, so that masks do not depend on the number of ranks.
        visible = draw_visible(batch.global_size, self.model.grid.num_patches, ratio, masks)
        first, last = rank_share(batch.global_size, mesh.rank, mesh.world_size)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(step, self.total_steps, self.config)
        errors = self.engine(batch.x.to(mesh.device), visible[first:last].to(mesh.device))
        local_sum = errors.sum()
        mse = float(sum_across(local_sum, mesh)) / batch.global_size
        if not math.isfinite(mse):
            raise TrainingError(
                "teacher training diverged",
                where=f"step {step + 1} of {self.total_steps}",
                found=f"a mean squared error of {mse}",
                expected="a finite number",
                fix="lower teacher.mae.learning_rate",
            )
        self.engine.backward(local_sum, global_count=batch.global_size)
        self.engine.step()
        return mse

    @torch.no_grad()
    def evaluate(self) -> float:
        """Mean squared error on the validation split at the middle masking ratio, with the same
        masks each time and on any number of ranks. Collective."""
        self.model.eval()
        ratio = (self.config.mask_ratio_min + self.config.mask_ratio_max) / 2
        total = torch.zeros((), dtype=torch.float64)
        for number, (first, last, x) in enumerate(self._valid_batches()):
            masks = seeded_generator(self.ctx.config.seed, _VALID_MASKS, number)
            num_patches = self.model.grid.num_patches
            visible = draw_visible(_EVALUATION_BATCH, num_patches, ratio, masks)[first:last]
            errors = self.model(x.to(self.mesh.device), visible.to(self.mesh.device))
            total += errors.double().sum().cpu()
        self.model.train()
        mse = float(sum_across(total, self.mesh)) / self.index.num_samples("valid")
        if self.monitor is not None:
            self.monitor.valid(self.state.step, mse, self._picture())
        return mse

    @torch.no_grad()
    def variance(self) -> float:
        """Mean over variables of the variance of validation values in [0, 1]. Collective."""
        sums = torch.zeros(2, self.spec.num_variables, dtype=torch.float64)
        for _, _, x in self._valid_batches():
            scaled = x.double() / self.model.largest_values.double().cpu()
            sums += torch.stack([scaled.sum(dim=0), scaled.square().sum(dim=0)])
        mean, square = sum_across(sums, self.mesh) / self.index.num_samples("valid")
        return float((square - mean.square()).mean())

    def _valid_batches(self) -> Iterator[tuple[int, int, Tensor]]:
        """This rank's share of each validation batch: (first, last) within the batch, x (b, V)."""
        rank, num_ranks = self.mesh.rank, self.mesh.world_size
        total = self.index.num_samples("valid")
        ranges = evaluation_ranges(total, _EVALUATION_BATCH, rank, num_ranks)
        shares = iterate_split(
            self.index, self.spec, "valid", _EVALUATION_BATCH, rank=rank, num_ranks=num_ranks
        )
        for number, ((start, stop), x) in enumerate(zip(ranges, shares, strict=True)):
            offset = number * _EVALUATION_BATCH
            yield start - offset, stop - offset, torch.from_numpy(x).long()

    def _log_step(self, train_mse: float) -> None:
        if self.monitor is not None:
            rate = self.optimizer.param_groups[0]["lr"]
            self.monitor.train(self.state.step, train_mse, rate)

    def _picture(self) -> np.ndarray:
        batch = next(iterate_split(self.index, self.spec, "valid", _NUM_PICTURES))
        masks = seeded_generator(self.ctx.config.seed, _VALID_MASKS)
        visible = draw_visible(len(batch), self.model.grid.num_patches, 0.5, masks)
        return reconstruction_grid(self.model, torch.from_numpy(batch).long(), visible)

    def _checkpoint(self) -> None:
        # At ZeRO stage 0 every rank holds everything, so rank 0 needs nobody's help.
        if self.mesh.is_main:
            path = checkpoint_path(self.ctx.out)
            save_checkpoint(path, self.model, self.optimizer, self.state, self.ctx.fingerprint)

    def _finish(self, valid_mse: float) -> None:
        variance = self.variance()
        if self.monitor is not None:
            self.monitor.close()
            facts = {
                "fingerprint": self.ctx.fingerprint,
                "valid_mse": valid_mse,
                "variance": variance,
                "explained": 1 - valid_mse / variance if variance > 0 else None,
                "seconds": round(self.state.seconds, 3),
                "num_steps": self.state.step,
            }
            self.model.save(self.ctx.out, training=facts)
        barrier(self.mesh)


def seeded_generator(*seed: int) -> torch.Generator:
    """A generator fixed by several numbers."""
    state = np.random.SeedSequence(seed).generate_state(1, np.uint64)
    return torch.Generator().manual_seed(int(state[0] >> np.uint64(1)))
