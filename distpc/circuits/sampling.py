"""Exact samples by a top-down pass, level by level, for all samples at once."""

from __future__ import annotations

from collections import defaultdict
from numbers import Integral
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from distpc.circuits import queries
from distpc.circuits.evidence import Evidence
from distpc.circuits.input_steps import RealStep, TableStep
from distpc.circuits.inputs import TableBank
from distpc.circuits.sums import SumBank
from distpc.errors import EvidenceError

if TYPE_CHECKING:
    from distpc.circuits.circuit import Circuit

CHUNK_ENTRIES = 2**23


@torch.no_grad()
def sample(circuit: Circuit, n: int, seed: int, x: Any = None, observed: Any = None) -> Tensor:
    """Draw samples.

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
    if isinstance(n, bool) or not isinstance(n, Integral) or n < 1:
        raise EvidenceError("no such number of samples", where="n", found=n, expected="1, 2, ...")
    generator = torch.Generator().manual_seed(seed)
    if x is None:
        if observed is not None:
            raise EvidenceError("a mask of observed variables needs values", expected="x")
        return _TopDown(circuit, circuit.reader.missing(1, circuit.device), n, generator).draw()
    evidence = circuit.reader.read(x, None, observed, circuit.device)
    samples = _TopDown(circuit, evidence, n, generator).draw()
    return samples.view(evidence.codes.shape[1], n, len(evidence.codes))


class _TopDown:
    """State of one pass: for each step the unit that each sample uses, (E, N), -1 for none.

    N = B * n: the n samples of a row of evidence lie side by side.
    """

    def __init__(
        self, circuit: Circuit, evidence: Evidence, n: int, generator: torch.Generator
    ) -> None:
        self.circuit = circuit
        self.evidence = evidence
        self.n = n
        self.generator = generator
        batch = evidence.codes.shape[1]
        self.owner = torch.arange(batch, device=circuit.device).repeat_interleave(n)
        evaluation = circuit.evaluate(evidence, keep=True)
        queries.refuse_impossible(evaluation.log_prob, 0)
        self.logs = [values.log() for values in evaluation.scaled.outputs]
        if evaluation.logs is not None:
            for logs, exact in zip(self.logs, evaluation.logs.outputs, strict=True):
                shifted = exact - exact.amax(-1, keepdim=True)
                logs[:, evaluation.again] = shifted.to(logs.dtype)
        self.choices = [
            torch.full((len(step.regions), batch * n), -1, device=circuit.device)
            for step in circuit.schedule.steps
        ]

    def draw(self) -> Tensor:
        circuit = self.circuit
        step, row = circuit.schedule.root
        self.choices[step][row] = 0
        codes = self.evidence.codes[:, self.owner].clone()
        reals = self.evidence.reals
        values = None if reals is None else reals[:, self.owner].clone()
        for number in range(len(circuit.schedule.steps) - 1, -1, -1):
            module, plan = circuit.step_list[number], circuit.schedule.steps[number]
            if isinstance(module, TableStep):
                self._draw_codes(number, codes)
            elif isinstance(module, RealStep) and values is not None:
                self._draw_reals(number, values)
            elif circuit.graph.regions[plan.regions[0]].kind == "sum":
                self._descend_sum(number)
            else:
                self._descend(number)
        if values is None:
            return codes.t().contiguous()
        is_real = circuit.reader.is_real.to(values.device).unsqueeze(1)
        return torch.where(is_real, values, codes.to(values.dtype)).t().float()

    def _descend(self, number: int) -> None:
        """Products use unit k of every child; a concat the one child that unit k is from; a
        Kronecker product unit k // K2 of its left child and k % K2 of its right one."""
        regions = self.circuit.graph.regions
        links: dict[tuple[int, int, int, int], tuple[list[int], list[int]]] = defaultdict(
            lambda: ([], [])
        )
        for row, region in enumerate(self.circuit.schedule.steps[number].regions):
            start = 0
            stride = regions[region].num_units
            for child in regions[region].children:
                step, child_row = self._place(child)
                units = regions[child].num_units
                stride = stride // units if regions[region].kind == "kronecker" else 1
                rows, child_rows = links[step, start, units, stride]
                rows.append(row)
                child_rows.append(child_row)
                start += units if regions[region].kind == "concat" else 0
        for (step, start, units, stride), (rows, child_rows) in links.items():
            choice = self.choices[number][rows]
            if regions[self.circuit.schedule.steps[number].regions[0]].kind == "kronecker":
                choice = torch.where(choice < 0, -1, choice // stride % units)
            choice = choice - start
            inside = (choice >= 0) & (choice < units)
            self._use(step, child_rows, torch.where(inside, choice, -1))

    def _descend_sum(self, number: int) -> None:
        """A sum unit uses a child unit in proportion to weight times the child's likelihood."""
        plan = self.circuit.schedule.steps[number]
        regions = self.circuit.graph.regions
        bank, _ = self.circuit.bank_of(plan.regions[0])
        assert isinstance(bank, SumBank)
        log_tables = bank.weights().log()
        for row, region in enumerate(plan.regions):
            child = regions[region].children[0]
            step, child_row = self._place(child)
            log_weights = log_tables[self.circuit.bank_of(region)[1]]
            messages = self.logs[step][child_row]
            mixed = torch.from_numpy(self.circuit.graph.mixed_units(region)).to(messages.device)
            drawn = []
            size = max(1, CHUNK_ENTRIES // log_weights.shape[1])
            for units, owners in zip(
                self.choices[number][row].split(size), self.owner.split(size), strict=True
            ):
                children = mixed[units.clamp_min(0)]
                logs = messages[owners].gather(1, children)
                scores = (log_weights[units.clamp_min(0)] + logs).double()
                picked = self._pick((scores - scores.amax(-1, keepdim=True)).exp())
                picked = children.gather(1, picked.unsqueeze(1)).squeeze(1)
                drawn.append(torch.where(units < 0, -1, picked))
            self._use(step, [child_row], torch.cat(drawn).unsqueeze(0))

    def _draw_codes(self, number: int, codes: Tensor) -> None:
        step = self.circuit.step_list[number]
        assert isinstance(step, TableStep)
        bank = self.circuit.bank_list[step.bank]
        assert isinstance(bank, TableBank)
        weights = bank.weights()
        for row, tables in enumerate(step.tables):
            for variable, table in zip(step.variables[row].tolist(), tables, strict=True):
                units = self.choices[number][row]
                drawn = ((units >= 0) & (codes[variable] < 0)).nonzero()[:, 0]
                columns = weights[bank.table(table)].T
                codes[variable, drawn] = self._pick(columns[units[drawn]].double())

    def _draw_reals(self, number: int, values: Tensor) -> None:
        step = self.circuit.step_list[number]
        assert isinstance(step, RealStep)
        for row, variable in enumerate(step.variables.tolist()):
            units = self.choices[number][row]
            drawn = ((units >= 0) & values[variable].isnan()).nonzero()[:, 0]
            moments = self.circuit.weights_of(step.regions[row], torch.float64)[units[drawn]]
            noise = torch.randn(len(drawn), generator=self.generator, dtype=torch.float64)
            noise = noise.to(values.device) * moments[:, 1].sqrt()
            values[variable, drawn] = (moments[:, 0] + noise).to(values.dtype)

    def _pick(self, weights: Tensor) -> Tensor:
        """An index for each row of weights (N, K), in proportion to them; never one of weight 0."""
        ends = weights.cumsum(-1)
        total = ends[:, -1:]
        point = torch.rand(len(weights), 1, generator=self.generator, dtype=torch.float64)
        point = point.to(weights.device) * total
        return ((ends <= point) & (ends < total)).sum(-1)

    def _use(self, step: int, rows: list[int], choice: Tensor) -> None:
        # A shared child is used by one parent of a sample at most, the others say -1.
        index = torch.tensor(rows, device=choice.device).unsqueeze(1).expand_as(choice)
        self.choices[step].scatter_reduce_(0, index, choice, "amax")

    def _place(self, region: int) -> tuple[int, int]:
        place = self.circuit.schedule.places[region]
        assert place is not None
        return place
