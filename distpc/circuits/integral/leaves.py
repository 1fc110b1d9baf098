"""From a network's outputs to the statistics of input units, and from flows back to gradients.

A bank's backward pass hands over flows, not gradients (see `statistics`): the flow of an entry is
its read-out weight times the derivative of log p by that weight. What the network needs is the
derivative by its own outputs.

Legend: T tables, O outputs, C categories, K units.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from distpc.errors import StructureError


class LeafWriter(ABC):
    """One family of inputs."""

    def num_outputs(self, size: int) -> int:
        """O, for C categories."""
        return size

    @abstractmethod
    def write(self, outputs: Tensor) -> Tensor:
        """Outputs (T, O, K) -> statistics (T, rows, K) of one use a unit."""

    @abstractmethod
    def pull_back(self, statistics: Tensor, flow: Tensor, size: int, floor: float) -> Tensor:
        """Flows (T, rows, K) of statistics that were written -> gradients (T, O, K) of outputs.

        Args:
            statistics: as `write` gave them.
            flow: of these.
            size: C.
            floor: the share of a uniform distribution that the read-out adds, see `set_smoothing`.
        """

    def start_near(self, shares: Tensor, bias: Tensor) -> None:
        """Set a head's bias (O,) so that units start at the shares (C,) of categories."""
        return None


class CategoricalLeaf(LeafWriter):
    """Softmax over the categories."""

    def write(self, outputs: Tensor) -> Tensor:
        return torch.softmax(outputs, dim=1)

    def pull_back(self, statistics: Tensor, flow: Tensor, size: int, floor: float) -> Tensor:
        # The read-out is (S + e) / (1 + floor): a flow F is a derivative F / (S + e) by S.
        of_softmax = flow * (statistics / (statistics + floor / size))
        return of_softmax - statistics * of_softmax.sum(1, keepdim=True)

    def start_near(self, shares: Tensor, bias: Tensor) -> None:
        bias.copy_(shares.log().to(bias))


class BinomialLeaf(LeafWriter):
    """The log-odds of success in C - 1 trials; statistics are the shares of both outcomes."""

    def num_outputs(self, size: int) -> int:
        return 1

    def write(self, outputs: Tensor) -> Tensor:
        return torch.cat([torch.sigmoid(-outputs), torch.sigmoid(outputs)], dim=1)

    def pull_back(self, statistics: Tensor, flow: Tensor, size: int, floor: float) -> Tensor:
        failed, succeeded = statistics.unbind(1)
        of_failed, of_succeeded = (flow * (statistics / (statistics + floor / 2.0))).unbind(1)
        # Flows are per trial.
        return (size - 1) * (failed * of_succeeded - succeeded * of_failed).unsqueeze(1)

    def start_near(self, shares: Tensor, bias: Tensor) -> None:
        success = torch.linspace(0.0, 1.0, len(shares)).to(shares) @ shares
        bias.copy_(torch.logit(success, eps=1e-3).to(bias))


class LogisticLeaf(LeafWriter):
    """Mean and log-scale, which follow gradients in the bank itself."""

    def num_outputs(self, size: int) -> int:
        return 2

    def write(self, outputs: Tensor) -> Tensor:
        return outputs

    def pull_back(self, statistics: Tensor, flow: Tensor, size: int, floor: float) -> Tensor:
        return flow


LEAF_WRITERS: dict[str, LeafWriter] = {
    "categorical": CategoricalLeaf(),
    "binomial": BinomialLeaf(),
    "logistic": LogisticLeaf(),
}


def leaf_writer(kind: str) -> LeafWriter:
    """The writer of a family.

    Raises:
        StructureError: a family whose units no network writes.
    """
    if kind not in LEAF_WRITERS:
        raise StructureError(
            "no network writes these inputs",
            where="family of an input region",
            found=kind,
            expected=", ".join(LEAF_WRITERS),
            fix="choose another family (structures.with_family), or train without networks",
        )
    return LEAF_WRITERS[kind]
