"""MPE: the jointly most probable values and latents, exact by max-product in logs.

Summing the latents out first and maximising then (marginal MAP) is another question, and NP-hard:
see `marginal_map`.
"""

from __future__ import annotations

import math
from collections import Counter
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from distpc.circuits.evidence import Evidence
from distpc.circuits.gaussian import GaussianBank
from distpc.circuits.queries.batches import batches, rows_at_once
from distpc.circuits.queries.flows import refuse_impossible
from distpc.circuits.queries.tables import input_tables, sum_tables
from distpc.circuits.schedule import SumPlan
from distpc.data.spec import MISSING

if TYPE_CHECKING:
    from distpc.circuits.circuit import Circuit

CHUNK_ENTRIES = 2**16
"""Terms of a maximum held at once: 512 KiB, which a cache holds."""
BYTES_PER_UNIT = 16


class MostProbable(NamedTuple):
    """The most probable completion of each row, together with the choice of every sum.

    Attributes:
        x: (B, V) values; int64, or float32 where a variable is real. Observed ones are kept.
        latents: (B, Z) values of the latents, -1 where the completion does not use the region.
        log_prob: (B,) float64, log p(x, z) in nats with z the choices of all sums. Not comparable
            with `Circuit.log_prob(x)`, which sums over z.
    """

    x: Tensor
    latents: Tensor
    log_prob: Tensor


@torch.no_grad()
def mpe(
    circuit: Circuit, x: Any, observed: Any = None, batch_size: int | None = None
) -> MostProbable:
    """The values of what is missing and the choices of all sums that maximise log p(x, z).

    Of equally probable ones the lowest unit of the highest sum counts first, then the lowest
    category. A missing real variable takes the mean of its unit; densities count as they are.

    Args:
        circuit: the model.
        x: (B, V) values; those not observed are ignored.
        observed: bool (V,) or (B, V).
        batch_size: rows evaluated at once; None: as many as fit into bounded memory.

    Raises:
        EvidenceError: evidence of probability 0, or a family whose mode is not known.
    """
    size = batch_size or rows_at_once(circuit, BYTES_PER_UNIT)
    modes = _modes(circuit)
    parts = [
        _MaxProduct(circuit, modes, evidence).explain(start)
        for start, evidence in batches(circuit, x, observed, size)
    ]
    if not parts:
        nothing = circuit.reader.missing(0, circuit.device)
        parts = [_MaxProduct(circuit, modes, nothing).explain(0)]
    return MostProbable(*(torch.cat(tensors) for tensors in zip(*parts, strict=True)))


def _modes(circuit: Circuit) -> dict[int, tuple[Tensor, Tensor]]:
    """The best value of each unit of each input region, and its log-probability, (K,) both."""
    found: dict[int, tuple[Tensor, Tensor]] = {}
    for regions, bank, table in input_tables(circuit):
        if isinstance(bank, GaussianBank):
            mean, variance = table
            mode = mean, -0.5 * (variance.log() + math.log(2 * math.pi))
        else:
            mode = table.argmax(0), table.amax(0).log()
        found.update(dict.fromkeys(regions, mode))
    return found


