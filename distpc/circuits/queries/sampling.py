"""Exact samples by a top-down pass, level by level, for many samples at once."""

from __future__ import annotations

from collections.abc import Iterator
from numbers import Integral
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from distpc.circuits.evidence import Evidence
from distpc.circuits.gaussian import GaussianBank
from distpc.circuits.inputs import TableBank
from distpc.circuits.queries.batches import batches, collect, rows_at_once
from distpc.circuits.queries.flows import refuse_impossible
from distpc.circuits.queries.randomness import STREAMS_PER_REGION, normals, uniforms
from distpc.circuits.queries.tables import sum_tables
from distpc.circuits.schedule import InputPlan, SumPlan
from distpc.errors import EvidenceError

if TYPE_CHECKING:
    from distpc.circuits.circuit import Circuit

CHUNK_ENTRIES = 2**20
"""Scores compared at once (8 MiB in float64)."""
CHOICE_BYTES = 2**27
"""Choices of units held at once."""
BYTES_PER_UNIT = 8


def sample(circuit: Circuit, n: int, seed: int, x: Any = None, observed: Any = None) -> Tensor:
    """Draw samples.

    The j-th sample of row b depends on the seed, b, j and the row alone: more samples, or other
    batches, leave the first ones as they are (up to choices that rounding decides).

    Args:
        circuit: the model.
        n: samples, for each row of evidence where there is any.
        seed: equal seeds give equal samples.
        x: (B, V) evidence; what is missing or not observed is drawn given the rest.
        observed: bool (V,) or (B, V).

    Returns:
        (n, V), or (B, n, V) given x; integers, or float32 where a variable is real.

    Raises:
        EvidenceError: evidence of probability 0, n below 1, or a mask without values.
    """
    _check_number(n)
    if x is None:
        if observed is not None:
            raise EvidenceError("a mask of observed variables needs values", expected="x")
        evidence = circuit.reader.missing(1, circuit.device)
        blocks = _draw(circuit, evidence, n, seed, 0)
        return collect(range(n), blocks, (n, circuit.num_variables))
    dtype = torch.float32 if circuit.reader.is_real.any() else torch.int64
    empty = torch.zeros(0, n, circuit.num_variables, dtype=dtype)
    result = collect(x, sample_blocks(circuit, n, seed, x, observed), tuple(empty.shape))
    return result if len(result) else empty


def sample_blocks(
    circuit: Circuit,
    n: int,
    seed: int,
    x: Any,
    observed: Any = None,
    batch_size: int | None = None,
) -> Iterator[tuple[int, Tensor]]:
    """As `sample`, batch after batch (b, n, V) with the number of its first row."""
    _check_number(n)
    values = 8 * n * circuit.num_variables
    size = batch_size or rows_at_once(circuit, BYTES_PER_UNIT, values)
    for start, evidence in batches(circuit, x, observed, size):
        drawn = collect(
            range(n * evidence.codes.shape[1]),
            _draw(circuit, evidence, n, seed, start),
            (0, circuit.num_variables),
        )
        yield start, drawn.view(-1, n, circuit.num_variables)


def _check_number(n: object) -> None:
    if isinstance(n, bool) or not isinstance(n, Integral) or n < 1:
        raise EvidenceError("no such number of samples", where="n", found=n, expected="1, 2, ...")


