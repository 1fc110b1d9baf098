"""The optimizer of a circuit's statistics: online EM.

It is an optimizer because DeepSpeed wraps one; its rule is element-wise, so that any flat shard of
a parameter can be updated alone, which is what every ZeRO stage does.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from distpc.errors import TrainingError


class CircuitOptimizer(torch.optim.Optimizer):
    """Online EM for statistics.

    A parameter S holds running means of expected flows per sample. The circuit's backward pass
    leaves `S.grad = -(mean flow of the batch)`, so that

        S <- (1 - step) * S + step * flow  =  (1 - step) * S - step * S.grad

    is the stochastic-approximation E-step of online EM (O. Cappe and E. Moulines, "On-line
    expectation-maximization algorithm for latent data models", J. R. Statist. Soc. B 71, 2009).
    The M-step is the row normalisation that the circuit does when it reads S. `grad is None` means
    that the batch did not reach S, which is a flow of zero. There is no optimizer state.

    Args:
        groups: mapping from kind to parameters, as `parameter_groups()` of a circuit gives it:
            "em" holds statistics, "gradient" has to be empty.
        step_size: in (0, 1].

    Raises:
        TrainingError: there are parameters that online EM cannot train.
    """

    def __init__(
        self,
        groups: Mapping[str, Sequence[torch.nn.Parameter]],
        *,
        step_size: float = 0.1,
    ) -> None:
        unknown = set(groups) - {"em", "gradient"}
        if unknown:
            raise ValueError(f"unknown kinds of parameters: {sorted(unknown)}")
        others = groups.get("gradient", ())
        if others:
            raise TrainingError(
                "a circuit has parameters that online EM cannot train",
                found=f"{len(others)} parameters that follow gradients",
                expected="statistics alone",
                fix="build the circuit from categorical or Gaussian inputs",
            )
        # "lr" is the name under which torch and DeepSpeed expect a group's rate.
        super().__init__(list(groups.get("em", ())), {"lr": step_size})
        self._watching = False
        self._found_nonfinite = False

    def set_step_size(self, step_size: float) -> None:
        """Set the step of online EM for the steps to come."""
        for group in self.param_groups:
            group["lr"] = step_size

    def watch(self) -> None:
        """Look for NaN and infinity in what the coming steps write, until `end_watch`.

        It is done inside the step because under ZeRO-3 that is when the shards are in reach.
        """
        self._watching = True
        self._found_nonfinite = False

    def end_watch(self) -> bool:
        """Stop looking; whether this rank's parameters or shards hold a NaN or an infinity."""
        self._watching = False
        return self._found_nonfinite

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Update every parameter (or shard) from its `.grad`; closures are not supported."""
        if closure is not None:
            raise ValueError("online EM takes one pass over a batch: closures are not supported")
        for group in self.param_groups:
            for parameter in group["params"]:
                _online_em(parameter, group["lr"])
                if self._watching:
                    # A sum is non-finite where one of its terms is, and needs no mask in memory.
                    self._found_nonfinite |= not bool(torch.isfinite(parameter.sum()))


def _online_em(statistics: Tensor, step_size: float) -> None:
    statistics.mul_(1.0 - step_size)
    if statistics.grad is not None:
        statistics.add_(statistics.grad, alpha=-step_size)
