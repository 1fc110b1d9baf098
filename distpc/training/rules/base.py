"""What a training rule is: a map (statistics S, mean flow F, own state) -> S.

S and F are laid out as a bank keeps them, so that a rule knows no families: `bank.totals` finds the
uses of an entry's row, `bank.pseudo_samples` what a pseudocount adds to it. That covers inputs with
moments: a row of a Gaussian unit is (uses, sum of z, sum of z^2), and divided by its uses it holds
the moments that EM averages.

**Flow scale.** F is a mean per sample, so a row of F sums to how often a sample uses its unit: 1 at
the root, below 1 elsewhere, up to T where a table is tied over T regions. A tied row is one row,
whose flow and whose expected uses are sums over its regions.

**Pseudocounts** are in samples of the training set, whatever the rule: `pseudocount` samples in N
are q = pseudocount / N uses per sample, spread evenly over a row. (`papers.md` C.3 writes the
pseudocount pc in the unit of the flows of each rule; each class says what its pc is here.)
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor
from torch.nn import Parameter

from distpc.circuits.bank import Bank
from distpc.circuits.circuit import Circuit
from distpc.circuits.sums import SumBank


class Smoothing(NamedTuple):
    """Pseudocounts in samples of the training set.

    Attributes:
        pseudocount: of a sum row.
        leaf_pseudocount: of an input unit.
        num_samples: N of the training set.
    """

    pseudocount: float
    leaf_pseudocount: float
    num_samples: int

    def uses_of(self, bank: Bank) -> float:
        """q: pseudo-uses per sample of each row of a bank."""
        count = self.pseudocount if isinstance(bank, SumBank) else self.leaf_pseudocount
        return count / self.num_samples


class Rule(ABC):
    """Base of the rules.

    Args:
        circuit: what is trained.
        smoothing: see the class of the rule for where it acts.

    Attributes:
        name: in configurations.
        needs_whole_rows: whether it reads row sums, so that sharded parameters are out of reach.
        settle_every: steps on shards after which whole rows are given to `settle`; 0: never.
        needs_whole_circuit: whether it asks the circuit for the uses of its rows at a step.
        needs_all_data: whether one step takes the flows of the whole data set.
        keeps_state: whether it keeps tensors of its own beside S.
        keeps_statistics: whether it starts and ends with statistics as they are, so that nobody
            needs the whole circuit for it.
    """

    name: ClassVar[str]
    needs_whole_rows: bool = True
    settle_every: ClassVar[int] = 0
    needs_whole_circuit: ClassVar[bool] = False
    needs_all_data: ClassVar[bool] = False
    keeps_state: ClassVar[bool] = False
    keeps_statistics: ClassVar[bool] = False

    def __init__(self, circuit: Circuit, smoothing: Smoothing) -> None:
        self.circuit = circuit
        self.smoothing = smoothing
        self.banks: dict[Tensor, Bank] = {bank.statistics: bank for bank in em_banks(circuit)}

    def start(self) -> None:
        """Bring the circuit's statistics and read-out to where the rule wants them; the model
        stays what it is. Call once, before training."""
        from distpc.training.rules.convert import convert_

        # Rules on whole rows smooth in their update, so weights are read out as they are.
        convert_(self.circuit, Smoothing(0.0, 0.0, self.smoothing.num_samples))

    def resume(self) -> None:
        """Set the read-out alone, for statistics that this rule has left."""
        self.circuit.set_smoothing(0.0, 0.0, self.smoothing.num_samples)

    def finish(self) -> None:
        """Leave statistics on the flow scale, for whichever rule comes next; the model stays."""
        self.circuit.rescale_to_uses_()

    def work_on_shards(self) -> None:
        """Expect flat shards of parameters in `update` from now on; call once, for the circuit's
        present parameters."""
        return None

    def settle(self, statistics: Tensor) -> None:
        """Bring a parameter with whole rows to the scale that the rule likes, in place; the model
        stays what it is."""
        return None

    def begin_step(self) -> None:
        """What is done once a step, before the parameters are updated one by one."""
        return None

    @abstractmethod
    def update(self, statistics: Parameter, state: dict[str, Any], step_size: float) -> None:
        """Update one parameter in place.

        Args:
            statistics: S; its `.grad` is minus the mean flow, None for a flow of zero.
            state: the rule's own tensors of this parameter, empty at the first step.
            step_size: of this step.
        """

    def prior(self, bank: Bank) -> Tensor:
        """Statistics of the pseudo-uses of each row; broadcasts against the bank's."""
        return bank.pseudo_samples(self.smoothing.uses_of(bank)).to(bank.statistics)


def em_banks(circuit: Circuit) -> list[Bank]:
    """The banks whose parameters are statistics."""
    return [
        bank
        for bank in circuit.bank_list
        if bank.learns_by == "em" and isinstance(bank.statistics, Parameter)
    ]


def mean_flow(statistics: Parameter) -> Tensor:
    """F, a new tensor."""
    gradient = statistics.grad
    return torch.zeros_like(statistics) if gradient is None else -gradient


def normalised(bank: Bank, statistics: Tensor) -> Tensor:
    """Statistics of one use a row: weights, or moments; rows without uses stay zero."""
    total = bank.totals(statistics)
    return statistics / torch.where(total > 0, total, 1.0)