class _MaxProduct:
    """One batch: messages (B, K) of regions upwards, choices (B,) downwards, -1 for unused.

    A sum's choice is found again on the way down, for the one unit that is used, from the same
    numbers: keeping the choices of all units would take as much as the messages.
    """

    def __init__(
        self, circuit: Circuit, modes: dict[int, tuple[Tensor, Tensor]], evidence: Evidence
    ) -> None:
        self.circuit = circuit
        self.regions = circuit.graph.regions
        self.modes = modes
        self.evidence = evidence
        self.messages: dict[int, Tensor] = {}
        self.readers = Counter(child for region in self.regions for child in region.children)
        self.kept = {region.children[0] for region in self.regions if region.kind == "sum"}
        self.unused = torch.full(evidence.codes.shape[1:], -1, device=circuit.device)
        self.choices: dict[int, Tensor] = {}

    def explain(self, start: int) -> MostProbable:
        """The answer for a batch whose first row is `start`."""
        self._look_up()
        for plan in self.circuit.schedule.steps:
            if isinstance(plan, SumPlan):
                for index, weights in sum_tables(self.circuit, plan, torch.float64):
                    self.messages[index] = self._maximum(index, weights.log())
                    self._release(index)
                continue
            for index in plan.regions:
                if self.regions[index].kind != "input":
                    self.messages[index] = self._combine(index)
                    self._release(index)
        log_prob = self.messages[self.circuit.graph.root][:, 0]
        refuse_impossible(log_prob, start)
        self._descend()
        return MostProbable(self._values(), self._latents(), log_prob)

    def _look_up(self) -> None:
        """Messages of all inputs; what is missing counts as the best value of each unit."""
        for regions, bank, table in input_tables(self.circuit):
            for index in regions:
                variable = self.regions[index].variable
                assert variable is not None
                if isinstance(bank, GaussianBank):
                    assert self.evidence.reals is not None
                    values = self.evidence.reals[variable].double().unsqueeze(1)
                    mean, variance = table
                    logs = (values - mean).square().div_(-2 * variance)
                    logs -= 0.5 * (variance.log() + math.log(2 * math.pi))
                    missing = values.isnan()
                else:
                    codes = self.evidence.codes[variable]
                    logs = table[codes.clamp_min(0)].log()
                    missing = codes.unsqueeze(1) < 0
                self.messages[index] = torch.where(missing, self.modes[index][1], logs)

    def _maximum(self, index: int, log_weights: Tensor) -> Tensor:
        """A sum's message: its units' best child unit."""
        region = self.regions[index]
        below = self.messages[region.children[0]]
        mixed = self._mixed(index)
        rows = max(1, CHUNK_ENTRIES // log_weights.numel())
        parts = [
            (part.unsqueeze(1) if mixed is None else part[:, mixed]).add(log_weights).amax(-1)
            for part in below.split(rows)
        ]
        return torch.cat(parts) if parts else below.new_zeros(0, region.num_units)

    def _mixed(self, index: int) -> Tensor | None:
        """The child units of each unit of a sum (K', fan-in); None: all of them."""
        if self.regions[index].blocks == 1:
            return None
        return torch.from_numpy(self.circuit.graph.mixed_units(index)).to(self.unused.device)

    def _combine(self, index: int) -> Tensor:
        """The message of a product, Kronecker product or concat."""
        region = self.regions[index]
        parts = [self.messages[child] for child in region.children]
        if region.kind == "concat":
            return torch.cat(parts, dim=-1)
        if region.kind == "kronecker":
            left, right = parts
            return (left.unsqueeze(2) + right.unsqueeze(1)).flatten(1)
        total = parts[0].clone()
        for part in parts[1:]:
            total += part
        return total

    def _release(self, index: int) -> None:
        """Drop the messages that no one reads any more."""
        for child in self.regions[index].children:
            self.readers[child] -= 1
            if not self.readers[child] and child not in self.kept:
                del self.messages[child]

    def _descend(self) -> None:
        """From the root's unit down: which unit of each region the completion uses."""
        self.choices = {self.circuit.graph.root: torch.zeros_like(self.unused)}
        for plan in reversed(self.circuit.schedule.steps):
            if isinstance(plan, SumPlan):
                for index, weights in sum_tables(self.circuit, plan, torch.float64):
                    self._choose(index, weights.log())
            else:
                for index in plan.regions:
                    self._hand_on(index)

    def _choose(self, index: int, log_weights: Tensor) -> None:
        units = self.choices.get(index, self.unused)
        child = self.regions[index].children[0]
        mixed = self._mixed(index)
        picked = []
        rows = max(1, CHUNK_ENTRIES // log_weights.shape[1])
        for unit, below in zip(
            units.clamp_min(0).split(rows), self.messages[child].split(rows), strict=True
        ):
            scores = below if mixed is None else below.gather(1, mixed[unit])
            best = (scores + log_weights[unit]).argmax(1)
            picked.append(best if mixed is None else mixed[unit, best])
        if picked:
            self._use(child, torch.where(units < 0, -1, torch.cat(picked)))

    def _hand_on(self, index: int) -> None:
        """Choices of the children of a region that is no sum."""
        region = self.regions[index]
        units = self.choices.get(index, self.unused)
        first = 0
        for position, child in enumerate(region.children):
            size = self.regions[child].num_units
            if region.kind == "concat":
                inside = (units >= first) & (units < first + size)
                self._use(child, torch.where(inside, units - first, -1))
                first += size
            elif region.kind == "kronecker":
                right = self.regions[region.children[1]].num_units
                unit = units // right if position == 0 else units % right
                self._use(child, torch.where(units < 0, -1, unit))
            else:
                self._use(child, units)

    def _use(self, region: int, units: Tensor) -> None:
        # A shared region is used by one parent of a completion at most, the others say -1.
        self.choices[region] = torch.maximum(self.choices.get(region, self.unused), units)

    def _values(self) -> Tensor:
        codes = self.evidence.codes.clone()
        reals = None if self.evidence.reals is None else self.evidence.reals.clone()
        for index, (best, _) in self.modes.items():
            variable, units = self.regions[index].variable, self.choices.get(index, self.unused)
            assert variable is not None
            if best.is_floating_point():
                assert reals is not None
                fill = (units >= 0) & reals[variable].isnan()
                reals[variable] = torch.where(
                    fill, best[units.clamp_min(0)].to(reals.dtype), reals[variable]
                )
            else:
                fill = (units >= 0) & (codes[variable] < 0)
                codes[variable] = torch.where(fill, best[units.clamp_min(0)], codes[variable])
        if reals is None:
            return codes.t().contiguous()
        is_real = self.circuit.reader.is_real.to(reals.device).unsqueeze(1)
        return torch.where(is_real, reals, codes.to(reals.dtype)).t().float()

    def _latents(self) -> Tensor:
        shape = (len(self.unused), self.circuit.num_latents)
        latents = torch.full(shape, MISSING, device=self.unused.device)
        for index, region in enumerate(self.regions):
            if region.latent is not None:
                units = self.choices.get(index, self.unused)
                latents[:, region.latent] = torch.maximum(latents[:, region.latent], units)
        return latents
