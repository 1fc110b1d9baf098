"""The loop of fine-tuning: batches, updates, validation, checkpoints, on every rank alike."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from distpc.circuits.circuit import Circuit
from distpc.circuits.kernels.step import FastStep
from distpc.config.schema import FinetuneConfig
from distpc.data.loader import Loader
from distpc.data.spec import MISSING, DatasetSpec
from distpc.errors import TrainingError
from distpc.parallel.checks import check_replicas
from distpc.parallel.collectives import gather_objects, sum_across
from distpc.parallel.engine import Engine
from distpc.parallel.heap import steady
from distpc.parallel.mesh import Mesh
from distpc.parallel.meter import Meter, by_member, peak_memory_bytes
from distpc.parallel.progress import Progress
from distpc.training.checkpoint import Checkpoints, Piece, Saver, TrainingFacts, take_snapshot
from distpc.training.figures import Figures, bits_per_value, tally
from distpc.training.guard import Guard, locate_in_places
from distpc.training.integral import Model, as_circuit, begin_step
from distpc.training.last_good import with_last_good
from distpc.training.monitor import Monitor
from distpc.training.optimizer import CircuitOptimizer
from distpc.training.reseed import RESEED_UNTIL, reseed_dead
from distpc.training.schedule import make_schedule
from distpc.training.validation import Validation


@dataclass
class Parts:
    """What a trainer works with; one of each on every rank.

    Attributes:
        circuit: the module inside the engine.
        whole: what holds whole parameters on rank 0, for figures and pictures: the same object,
            except under ZeRO-3 and on a node axis, where it is a copy of a circuit that validations
            load `full_state` into, or None where that would be too large for one process.
        blank: the whole circuit without values, to save models with; networks have theirs.
        fused: what updates the circuit in place of engine and optimizer; None: those do.
        checkpoints, saver: where checkpoints are, and what writes them.
        last_good: folder for the best model so far, should training have to stop.
    """

    circuit: Model
    whole: Model | None
    blank: Model
    optimizer: CircuitOptimizer
    engine: Engine
    fused: FastStep | None
    loader: Loader
    validation: Validation
    checkpoints: Checkpoints
    saver: Saver
    monitor: Monitor
    meter: Meter
    mesh: Mesh
    last_good: Path


class Trainer:
    """Training on the data alone, by the rule of the optimizer.

    Args:
        config: the finetune section.
        spec: of the data.
        num_samples: samples of the training split.
        parts: see `Parts`.
        facts: where to go on from; fresh ones for a new training.
        check_replicas_every: steps between two looks at what ranks must hold alike; 0: never.
    """

    def __init__(
        self,
        config: FinetuneConfig,
        spec: DatasetSpec,
        num_samples: int,
        parts: Parts,
        facts: TrainingFacts,
        *,
        check_replicas_every: int = 0,
    ) -> None:
        self.config = config
        self.check_replicas_every = check_replicas_every
        self.spec = spec
        self.num_samples = num_samples
        self.total = config.num_samples or config.num_epochs * num_samples
        self.parts = parts
        self.facts = facts
        self.guard = Guard(config.max_divergence_bits)
        self.schedule = make_schedule(
            config.schedule,
            config.step_size,
            config.final_step_size,
            self.total,
            warmup_samples=config.warmup_samples,
            milestones=config.milestones,
        )
        self._saved_at = time.monotonic()
        self._started_at = time.monotonic()
        self._started_samples = facts.samples

    def run(self) -> None:
        """Train from where `facts` stand to the end; the last step is always validated.

        Raises:
            TrainingError: the same on every rank, naming where the best model so far was left.
            ResourceError: the disk is full; checkpoints that were there stay.
        """
        parts = self.parts
        with steady(), Progress("finetune", self.total, "samples") as progress:
            try:
                self._run(progress)
            except TrainingError as error:
                parts.saver.settle()
                raise with_last_good(
                    error, parts.checkpoints, parts.blank, self.spec, parts.last_good, parts.mesh
                ) from error

    def _run(self, progress: Progress) -> None:
        parts, facts = self.parts, self.facts
        progress.advance(min(facts.samples, self.total))
        if facts.best is None:
            self._validate(progress)
        for batch in parts.loader.batches(self.total):
            figures, wants_checkpoint = self._measured_update(batch)
            facts.step += 1
            before, facts.samples = facts.samples, facts.samples + batch.global_size
            facts.loader = batch.state.to_json()
            bits = figures.bits
            self._account(figures, before)
            progress.advance(min(batch.global_size, self.total - before), bits=bits)
            self._report_step(bits)
            self._reseed(before, progress)
            ended = facts.samples >= self.total
            if ended or self._due(before, self.config.evaluate_every_epochs):
                self._validate(progress, last=ended)
            elif wants_checkpoint:
                self._save()
        parts.saver.wait()

    def results(self) -> dict[str, Any]:
        """Figures for the report (JSON values); a collective of all ranks."""
        facts, mesh, unit = self.facts, self.parts.mesh, self.spec.unit
        memory = gather_objects(peak_memory_bytes(mesh.device), mesh)
        assert facts.best is not None
        return {
            f"train_{unit}": facts.train_bits,
            f"train_{unit}_is": "mean over the last epoch's batches, each before its own update",
            f"valid_{unit}": facts.best["bits"],
            "valid_impossible_samples": int(facts.best["impossible"]),
            "best_step": int(facts.best["step"]),
            "best_epoch": facts.best["epoch"],
            f"last_valid_{unit}": None if facts.valid is None else facts.valid["bits"],
            "steps": facts.step,
            "epochs": facts.samples / self.num_samples,
            "curve": facts.curve,
            "train_impossible_samples": facts.impossible,
            "reseeded_states": facts.reseeded,
            "samples_per_second": self._samples_per_second(),
            "waiting_fraction": self._waiting_fraction(),
            "peak_memory_bytes": max(memory),
            "peak_memory_bytes_by_rank": memory,
            "ranks": self.parts.meter.figures,
            "num_ranks": mesh.world_size,
        }

    def _measured_update(self, batch: Any) -> tuple[Figures, bool]:
        """One global batch; on some steps also where each rank's time went."""
        meter, step = self.parts.meter, self.facts.step + 1
        waited = self.parts.loader.seconds_waiting
        outcome = meter.run(step, len(batch.x), waited, lambda: self._update(batch))
        if meter.measured_step == step:
            self.parts.monitor.scalars(step, by_member(meter.figures, "ranks"))
        return outcome

    def _update(self, batch: Any) -> tuple[Figures, bool]:
        """One global batch: flows of this rank's share, then the step. Also: save now?"""
        parts, facts = self.parts, self.facts
        step = facts.step + 1
        parts.optimizer.set_step_size(self.schedule(facts.samples))
        begin_step(parts.circuit, step)
        watched = self.guard.wants_statistics(step)
        if watched:
            parts.optimizer.watch()
        totals = torch.zeros(len(Figures.NAMES) + 2, dtype=torch.float64, device=parts.mesh.device)
        totals[:-2] = self._flows(batch) if parts.fused is None else self._fused_update(batch)
        totals[-2] = float(parts.saver.has_failed)
        totals[-1] = float(parts.mesh.is_main and self._is_late())
        totals = sum_across(totals, parts.mesh)
        figures = Figures.of(totals[:-2])
        if totals[-2] > 0:
            # Raises on every rank what went wrong on one.
            parts.saver.wait()
        if figures.not_a_number:
            # Where the statistics are the cause, they name the layer and the row.
            self._check_statistics(facts.step)
        self.guard.check_batch(
            step,
            not_a_number=figures.not_a_number,
            impossible=figures.impossible,
            size=batch.global_size,
        )
        if parts.fused is None:
            parts.engine.step()
            self._settle(step)
        elif watched:
            parts.optimizer.look()
        if watched and self._found_by_any_rank():
            self._check_statistics(step)
        if self.check_replicas_every and step % self.check_replicas_every == 0:
            check_replicas(parts.engine, step)
        return figures, bool(totals[-1] > 0)

    def _settle(self, step: int) -> None:
        """Give the rule whole rows, where it sees shards and wants them now and then."""
        engine, rule = self.parts.engine, self.parts.optimizer.rule
        if rule is None or engine.zero_stage == 0 or not rule.settle_every:
            return
        if step % rule.settle_every == 0:
            engine.rewrite(rule.settle)

    def _flows(self, batch: Any) -> Tensor:
        """Leave the flows of this rank's share as gradients; returns its `Figures`, as sums."""
        parts = self.parts
        totals = torch.zeros(len(Figures.NAMES), dtype=torch.float64, device=parts.mesh.device)
        for x, is_real in self._micro_batches(batch):
            x = x.to(parts.mesh.device)
            likelihoods = self._forward(x)
            usable = torch.isfinite(likelihoods) & is_real
            # `where` gives samples outside `usable` a flow of exactly zero.
            kept = torch.where(usable, likelihoods, torch.zeros_like(likelihoods))
            parts.engine.backward(-kept.sum(), global_count=batch.global_size)
            # Ranks of a node axis see the same samples: one of them counts.
            if is_real and parts.mesh.node_rank == 0:
                totals += tally(likelihoods.detach(), x, self.spec.counted)
        return totals

    def _fused_update(self, batch: Any) -> Tensor:
        """Update at once; samples without a finite likelihood pass no flow. Returns as `_flows`."""
        assert self.parts.fused is not None
        x = batch.x.to(self.parts.mesh.device)
        likelihoods = self.parts.fused.step(x, self.schedule(self.facts.samples))
        return tally(likelihoods, x, self.spec.counted)

    def _is_late(self) -> bool:
        """Whether a checkpoint is due; a slow disk puts it off rather than holding up training."""
        every = self.config.checkpoint_every_seconds
        put_off = every > 0 and self.parts.saver.is_busy
        return time.monotonic() - self._saved_at >= every and not put_off

    def _forward(self, x: Tensor) -> Tensor:
        """(B,) nats through the engine, every rank making the same passes.

        Some samples need a second pass; from ZeRO-2 on passes are collectives of all ranks. What
        rank 0 asks of the circuit alone (samples, uses) must not wait for the others, so the
        circuit is told so for this call only.
        """
        circuit = self.parts.circuit
        circuit.any_rank = self._any_rank
        try:
            return self.parts.engine(x)
        finally:
            circuit.any_rank = bool

    def _any_rank(self, flag: bool) -> bool:
        if self.parts.engine.zero_stage < 2:
            return flag
        found = torch.tensor(float(flag), device=self.parts.mesh.device)
        return bool(sum_across(found, self.parts.mesh) > 0)

    def _micro_batches(self, batch: Any) -> Iterator[tuple[Tensor, bool]]:
        """This rank's share in pieces, as many on every rank; and whether a piece is real.

        A rank whose share is short gets a stand-in of one sample without any value, whose
        likelihood is 1 and whose flows the caller drops.
        """
        pieces = self.parts.engine.micro_batches(
            len(batch.x),
            global_count=batch.global_size,
            micro_batch=self.config.micro_batch_size,
        )
        for piece in pieces:
            if piece.start < piece.stop:
                yield batch.x[piece], True
            else:
                missing = float("nan") if batch.x.is_floating_point() else MISSING
                yield batch.x.new_full((1, batch.x.shape[1]), missing), False

    def _found_by_any_rank(self) -> bool:
        mesh = self.parts.mesh
        found = torch.tensor(float(self.parts.optimizer.end_watch()), device=mesh.device)
        return bool(sum_across(found, mesh) > 0)

    def _check_statistics(self, step: int) -> None:
        """Every rank looks at what it holds, and all raise what the first has found; a collective.

        Raises:
            TrainingError: naming the step, the parameter and the row.
        """
        engine = self.parts.engine
        found = gather_objects(locate_in_places(engine.places(owned=True)), self.parts.mesh)
        order = {name: place for place, name in enumerate(engine.module.state_dict())}
        places = [place for place in found if place is not None]
        if places:
            raise self.guard.nonfinite(step, *min(places, key=lambda p: (order[p[0]], p[1])))

    def _account(self, figures: Figures, before: int) -> None:
        facts = self.facts
        facts.impossible += figures.impossible
        for name, value in (("nats", figures.nats), ("values", figures.values)):
            facts.sums[name] = facts.sums.get(name, 0.0) + value
        if self._due(before, 1.0) or facts.samples >= self.total:
            facts.train_bits = bits_per_value(facts.sums["nats"], facts.sums["values"])
            facts.sums = {}

    def _due(self, before: int, every_epochs: float) -> bool:
        interval = every_epochs * self.num_samples
        return math.floor(before / interval) < math.floor(self.facts.samples / interval)

    def _reseed(self, before: int, progress: Progress) -> None:
        """Start dead states again where that is due; before a checkpoint, which then holds it."""
        every, facts = self.config.reseed_every_epochs, self.facts
        if every and facts.samples < RESEED_UNTIL * self.total and self._due(before, every):
            below = self.config.reseed_below
            whole = self.parts.whole
            assert isinstance(whole, Circuit)
            number = reseed_dead(self.parts.engine, whole, below, seed=facts.step)
            facts.reseeded += number
            self.parts.monitor.scalars(facts.step, {"latents/reseeded_states": number})
            if number and self.parts.mesh.is_main:
                progress.say(f"finetune: step {facts.step}  {number} dead states started again")

    def _report_step(self, bits: float) -> None:
        every = max(1, self.total // 1000 // self.config.batch_size)
        if self.facts.step % every == 0:
            self.parts.monitor.scalars(
                self.facts.step,
                {
                    f"train_{self.spec.unit}": bits,
                    "step_size": self.schedule(self.facts.samples),
                    "samples_per_second": self._samples_per_second(),
                    "waiting_for_data_fraction": self._waiting_fraction(),
                    "peak_memory_bytes": peak_memory_bytes(self.parts.mesh.device),
                    "impossible_samples": self.facts.impossible,
                },
            )

    def _validate(self, progress: Progress, *, last: bool = False) -> None:
        """Evaluate, keep the model if it is the best, and always leave a checkpoint."""
        parts, facts = self.parts, self.facts
        figures = parts.validation.evaluate(self._forward)
        self.guard.check_validation(facts.step, figures, facts.best)
        facts.valid = {
            "step": facts.step,
            "epoch": facts.samples / self.num_samples,
            "bits": figures.bits,
            "impossible": figures.impossible,
        }
        facts.curve.append([facts.samples, figures.bits])
        # A model that rules validation samples out is worse than any that does not.
        rank = (figures.impossible, figures.bits)
        if facts.best is None or rank < (facts.best["impossible"], facts.best["bits"]):
            facts.best = facts.valid
        self._save()
        if parts.whole is not None and parts.whole is not parts.circuit:
            # For figures and pictures of the circuit as a whole.
            state = parts.engine.full_state()
            if parts.mesh.is_main:
                parts.whole.load_state_dict(state, assign=True)
        self._report_validation(progress, last)

    def _report_validation(self, progress: Progress, last: bool) -> None:
        parts, facts, unit = self.parts, self.facts, self.spec.unit
        assert facts.valid is not None and facts.best is not None
        if not parts.monitor.enabled:
            return
        parts.monitor.scalars(facts.step, {f"valid_{unit}": facts.valid["bits"]})
        dead = ""
        if parts.whole is not None:
            circuit, examples = as_circuit(parts.whole), parts.validation.examples()
            health = parts.monitor.health(facts.step, circuit)
            dead = f"dead states {int(health.get('latents/dead_states', 0))}  "
            parts.monitor.pictures(facts.step, circuit, examples, force=last)
        caveat = f"{self.spec.caveat}  " if self.spec.caveat else ""
        train = "" if facts.train_bits is None else f"train {facts.train_bits:.4f}  "
        progress.say(
            f"finetune: step {facts.step}  epoch {facts.valid['epoch']:.2f}  {train}"
            f"valid {facts.valid['bits']:.4f} {unit}  best {facts.best['bits']:.4f} "
            f"(step {int(facts.best['step'])})  {caveat}{dead}"
            f"{self._samples_per_second():.0f} samples/s"
        )

    def _save(self) -> None:
        """Start a checkpoint of the present state, unless the state is not finite."""
        parts, facts = self.parts, self.facts
        # Before the copy: at most one is in memory.
        parts.saver.wait()
        pieces = take_snapshot(parts.engine)
        if self._is_poisoned(pieces):
            self._check_statistics(facts.step)
        parts.saver.save(facts, pieces)
        self._saved_at = time.monotonic()

    def _is_poisoned(self, pieces: list[Piece]) -> bool:
        """Whether any rank's share holds a NaN or an infinity; a collective."""
        # A sum is non-finite where one of its terms is, and needs no mask in memory.
        found = any(not bool(torch.isfinite(piece.values.sum())) for piece in pieces)
        mesh = self.parts.mesh
        return bool(sum_across(torch.tensor(float(found), device=mesh.device), mesh) > 0)

    def _samples_per_second(self) -> float:
        seconds = max(time.monotonic() - self._started_at, 1e-9)
        return (self.facts.samples - self._started_samples) / seconds

    def _waiting_fraction(self) -> float:
        seconds = max(time.monotonic() - self._started_at, 1e-9)
        return self.parts.loader.seconds_waiting / seconds
