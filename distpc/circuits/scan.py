"""Tied hidden Markov models as one program: a scan over the steps of a whole chunk.

The compiled circuit does a step with its layers, each of which reads the tied transition out of its
statistics and adds a matrix of flows to them. Here weights are read out once for all steps, a step
is one matrix product each way, and the flows of the transition are ONE product over steps x batch.
What comes out, likelihoods and flows, is the same.

Messages are scaled to a maximum of 1 after every step. That is exact as long as no transition is
near zero: what underflows beside a 1 can then not be all that some state has. Where there may be
zeros (no smoothing, pruned edges), latent evidence, rows on several ranks, partitioned parameters
or rounded products, the compiled circuit does the work.
Legend: T steps, B batch, K states, C tokens.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from distpc.circuits.evidence import Evidence
from distpc.circuits.inputs import CategoricalBank
from distpc.circuits.look_up import scatter_rows
from distpc.circuits.statistics import read_out
from distpc.circuits.sums import SURE, SumBank
from distpc.structures.chain_layout import ChainLayout

if TYPE_CHECKING:
    from distpc.circuits.circuit import Circuit


class Scan:
    """The banks of a tied hidden Markov model, in the order in which messages pass them.

    Attributes:
        start: mixes the states of step 0.
        transition: one dense bank, or the two of a Monarch matrix.
        emission: the tokens' table.
    """

    def __init__(
        self, start: SumBank, transition: tuple[SumBank, ...], emission: CategoricalBank
    ) -> None:
        self.start, self.transition, self.emission = start, transition, emission

    @classmethod
    def find(cls, circuit: Circuit) -> Scan | None:
        """The scan of a circuit; None for any but a tied hidden Markov model."""
        layout = ChainLayout.find(circuit.graph)
        if layout is None or not layout.is_tied or not layout.transitions:
            return None
        regions = layout.start, *layout.transitions[0], layout.emissions[0]
        start, *transition, emission = (circuit.bank_of(region)[0] for region in regions)
        sums = [start, *transition]
        if not isinstance(emission, CategoricalBank) or len(emission.sizes) != 1:
            return None
        if any(not isinstance(bank, SumBank) or len(bank.statistics) != 1 for bank in sums):
            return None
        return cls(start, tuple(transition), emission)  # type: ignore[arg-type]

    def is_exact(self) -> bool:
        """Whether the scan can stand for the compiled circuit as its banks are now."""
        sums = (self.start, *self.transition)
        floor = 1.0
        for bank in self.transition:
            floor *= bank.smoothing
        return (
            floor > SURE
            and all(bank.mask is None and bank.matmul_dtype == torch.float32 for bank in sums)
            and not any(hasattr(bank.statistics, "ds_id") for bank in (*sums, self.emission))
        )

    def log_prob(self, evidence: Evidence) -> Tensor:
        """Log-likelihoods (B,) float32, -inf for impossible evidence; differentiable."""
        codes = evidence.codes
        index = torch.where(codes < 0, self.emission.num_rows, codes).contiguous()
        found: Tensor = ScanFunction.apply(
            self,
            index,
            self.start.statistics,
            self.emission.statistics,
            *(bank.statistics for bank in self.transition),
        )
        return found

    def emissions(self, index: Tensor) -> Tensor:
        """(T, B, K) probabilities of the tokens index (T, B), 1 where missing; a new tensor."""
        bank, rows = self.emission, index.view(-1)
        dtype = bank.statistics.dtype
        source = bank.statistics.detach()
        if 2 * len(rows) < bank.num_rows:
            table = bank.read(source, rows, dtype)
        else:
            table = torch.nn.functional.embedding(rows, bank.read(source, None, dtype))
        return table.view(*index.shape, -1)


class ScanFunction(torch.autograd.Function):
    """Statistics -> log-likelihoods (B,); flows in backward, see `statistics`."""

    @staticmethod
    def forward(
        ctx: Any, scan: Scan, index: Tensor, start: Tensor, emission: Tensor, *transition: Tensor
    ) -> Tensor:
        factors = _factors(scan, transition)
        states = scan.emissions(index)  # becomes the messages u, maximum 1
        num_steps, batch, _ = states.shape
        passed = [states.new_empty(num_steps - 1, batch, f.num_units) for f in factors]
        tops = states.new_empty(num_steps, batch)
        torch.amax(states[-1], dim=-1, out=tops[-1])
        states[-1].div_(tops[-1, :, None])
        for step in range(num_steps - 2, -1, -1):
            message = states[step + 1]
            for factor, out in zip(factors, passed, strict=True):
                message = factor.apply(message, out[step])
            state = states[step].mul_(message)
            torch.amax(state, dim=-1, out=tops[step])
            state.div_(tops[step, :, None])
        theta = read_out(start.detach()[0], scan.start.floor)
        root = states[0] @ theta[0]
        logs = tops.log().sum(0, dtype=torch.float64) + root.log()
        # A top of 0 made NaN of everything after it.
        logs = torch.where((tops > 0).all(0), logs, -torch.inf)
        ctx.save_for_backward(index, start, emission, states, root, *transition, *passed)
        ctx.scan, ctx.possible = scan, logs.isfinite()
        return logs.float()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        index, start, emission, states, root, *rest = ctx.saved_tensors
        half = len(rest) // 2
        transition, passed = rest[:half], rest[half:]
        scan, factors = ctx.scan, _factors(ctx.scan, transition)
        theta = read_out(start[0], scan.start.floor)
        weight = torch.where(ctx.possible, upstream / root, 0.0)[:, None]
        flows = torch.empty_like(states)
        torch.mul(states[0], theta, out=flows[0]).mul_(weight)
        if not bool(ctx.possible.all()):
            flows[0].nan_to_num_(0.0)
            states = states.nan_to_num(0.0)
            passed = [values.nan_to_num(1.0) for values in passed]
        flow_start = flows[0].sum(0).view_as(start)
        ratios = [torch.empty_like(values) for values in passed]
        for step in range(len(states) - 1):
            flow = flows[step]
            for number in range(half - 1, -1, -1):
                ratio = torch.div(flow, passed[number][step], out=ratios[number][step])
                child = states[step + 1] if number == 0 else passed[number - 1][step]
                into = flows[step + 1] if number == 0 else None
                flow = factors[number].back(ratio, child, into)
        flow_transition = [
            factor.flows(ratio, states[1:] if number == 0 else passed[number - 1])
            for number, (factor, ratio) in enumerate(zip(factors, ratios, strict=True))
        ]
        rows = flows.view(-1, flows.shape[-1]).to(emission.dtype)
        flow_emission = scatter_rows(rows, index.view(-1, 1), scan.emission.num_rows)
        return None, None, flow_start, scan.emission.shared_out_(flow_emission), *flow_transition


class _Factor:
    """A tied sum of the scan: its weights (1, K', fan-in), and its products."""

    def __init__(self, bank: SumBank, statistics: Tensor) -> None:
        self.blocks = bank.blocks
        self.theta = read_out(statistics.detach(), bank.floor)
        self.rows = self.blocks.split_rows(self.theta)
        self.num_units = self.theta.shape[1]

    def apply(self, values: Tensor, out: Tensor) -> Tensor:
        """(B, K) -> (B, K'), into `out`."""
        if self.blocks.count == 1:
            return torch.mm(values, self.theta[0].T, out=out)
        grouped = self.blocks.split_units(values[None], 1)
        products = torch.bmm(grouped, self.rows.mT)
        return out.copy_(self.blocks.join_units(products, (1, *out.shape))[0])

    def back(self, ratio: Tensor, child: Tensor, into: Tensor | None) -> Tensor:
        """Flow of the child's units (B, K): child * (ratio (B, K') theta)."""
        if self.blocks.count == 1:
            found = torch.mm(ratio, self.theta[0], out=into)
        else:
            grouped = torch.bmm(self.blocks.split_units(ratio[None], 1), self.rows)
            found = self.blocks.join_units(grouped, (1, *child.shape))[0]
            found = found if into is None else into.copy_(found)
        return found.mul_(child)

    def flows(self, ratios: Tensor, children: Tensor) -> Tensor:
        """Flows (1, K', fan-in) of all steps: ratios (T, B, K'), children (T, B, K)."""
        left = self.blocks.split_units(ratios.flatten(0, 1)[None], 1)
        right = self.blocks.split_units(children.flatten(0, 1)[None], 1)
        return self.blocks.join_rows(torch.bmm(left.mT, right), 1).mul_(self.theta)


def _factors(scan: Scan, transition: Any) -> list[_Factor]:
    banks = zip(scan.transition, transition, strict=True)
    return [_Factor(bank, statistics) for bank, statistics in banks]