@torch.no_grad()
def _draw(
    circuit: Circuit, evidence: Evidence, n: int, seed: int, first_row: int
) -> Iterator[tuple[int, Tensor]]:
    """(first, (N, V)) blocks of the n samples of each row, which lie side by side."""
    messages = _Messages(circuit, evidence, first_row)
    total = n * evidence.codes.shape[1]
    size = max(1, CHOICE_BYTES // (8 * (len(circuit.graph.regions) + circuit.num_variables)))
    for first in range(0, total, size):
        flat = torch.arange(first, min(first + size, total), device=circuit.device)
        owner = flat // n
        # Rows and samples number 2^31 each at most.
        names = (owner + first_row) * 2**32 + flat % n
        yield first, _TopDown(circuit, evidence, messages, owner, names, seed).draw()


class _Messages:
    """Likelihoods of units given the evidence, up to a factor of each row."""

    def __init__(self, circuit: Circuit, evidence: Evidence, first_row: int) -> None:
        evaluation = circuit.evaluate(evidence, keep=True)
        refuse_impossible(evaluation.log_prob, first_row)
        self.places = circuit.schedule.places
        self.scaled = evaluation.scaled.outputs
        self.logs = None if evaluation.logs is None else evaluation.logs.outputs
        # For each row where its logs are, -1 where scaled values are good enough.
        self.again = torch.full(evidence.codes.shape[1:], -1, device=circuit.device)
        missing = evidence.codes < 0 if evidence.reals is None else _missing(circuit, evidence)
        drawn = set(missing.any(1).nonzero()[:, 0].tolist())
        # Below the others everything is observed, and nothing has to be drawn.
        self.drawn = {r for r, scope in enumerate(circuit.graph.scopes) if drawn & scope}
        self.again[evaluation.again] = torch.arange(len(evaluation.again), device=circuit.device)

    def scores(
        self, region: int, owner: Tensor, children: Tensor | None, weights: Tensor
    ) -> Tensor:
        """Weight times likelihood of child units (N, fan-in) of `region`, float64, up to a factor
        of each sample; `children` None: all units in order."""
        place = self.places[region]
        assert place is not None
        step, row = place
        values = self.scaled[step][row][owner]
        values = values if children is None else values.gather(1, children)
        # Products of two float32 numbers do not underflow in float64.
        scores = values.double().mul_(weights)
        position = self.again[owner]
        lost = (position >= 0).nonzero()[:, 0]
        if self.logs is not None and len(lost):
            logs = self.logs[step][row][position[lost]]
            logs = logs if children is None else logs.gather(1, children[lost])
            logs = logs + weights[lost].log()
            scores[lost] = (logs - logs.amax(-1, keepdim=True)).nan_to_num_(-torch.inf).exp()
        return scores


def _missing(circuit: Circuit, evidence: Evidence) -> Tensor:
    assert evidence.reals is not None
    is_real = circuit.reader.is_real.to(evidence.reals.device).unsqueeze(1)
    return torch.where(is_real, evidence.reals.isnan(), evidence.codes < 0)


class _TopDown:
    """One pass: for each region the unit that each sample uses (N,), -1 for none.

    Args:
        owner: (N,) the row of evidence of each sample.
        names: (N,) what its random numbers are made of.
    """

    def __init__(
        self,
        circuit: Circuit,
        evidence: Evidence,
        messages: _Messages,
        owner: Tensor,
        names: Tensor,
        seed: int,
    ) -> None:
        self.circuit = circuit
        self.regions = circuit.graph.regions
        self.messages = messages
        self.owner = owner
        self.names = names
        self.seed = seed
        self.codes = evidence.codes[:, owner]
        self.reals = None if evidence.reals is None else evidence.reals[:, owner]
        self.choices = {circuit.graph.root: torch.zeros_like(owner)}

    def draw(self) -> Tensor:
        """Samples (N, V)."""
        for plan in reversed(self.circuit.schedule.steps):
            if isinstance(plan, SumPlan):
                for index, weights in sum_tables(self.circuit, plan, torch.float32):
                    self._choose(index, weights)
                continue
            for index in plan.regions:
                self._hand_on(index)
            if isinstance(plan, InputPlan):
                self._draw_inputs(plan)
        if self.reals is None:
            return self.codes.t().contiguous()
        is_real = self.circuit.reader.is_real.to(self.owner.device).unsqueeze(1)
        return torch.where(is_real, self.reals, self.codes.to(self.reals.dtype)).t().float()

    def _choose(self, index: int, weights: Tensor) -> None:
        """A sum unit uses a child unit in proportion to weight times the child's likelihood."""
        region = self.regions[index]
        units = self.choices.pop(index, None)
        if units is None:
            return
        mixed = None
        if region.blocks > 1:
            mixed = torch.from_numpy(self.circuit.graph.mixed_units(index)).to(units.device)
        if len(self.messages.again) == 1 and len(units) > len(weights):
            # One row of evidence: the units' distributions are the same for all samples.
            owner = units.new_zeros(len(weights))
            scores = self.messages.scores(region.children[0], owner, mixed, weights)
            child = self._pick_unit(scores, units.clamp_min(0), index, self.names)
            if mixed is not None:
                child = mixed[units.clamp_min(0), child]
            self._use(region.children[0], torch.where(units < 0, -1, child))
            return
        picked = []
        size = max(1, CHUNK_ENTRIES // weights.shape[1])
        for part, owner, names in zip(
            units.split(size), self.owner.split(size), self.names.split(size), strict=True
        ):
            unit = part.clamp_min(0)
            children = None if mixed is None else mixed[unit]
            scores = self.messages.scores(region.children[0], owner, children, weights[unit])
            child = self._pick(scores, index, names)
            if children is not None:
                child = children.gather(1, child.unsqueeze(1))[:, 0]
            picked.append(torch.where(part < 0, -1, child))
        self._use(region.children[0], torch.cat(picked))

    def _hand_on(self, index: int) -> None:
        """Products use unit k of every child; a concat the one child that unit k is from; a
        Kronecker product unit k // K2 of its left child and k % K2 of its right one."""
        region = self.regions[index]
        if not region.children or index not in self.choices:
            return
        units = self.choices.pop(index)
        first = 0
        for position, child in enumerate(region.children):
            if region.kind == "concat":
                size = self.regions[child].num_units
                inside = (units >= first) & (units < first + size)
                self._use(child, torch.where(inside, units - first, -1))
                first += size
            elif region.kind == "kronecker":
                right = self.regions[region.children[1]].num_units
                unit = units // right if position == 0 else units % right
                self._use(child, torch.where(units < 0, -1, unit))
            else:
                self._use(child, units)

    def _draw_inputs(self, plan: InputPlan) -> None:
        bank = self.circuit.bank_list[plan.bank]
        weights = bank.weights() if isinstance(bank, TableBank) else None
        for index in (region for bag in plan.bags for region in bag):
            variable, units = self.regions[index].variable, self.choices.pop(index, None)
            if units is None:
                continue
            assert variable is not None
            table = self.circuit.bank_of(index)[1]
            if weights is not None and isinstance(bank, TableBank):
                drawn = ((units >= 0) & (self.codes[variable] < 0)).nonzero()[:, 0]
                shares = weights[bank.table(table)].T.double()
                self.codes[variable, drawn] = self._pick_unit(
                    shares, units[drawn], index, self.names[drawn]
                )
            elif isinstance(bank, GaussianBank) and self.reals is not None:
                drawn = ((units >= 0) & self.reals[variable].isnan()).nonzero()[:, 0]
                mean, variance = bank.weights_of(table, torch.float64)[units[drawn]].unbind(-1)
                noise = normals(self.seed, STREAMS_PER_REGION * index, self.names[drawn])
                value = mean + noise * variance.sqrt()
                self.reals[variable, drawn] = value.to(self.reals.dtype)
            else:
                raise EvidenceError(
                    "samples of a family of inputs are not known",
                    where=f"input region {index} of variable {variable}",
                    found=self.regions[index].family,
                    expected="a family over categories, or gaussian",
                )

    def _pick(self, scores: Tensor, index: int, names: Tensor) -> Tensor:
        """An index for each row of scores (N, K), in proportion to them; never one of score 0."""
        ends = scores.cumsum(-1)
        total = ends[:, -1:].contiguous()
        point = uniforms(self.seed, STREAMS_PER_REGION * index, names).unsqueeze(1) * total
        last = torch.searchsorted(ends, total)
        return torch.searchsorted(ends, point, right=True).minimum(last)[:, 0]

    def _pick_unit(self, table: Tensor, units: Tensor, index: int, names: Tensor) -> Tensor:
        """As `_pick`, where sample i has the scores table[units[i]] (K', K): one binary search in
        all rows one after the other, row k on [k, k + 1)."""
        ends = table.cumsum(-1)
        ends /= ends[:, -1:].clamp_min(torch.finfo(ends.dtype).tiny)
        starts = torch.arange(len(ends), dtype=ends.dtype, device=ends.device).unsqueeze(1)
        last = torch.searchsorted(ends, torch.ones_like(starts))[:, 0]
        point = units + uniforms(self.seed, STREAMS_PER_REGION * index, names)
        found = torch.searchsorted((ends + starts).flatten(), point, right=True)
        return (found - units * ends.shape[1]).minimum(last[units])

    def _use(self, region: int, units: Tensor) -> None:
        if region in self.messages.drawn:
            # A shared region is used by one parent of a sample at most, the others say -1.
            others = self.choices.get(region)
            self.choices[region] = units if others is None else torch.maximum(others, units)
