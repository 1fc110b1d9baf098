"""Networks write a circuit's statistics, in blocks; the backward pass computes them again.

A row of a sum holds w_j f(z_i, z_j) / sum_j w_j f(z_i, z_j) with f = exp of a network's output: the
quadrature's weights folded in and the row normalised ("self-normalised" quadrature, as in the
papers), so that a materialised circuit is normalised exactly, whatever the number of points.

Trunks are evaluated at a block of points at a time and their inner values are forgotten: what is
kept for backward is what was written, which the circuit keeps anyway.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from distpc.circuits.integral.layout import Grid, InputUse, Layout, SumUse
from distpc.circuits.integral.leaves import leaf_writer
from distpc.circuits.integral.networks import FunctionGroup
from distpc.circuits.integral.quadrature import Quadrature
from distpc.parallel.axis import Axis

_SOFTMAX_ENTRIES = 2**22

Points = Mapping[int, Quadrature]
"""The quadrature of every number of points that a layout has axes of."""

Gradients = dict[Tensor, Tensor]


class Written(NamedTuple):
    """What is written of one bank.

    Attributes:
        shape: of its statistics here.
        units: that these are of.
        is_split: whether they are a rank's share of the bank's.
    """

    shape: tuple[int, ...]
    units: range
    is_split: bool = False


class _Block(NamedTuple):
    """Some rows of those written here, their points (P, d) and log-weights (P,)."""

    rows: slice
    points: Tensor
    log_weights: Tensor


class Writer:
    """Writes the statistics of one compiled circuit.

    Args:
        layout: of the circuit.
        banks: what is written of each.
        networks: by group.
        slots: of each function (group, region, alternative) its number in its group.
        leaf_floor: see `IntegralSettings`.
        block_points: see there.
        axis: ranks that share the units of banks; None: all are here.
    """

    def __init__(
        self,
        layout: Layout,
        banks: Sequence[Written],
        networks: Mapping[str, FunctionGroup],
        slots: Mapping[tuple[str, int, int], int],
        leaf_floor: float,
        block_points: int,
        axis: Axis | None = None,
    ) -> None:
        self.layout = layout
        self.banks = banks
        self.networks = networks
        self.leaf_floor = leaf_floor
        self.block_points = block_points
        self.axis = axis
        self._slots = {
            (group, owners): torch.tensor([slots[group, *owner] for owner in owners])
            for group, owners in _uses(layout)
        }

    def parameters(self) -> list[nn.Parameter]:
        """Those of all networks, in order."""
        return [p for network in self.networks.values() for p in network.parameters()]

    def __call__(self, points: Points) -> list[Tensor]:
        """Statistics of every bank, differentiable by the networks' parameters.

        What comes back as gradients of statistics is taken as flows, where a bank learns so.
        """
        return list(_WriteFunction.apply(self, points, *self.parameters()))

    @torch.no_grad()
    def write(self, points: Points) -> list[Tensor]:
        """Statistics of every bank: rows of sums and units of inputs have one use each."""
        like = self.parameters()[0]
        made = [like.new_empty(bank.shape) for bank in self.banks]
        for grid, uses in self.layout.sums:
            network = self.networks[grid.group]
            for block in self._blocks(grid, self._rows(uses), points, like):
                features = network.features(block.points).T
                for use in uses:
                    slots = self._slots[grid.group, use.owners].to(like.device)
                    outputs = torch.addmm(
                        block.log_weights.unsqueeze(0), network.weight[slots, 0], features
                    ).add_(network.bias[slots])
                    target = made[use.bank][:, block.rows, use.start : use.stop]
                    target.copy_(outputs.view(target.shape))
        for bank in {use.bank for _, uses in self.layout.sums for use in uses}:
            _normalise_(made[bank])
        for of_input in self.layout.inputs:
            network = self.networks[of_input.group]
            features = network.features(self._latents(of_input, points, like))
            slots = self._slots[of_input.group, of_input.owners].to(like.device)
            outputs = network.weight[slots] @ features.T + network.bias[slots].unsqueeze(-1)
            table = _table(made[of_input.bank], of_input)
            table.copy_(leaf_writer(of_input.kind).write(outputs).view(table.shape))
        return made

    @torch.no_grad()
    def pull_back(
        self, points: Points, made: Sequence[Tensor], flows: Sequence[Tensor | None]
    ) -> list[Tensor]:
        """Gradients of `parameters()` from the flows of what `write` gave."""
        gradients: Gradients = {p: torch.zeros_like(p) for p in self.parameters()}
        like = self.parameters()[0]
        if self.axis is not None:
            # Of what every rank writes alike each has the whole flow; gradients are added up.
            flows = [
                flow if flow is None or bank.is_split else flow / self.axis.size
                for flow, bank in zip(flows, self.banks, strict=True)
            ]
        totals = [None if flow is None else flow.sum(-1) for flow in flows]
        for grid, uses in self.layout.sums:
            network = self.networks[grid.group]
            for block in self._blocks(grid, self._rows(uses), points, like):
                with torch.enable_grad():
                    features = network.features(block.points)
                of_features = torch.zeros_like(features)
                for use in uses:
                    flow, total = flows[use.bank], totals[use.bank]
                    if flow is None or total is None:
                        continue
                    rows = block.rows
                    weights = made[use.bank][:, rows, use.start : use.stop]
                    # Of a softmax theta with flow F by its entries: F - theta * (sum of F).
                    of_outputs = weights * total[:, rows].unsqueeze(-1)
                    of_outputs = (flow[:, rows, use.start : use.stop] - of_outputs).flatten(1)
                    slots = self._slots[grid.group, use.owners].to(like.device)
                    of_heads = of_outputs.unsqueeze(1)
                    _pull_head_(gradients, network, slots, of_heads, features, not use.is_whole)
                    of_features.addmm_(of_outputs.T, network.weight[slots, 0])
                _pull_trunk_(gradients, network, features, of_features)
        for of_input in self.layout.inputs:
            self._pull_input(gradients, points, of_input, made, flows)
        if self.axis is None:
            return list(gradients.values())
        sizes = [gradient.numel() for gradient in gradients.values()]
        total = self.axis.sum(torch.cat([gradient.view(-1) for gradient in gradients.values()]))
        parts = zip(total.split(sizes), gradients.values(), strict=True)
        return [part.view(gradient.shape) for part, gradient in parts]

    def _pull_input(
        self,
        gradients: Gradients,
        points: Points,
        use: InputUse,
        made: Sequence[Tensor],
        flows: Sequence[Tensor | None],
    ) -> None:
        flow = flows[use.bank]
        if flow is None:
            return
        network = self.networks[use.group]
        with torch.enable_grad():
            features = network.features(self._latents(use, points, flow))
        shape = (len(use.owners), -1, flow.shape[-1])
        of_outputs = leaf_writer(use.kind).pull_back(
            _table(made[use.bank], use).view(shape),
            _table(flow, use).reshape(shape),
            use.size,
            self.leaf_floor,
        )
        slots = self._slots[use.group, use.owners].to(flow.device)
        _pull_head_(gradients, network, slots, of_outputs, features, True)
        of_features = of_outputs.flatten(0, 1).T @ network.weight[slots].flatten(0, 1)
        _pull_trunk_(gradients, network, features, of_features)

    def _rows(self, uses: Sequence[SumUse]) -> range:
        """Rows of a grid that are written here; banks of one grid are shared alike."""
        return self.banks[uses[0].bank].units

    def _latents(self, use: InputUse, points: Points, like: Tensor) -> Tensor:
        """(K, d) where an input's units lie."""
        if use.num_units == 1:
            return like.new_empty(1, 0)
        units = self.banks[use.bank].units
        return points[use.num_units].points[units.start : units.stop].to(like).unsqueeze(1)

    def _blocks(self, grid: Grid, rows: range, points: Points, like: Tensor) -> Iterator[_Block]:
        num_columns = grid.shape[1]
        size = max(1, self.block_points // num_columns)
        for first in range(rows.start, rows.stop, size):
            last = min(first + size, rows.stop)
            chosen = slice(first * num_columns, last * num_columns)
            axes = [indices[chosen] for indices in grid.indices]
            rules = [points[number] for number in grid.sizes]
            count = chosen.stop - chosen.start
            at = torch.empty(count, 0, dtype=torch.float64)
            if axes:
                of_axes = [r.points[axis] for r, axis in zip(rules, axes, strict=True)]
                at = torch.stack(of_axes, dim=1)
            log_weights = torch.zeros(count, dtype=torch.float64)
            of_columns = slice(grid.num_row_axes, None)
            for rule, axis in zip(rules[of_columns], axes[of_columns], strict=True):
                log_weights += rule.weights.log()[axis]
            own = slice(first - rows.start, last - rows.start)
            yield _Block(own, at.to(like), log_weights.to(like))


class _WriteFunction(torch.autograd.Function):
    """Parameters of networks -> statistics of banks; flows of these -> gradients."""

    @staticmethod
    def forward(
        ctx: Any, writer: Writer, points: Points, *parameters: Tensor
    ) -> tuple[Tensor, ...]:
        made = writer.write(points)
        ctx.set_materialize_grads(False)
        ctx.writer, ctx.points = writer, points
        ctx.save_for_backward(*made)
        return tuple(made)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *flows: Tensor | None) -> tuple[Tensor | None, ...]:
        return (None, None, *ctx.writer.pull_back(ctx.points, ctx.saved_tensors, flows))


