"""Online EM, the rule of every ZeRO stage."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch.nn import Parameter
from torch.optim.sgd import sgd

from distpc.training.rules.base import Rule


class OnlineEM(Rule):
    """S <- (1 - step) * S + step * F  =  (1 - step) * S - step * S.grad.

    The stochastic-approximation E-step of online EM (O. Cappe and E. Moulines, "On-line
    expectation-maximization algorithm for latent data models", J. R. Statist. Soc. B 71, 2009);
    the M-step is the row normalisation that the circuit does when it reads S. Element-wise, so any
    flat shard of S can be updated alone, and without state.

    **Smoothing** stays out of S: the circuit adds q to a row when it reads weights out.
    """

    name = "online_em"
    needs_whole_rows = False
    keeps_statistics = True

    def start(self) -> None:
        # Not `convert_`: weights that are zero before training must not stay zero in the first
        # validation. See there for going on with a trained circuit exactly as it is.
        self.resume()

    def resume(self) -> None:
        self.circuit.set_smoothing(*self.smoothing)

    def finish(self) -> None:
        """Nothing: the statistics are running means of flows."""

    def update(self, statistics: Parameter, state: dict[str, Any], step_size: float) -> None:
        online_em_([statistics], step_size)


def online_em_(statistics: Sequence[Parameter], step_size: float) -> None:
    """The update alone, of any flat pieces of S from their `.grad`; None is a flow of zero.

    It is gradient descent with weight decay 1, for which torch has one kernel.
    """
    flows = [piece.grad for piece in statistics if piece.grad is not None]
    reached = [piece for piece in statistics if piece.grad is not None]
    for piece in statistics:
        if piece.grad is None:
            piece.mul_(1.0 - step_size)
    if reached:
        sgd(
            reached,  # type: ignore[arg-type]
            flows,
            [None] * len(reached),
            fused=True,
            lr=step_size,
            weight_decay=1.0,
            momentum=0.0,
            dampening=0.0,
            nesterov=False,
            maximize=False,
        )
