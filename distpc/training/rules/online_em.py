"""Online EM, the rule of every ZeRO stage."""

from __future__ import annotations

from typing import Any

from torch.nn import Parameter

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

    def start(self) -> None:
        # Not `convert_`: weights that are zero before training must not stay zero in the first
        # validation. See there for going on with a trained circuit exactly as it is.
        self.circuit.set_smoothing(*self.smoothing)

    def finish(self) -> None:
        """Nothing: the statistics are running means of flows."""

    def update(self, statistics: Parameter, state: dict[str, Any], step_size: float) -> None:
        online_em_(statistics, step_size)


def online_em_(statistics: Parameter, step_size: float) -> None:
    """The update alone, of any flat piece of S from its `.grad`; None is a flow of zero."""
    statistics.mul_(1.0 - step_size)
    if statistics.grad is not None:
        statistics.add_(statistics.grad, alpha=-step_size)
