"""One optimizer for a circuit's two kinds of parameters: statistics by online EM, others by Adam.

It is one object because DeepSpeed wraps one; both rules are element-wise, so that any flat shard
of a parameter can be updated alone, which is what every ZeRO stage does.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor


class CircuitOptimizer(torch.optim.Optimizer):
    """Online EM for statistics, Adam for parameters that follow gradients.

    **Group kind "em".** A parameter S holds running means of expected flows per sample. The
    circuit's backward pass leaves `S.grad = -(mean flow of the batch)`, so that

        S <- (1 - step) * S + step * flow  =  (1 - step) * S - step * S.grad

    is the stochastic-approximation E-step of online EM (O. Cappe and E. Moulines, "On-line
    expectation-maximization algorithm for latent data models", J. R. Statist. Soc. B 71, 2009).
    The M-step is the row normalisation that the circuit does when it reads S. `grad is None` means
    that the batch did not reach S, which is a flow of zero. There is no optimizer state.

    **Group kind "adam".** Kingma and Ba, "Adam", ICLR 2015, with bias correction and without
    weight decay. Two moments of the parameter's (or shard's) shape.

    Args:
        groups: mapping from kind ("em", "gradient") to parameters, as `parameter_groups()` of a
            circuit gives it; empty kinds are left out.
        step_size: of online EM, in (0, 1].
        learning_rate: of Adam.
        betas, epsilon: Adam's decay rates of the moments and the denominator's guard.
    """

    def __init__(
        self,
        groups: Mapping[str, Sequence[torch.nn.Parameter]],
        *,
        step_size: float = 0.1,
        learning_rate: float = 0.01,
        betas: tuple[float, float] = (0.9, 0.999),
        epsilon: float = 1e-8,
    ) -> None:
        unknown = set(groups) - {"em", "gradient"}
        if unknown:
            raise ValueError(f"unknown kinds of parameters: {sorted(unknown)}")
        # "lr" is the name under which torch and DeepSpeed expect a group's rate.
        options: dict[str, dict[str, Any]] = {
            "em": {"kind": "em", "lr": step_size},
            "gradient": {"kind": "adam", "lr": learning_rate},
        }
        super().__init__(
            [{"params": list(groups[kind]), **options[kind]} for kind in groups if groups[kind]],
            {"betas": betas, "epsilon": epsilon},
        )
        self._watching = False
        self._found_nonfinite = False
        self._restored: list[dict[str, Tensor]] = []

    def set_step_size(self, step_size: float) -> None:
        """Set the step of online EM for the steps to come."""
        for group in self.param_groups:
            if group["kind"] == "em":
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
                if group["kind"] == "em":
                    _online_em(parameter, group["lr"])
                elif parameter.grad is not None:
                    self._adam(parameter, group)
                if self._watching:
                    # A sum is non-finite where one of its terms is, and needs no mask in memory.
                    self._found_nonfinite |= not bool(torch.isfinite(parameter.sum()))

    def moments(self) -> list[dict[str, Tensor]]:
        """Adam's state on this rank, in a fixed order; empty where there are only statistics."""
        return [dict(values) for values in self.state.values() if "first" in values]

    def restore_moments(self, moments: Iterable[Mapping[str, Tensor]]) -> None:
        """Hand back what `moments()` gave in another process with the same ranks and stage."""
        self._restored = [dict(values) for values in moments]

    def _adam(self, parameter: Tensor, group: dict[str, Any]) -> None:
        state = self.state[parameter]
        if not state:
            state.update(self._fresh_moments(parameter))
        gradient = parameter.grad
        assert gradient is not None
        first_decay, second_decay = group["betas"]
        state["steps"] += 1
        steps = float(state["steps"])
        state["first"].lerp_(gradient, 1 - first_decay)
        state["second"].mul_(second_decay).addcmul_(gradient, gradient, value=1 - second_decay)
        spread = (state["second"] / (1 - second_decay**steps)).sqrt_().add_(group["epsilon"])
        parameter.addcdiv_(state["first"], spread, value=-group["lr"] / (1 - first_decay**steps))

    def _fresh_moments(self, parameter: Tensor) -> dict[str, Tensor]:
        if self._restored:
            # Parameters come in the same order in every process, so the next one is this one's.
            values = self._restored.pop(0)
            if values["first"].shape != parameter.shape:
                raise ValueError("the moments handed back are of another layout")
            return {name: value.to(parameter.device) for name, value in values.items()}
        return {
            "steps": torch.zeros(()),
            "first": torch.zeros_like(parameter),
            "second": torch.zeros_like(parameter),
        }


def _online_em(statistics: Tensor, step_size: float) -> None:
    statistics.mul_(1.0 - step_size)
    if statistics.grad is not None:
        statistics.add_(statistics.grad, alpha=-step_size)
