"""Conditionals of one variable after another: p(x_v | x_<v) for all v at about two passes.

Likelihoods are kept as float64 logs, so that long chains and large hubs lose nothing, and a sum is
one matrix product. Everything runs in an order that depends on the circuit alone, on matrices
whose shapes depend on the batch size alone: equal batches give equal bits on one machine, whoever
decides the values (a coder, a decoder, a sampler).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from distpc.circuits.blocks import Blocks
from distpc.circuits.incremental_plan import Message, Step, depth_first_order, plan
from distpc.circuits.inputs import TableBank
from distpc.circuits.sums import SumBank
from distpc.errors import EvidenceError

if TYPE_CHECKING:
    from distpc.circuits.circuit import Circuit

MISSING = -1

Choose = Callable[[int, Tensor], Tensor]
"""(variable, its distribution (B, C) float64) -> its values (B,), -1 where there is none."""


class Incremental:
    """A circuit that is asked for, and told, one variable at a time.

    Args:
        circuit: its variables are all categorical. Its weights are copied, in float64.
        order: of the variables; default: depth first, which is the cheapest.

    Attributes:
        order: of the variables.

    Raises:
        EvidenceError: a real variable, or an order that does not name every variable once.
    """

    def __init__(self, circuit: Circuit, order: Sequence[int] | None = None) -> None:
        for variable, count in enumerate(circuit.num_categories):
            if count is None:
                raise EvidenceError(
                    "conditionals one after another are tables over categories",
                    where=f"variable {variable}",
                    found="a real variable",
                    expected="categorical variables only",
                )
        self.graph = circuit.graph
        self.order = tuple(depth_first_order(self.graph) if order is None else order)
        self._steps = plan(self.graph, self.order)
        self._weights = _weights(circuit)
        self._device = circuit.device

    @torch.no_grad()
    def run(self, batch: int, choose: Choose) -> None:
        """Reveal all variables of `batch` samples in order.

        A value of probability 0 is not conditioned on. Where the likelihood of a sample's values
        so far underflows all the same (sums with weights of 0 may do that), `choose` is shown the
        uniform distribution.

        Args:
            batch: B.
            choose: given a variable and its conditional distributions, gives its values.
        """
        pass_ = _Pass(self, batch)
        for step in self._steps:
            if step.kind == "reveal":
                distribution = pass_.distribution(step)
                values = choose(step.region, distribution)
                pass_.codes[step.region] = _possible(values, distribution)
            else:
                pass_.compute(step)
            for message in step.frees:
                del pass_.messages[message]


class _Pass:
    """The messages of one batch, (B, K) float64 logs."""

    def __init__(self, owner: Incremental, batch: int) -> None:
        self.graph = owner.graph
        self.weights = owner._weights
        self.batch = batch
        self.codes: dict[int, Tensor] = {}
        self.device = owner._device
        self.messages: dict[Message, Tensor] = {("down", self.graph.root): self._zeros(batch, 1)}

    def distribution(self, step: Step) -> Tensor:
        """(B, C) float64 conditional of a variable; its rows sum to one."""
        downs = [self.messages["down", index] for index in step.children]
        top = torch.stack([down.amax(-1) for down in downs]).amax(0).unsqueeze(-1)
        top = torch.where(top.isneginf(), 0.0, top)
        shares = [(down - top).exp_() for down in downs]
        mass = torch.stack([share.sum(-1) for share in shares]).sum(0).unsqueeze(-1)
        is_lost = mass == 0
        mass = torch.where(is_lost, 1.0, mass)
        # Units' own distributions sum to one, so that their mixture does.
        parts = [
            share.div_(mass) @ self.weights[index].mT
            for index, share in zip(step.children, shares, strict=True)
        ]
        total = parts[0] if len(parts) == 1 else torch.stack(parts).sum(0)
        if is_lost.any():
            total = torch.where(is_lost, 1.0 / total.shape[-1], total)
        return total

    def compute(self, step: Step) -> None:
        """Do a step that is a message."""
        if step.kind == "down":
            terms = [self._from_parent(step, parent, slot) for parent, slot in step.parents]
            message = terms[0] if len(terms) == 1 else torch.stack(terms).logsumexp(0)
            self.messages["down", step.region] = message
        elif step.kind == "extend":
            message = self.messages["up", step.region]
            for child in step.children:
                message = message + self.messages["up", child]
            self.messages["up", step.region] = message
        else:
            self.messages["up", step.region] = self._up(step)

    def _from_parent(self, step: Step, parent: int, slot: int) -> Tensor:
        region = self.graph.regions[parent]
        down = self.messages["down", parent]
        if region.kind == "sum":
            return self._mix(parent, down, upwards=False)
        if region.kind == "concat":
            before = sum(self.graph.regions[child].num_units for child in region.children[:slot])
            return down[:, before : before + self.graph.regions[step.region].num_units]
        if region.kind == "kronecker":
            return self._from_kronecker(step, parent, slot)
        if parent in step.children:
            return down + self.messages["up", parent]
        for position, child in enumerate(region.children):
            if position != slot and child in step.children:
                down = down + self.messages["up", child]
        return down

    def _from_kronecker(self, step: Step, parent: int, slot: int) -> Tensor:
        left, right = self.graph.regions[parent].children
        sizes = self.graph.regions[left].num_units, self.graph.regions[right].num_units
        grid = self.messages["down", parent].view(self.batch, *sizes)
        other = right if slot == 0 else left
        if other in step.children:
            grid = grid + self.messages["up", other].unsqueeze(1 + slot)
        return grid.logsumexp(2 - slot)

    def _up(self, step: Step) -> Tensor:
        region = self.graph.regions[step.region]
        if region.variable is not None:
            return self._look_up(step.region, region.variable)
        ups = {child: self.messages["up", child] for child in step.children}
        if region.kind == "sum":
            return self._mix(step.region, ups[region.children[0]], upwards=True)
        if region.kind == "concat":
            return torch.cat([ups[child] for child in region.children], -1)
        if region.kind == "kronecker":
            return self._kronecker(step)
        return torch.stack([ups[child] for child in step.children]).sum(0)

    def _kronecker(self, step: Step) -> Tensor:
        terms = []
        for axis, child in enumerate(self.graph.regions[step.region].children):
            shape = (self.batch, self.graph.regions[child].num_units)
            up = self.messages["up", child] if child in step.children else None
            term = self._zeros(*shape) if up is None else up
            terms.append(term.unsqueeze(2 - axis))
        return (terms[0] + terms[1]).flatten(1)

    def _look_up(self, index: int, variable: int) -> Tensor:
        codes = self.codes[variable]
        looked_up = self.weights[index][codes.clamp_min(0)].log_()
        return torch.where(codes.unsqueeze(-1) < 0, 0.0, looked_up)

    def _mix(self, index: int, logs: Tensor, upwards: bool) -> Tensor:
        """Through a sum's matrix, blockwise: from its child's units to its own or back."""
        region = self.graph.regions[index]
        blocks = Blocks(region.blocks, region.strided)
        units = region.num_units if upwards else self.graph.regions[region.children[0]].num_units
        split = blocks.split_units(logs.unsqueeze(0), 1)
        top = split.amax(-1, keepdim=True)
        top = torch.where(top.isneginf(), 0.0, top)
        weights = self.weights[index]
        mixed = (split - top).exp_() @ (weights.mT if upwards else weights)
        return blocks.join_units(mixed.log_().add_(top), (1, self.batch, units))[0]

    def _zeros(self, *shape: int) -> Tensor:
        return torch.zeros(*shape, dtype=torch.float64, device=self.device)


def _possible(values: Tensor, distribution: Tensor) -> Tensor:
    """Values as evidence: missing where the model says that they cannot be."""
    chances = distribution.gather(1, values.clamp_min(0).unsqueeze(1)).squeeze(1)
    return torch.where((values >= 0) & (chances > 0), values, MISSING)


def _weights(circuit: Circuit) -> dict[int, Tensor]:
    """Float64 weights: (C, K) of an input, (blocks, K' / blocks, fan-in) of a sum; tied regions
    share one tensor."""
    weights: dict[int, Tensor] = {}
    for plan_, bank in zip(circuit.schedule.banks, circuit.bank_list, strict=True):
        # All tables of a bank at once: one at a time, its read-out would be repeated for each.
        assert isinstance(bank, (TableBank, SumBank))
        whole = bank.weights(torch.float64)
        for table, owners in enumerate(plan_.owners):
            if isinstance(bank, TableBank):
                shared = whole[bank.table(table)]
            else:
                shared = bank.blocks.split_rows(whole[table : table + 1])
            weights.update(dict.fromkeys(owners, shared))
    return weights