def _uses(layout: Layout) -> Iterator[tuple[str, tuple[tuple[int, int], ...]]]:
    for grid, uses in layout.sums:
        for use in uses:
            yield grid.group, use.owners
    for of_input in layout.inputs:
        yield of_input.group, of_input.owners


def _table(statistics: Tensor, use: InputUse) -> Tensor:
    """A view of a bank's statistics: the tables of one use."""
    if statistics.dim() == 2:
        return statistics[use.row : use.row + len(use.owners) * use.size]
    return statistics[use.first : use.first + len(use.owners)]


def _normalise_(logits: Tensor) -> None:
    """Softmax over the last axis, in place and some rows at a time."""
    rows = logits.view(-1, logits.shape[-1])
    for part in rows.split(max(1, _SOFTMAX_ENTRIES // rows.shape[1])):
        part.sub_(part.amax(-1, keepdim=True)).exp_()
        part.div_(part.sum(-1, keepdim=True))


def _pull_head_(
    gradients: Gradients,
    network: FunctionGroup,
    slots: Tensor,
    of_outputs: Tensor,
    features: Tensor,
    bias_matters: bool,
) -> None:
    """Add the gradients of heads; `of_outputs` is (T, O, P), features (P, H)."""
    of_weight = of_outputs.flatten(0, 1) @ features.detach()
    shape = of_outputs.shape[:2]
    gradients[network.weight].index_add_(0, slots, of_weight.view(*shape, -1))
    if bias_matters:
        gradients[network.bias].index_add_(0, slots, of_outputs.sum(-1))


def _pull_trunk_(
    gradients: Gradients, network: FunctionGroup, features: Tensor, of_features: Tensor
) -> None:
    inner = list(network.trunk.parameters())
    if not inner:
        return
    for parameter, gradient in zip(
        inner, torch.autograd.grad(features, inner, of_features), strict=True
    ):
        gradients[parameter] += gradient
