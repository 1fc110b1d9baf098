"""Steps of input regions: look-ups of tables over categories, densities of real variables."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from distpc.circuits.evidence import Evidence
from distpc.circuits.gaussian import GaussianBank, ScaleLogsFunction
from distpc.circuits.indicator import IndicatorBank, weighted
from distpc.circuits.inputs import TableBank
from distpc.circuits.schedule import BankPlan, Fanout, InputPlan
from distpc.circuits.step import Message, Step
from distpc.errors import EvidenceError


class TableStep(Step):
    """Inputs over categories, or products of categorical ones."""

    variables: Tensor
    offsets: Tensor

    def __init__(
        self, plan: InputPlan, fanout: Fanout, bank: BankPlan, variables: Sequence[int]
    ) -> None:
        super().__init__(plan, fanout)
        table_of = {owner: t for t, owners in enumerate(bank.owners) for owner in owners}
        starts = [sum(bank.sizes[:table]) for table in range(len(bank.sizes))]
        self.bank = plan.bank
        self.bags = plan.bags
        self.num_rows = sum(bank.sizes)
        self.tables = tuple(tuple(table_of[child] for child in bag) for bag in plan.bags)
        offsets = [[starts[table] for table in tables] for tables in self.tables]
        self.register_buffer("offsets", torch.tensor(offsets), persistent=False)
        bag_variables = [[variables[child] for child in bag] for bag in plan.bags]
        self.register_buffer("variables", torch.tensor(bag_variables), persistent=False)

    def run(
        self,
        bank: nn.Module | None,
        requests: list[list[Message]],
        evidence: Evidence,
        units: range,
        in_logs: bool,
    ) -> Message:
        assert isinstance(bank, TableBank)
        if evidence.likelihoods is not None:
            if not isinstance(bank, IndicatorBank):
                raise EvidenceError(
                    "soft evidence is read by indicator inputs alone",
                    found=type(bank).__name__,
                    fix="make the inputs of these variables indicators",
                )
            logs = evidence.likelihoods[self.variables[:, 0]]
            # As banks give it: the scale still in one tensor, see `seal`.
            made: Any = weighted(logs, evidence.mask(self.latents, units), in_logs)
            return Message(*made)
        codes = evidence.codes[self.variables]
        index = torch.where(codes < 0, self.num_rows, codes + self.offsets.unsqueeze(-1))
        mask = evidence.mask(self.latents, units)
        return Message(*bank(index.mT.contiguous(), mask, in_logs))


class RealStep(Step):
    """Inputs over real values."""

    variables: Tensor
    tables: Tensor

    def __init__(
        self, plan: InputPlan, fanout: Fanout, bank: BankPlan, variables: Sequence[int]
    ) -> None:
        super().__init__(plan, fanout)
        table_of = {owner: t for t, owners in enumerate(bank.owners) for owner in owners}
        self.bank = plan.bank
        self.bags = plan.bags
        rows = [bag[0] for bag in plan.bags]
        self.register_buffer(
            "tables", torch.tensor([table_of[row] for row in rows]), persistent=False
        )
        self.register_buffer(
            "variables", torch.tensor([variables[row] for row in rows]), persistent=False
        )

    def run(
        self,
        bank: nn.Module | None,
        requests: list[list[Message]],
        evidence: Evidence,
        units: range,
        in_logs: bool,
    ) -> Message:
        assert isinstance(bank, GaussianBank) and evidence.reals is not None
        centre = bank.centre[self.tables].unsqueeze(1)
        spread = bank.spread[self.tables].unsqueeze(1)
        z = (evidence.reals[self.variables] - centre) / spread
        logs = bank(z, self.tables, in_logs, evidence.mask(self.latents, units))
        return Message(logs, None) if in_logs else Message(*ScaleLogsFunction.apply(logs))
