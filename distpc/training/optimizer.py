"""The optimizer of a circuit: a training rule for statistics, Adam for what follows gradients.

It is an optimizer because DeepSpeed wraps one. Online EM and Adam are element-wise, so that any
flat shard of a parameter can be updated alone, which is what every ZeRO stage does; the other rules
need whole parameters (ZeRO 0).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from distpc.errors import TrainingError
from distpc.training.rules.adam import adam_direction
from distpc.training.rules.base import Rule
from distpc.training.rules.online_em import OnlineEM, online_em_


class CircuitOptimizer(torch.optim.Optimizer):
    """Updates statistics by a rule, and parameters with gradients by Adam.

    The circuit's backward pass leaves `S.grad = -(mean flow of the batch)` in statistics and true
    gradients in the rest. `grad is None` means that the batch did not reach a parameter: a flow
    (or gradient) of zero.

    Gradients are clipped entry by entry, not by their norm: a norm over the shards of all ranks is
    out of an optimizer's reach, and DeepSpeed's own clipping would rescale flows as well.

    Args:
        groups: mapping from kind to parameters, as `parameter_groups()` of a circuit gives it:
            "em" holds statistics, "gradient" what follows gradients, "network" the parameters of
            networks that write a circuit's weights: Adam as well, unclipped, at the step size.
        step_size: of the rule, in (0, 1]; of networks the learning rate.
        rule: of the circuit that the parameters belong to; None is online EM, which needs none.
        gradient_learning_rate: of Adam, for the group "gradient".
        gradient_clip: largest entry of a gradient of that group.
    """

    def __init__(
        self,
        groups: Mapping[str, Sequence[Parameter]],
        *,
        step_size: float = 0.1,
        rule: Rule | None = None,
        gradient_learning_rate: float = 0.01,
        gradient_clip: float = 1.0,
    ) -> None:
        # "lr" is the name under which torch and DeepSpeed expect a group's rate.
        rates = {"em": step_size, "gradient": gradient_learning_rate, "network": step_size}
        unknown = set(groups) - set(rates)
        if unknown:
            raise ValueError(f"unknown kinds of parameters: {sorted(unknown)}")
        of_kinds = [
            {"params": list(groups[kind]), "kind": kind, "lr": rate}
            for kind, rate in rates.items()
            if groups.get(kind)
        ]
        super().__init__(of_kinds or [{"params": [], "kind": "em"}], {"lr": step_size})
        self.rule = rule
        self.gradient_clip = gradient_clip
        self._watching = False
        self._found_nonfinite = False
        self._updated: set[Tensor] = set()

    def set_step_size(self, step_size: float) -> None:
        """Set the step size of the rule, and of networks, for the steps to come; that of the group
        "gradient" stays."""
        for group in self.param_groups:
            if group["kind"] != "gradient":
                group["lr"] = step_size

    def watch(self) -> None:
        """Look for NaN and infinity in what the coming steps write, until `end_watch`.

        It is done inside the step because under ZeRO-3 that is when the shards are in reach.
        """
        self._watching = True
        self._found_nonfinite = False

    @torch.no_grad()
    def look(self) -> None:
        """Look at all parameters at once: for what others than `step` have written."""
        for group in self.param_groups:
            for parameter in group["params"]:
                self._watch(parameter)

    def end_watch(self) -> bool:
        """Stop looking; whether this rank's parameters or shards hold a NaN or an infinity."""
        self._watching = False
        return self._found_nonfinite

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Update every parameter (or shard) from its `.grad`; closures are not supported."""
        if closure is not None:
            raise ValueError("a step takes one pass over a batch: closures are not supported")
        if self.rule is not None:
            self.rule.begin_step()
        for group in self.param_groups:
            if group["kind"] == "em" and (self.rule is None or isinstance(self.rule, OnlineEM)):
                waiting = [p for p in group["params"] if p not in self._updated]
                online_em_(waiting, group["lr"])
                self._updated.update(waiting)
            for parameter in group["params"]:
                if parameter in self._updated:
                    self._watch(parameter)
                    continue
                if group["kind"] == "em":
                    self._update(parameter, group["lr"])
                elif parameter.grad is not None:
                    gradient = parameter.grad
                    if group["kind"] == "gradient":
                        gradient = gradient.clamp(-self.gradient_clip, self.gradient_clip)
                    direction = adam_direction(gradient, self.state[parameter])
                    parameter.add_(direction, alpha=-group["lr"])
                self._watch(parameter)
        self._updated.clear()

    def _watch(self, parameter: Parameter) -> None:
        if self._watching:
            # A sum is non-finite where one of its terms is, and needs no mask in memory.
            self._found_nonfinite |= not bool(torch.isfinite(parameter.sum()))

    @contextmanager
    def updates_in_backward(self) -> Iterator[None]:
        """Inside, statistics are updated during the backward pass, each parameter as soon as its
        flow is complete, and the flow is freed at once; `step` does the rest.

        That saves the memory of the gradients: one copy of S and the flow of one bank, instead of
        two copies. The result is that of the update in `step`, provided that there is one backward
        pass a step; what a pass should not have learnt from can no longer be dropped after it.

        Raises:
            TrainingError: the rule needs whole circuits at its step, or all of the data.
        """
        if self.rule is not None and not isinstance(self.rule, OnlineEM):
            raise TrainingError(
                "statistics cannot be updated in the backward pass by this rule",
                where="update_in_backward",
                found=self.rule.name,
                expected="online_em",
                fix="leave update_in_backward off, or train by online EM",
            )
        groups = [group for group in self.param_groups if group["kind"] == "em"]
        handles = [
            parameter.register_post_accumulate_grad_hook(lambda p, g=group: self._update_now(p, g))
            for group in groups
            for parameter in group["params"]
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
            self._updated.clear()

    @torch.no_grad()
    def _update_now(self, parameter: Parameter, group: dict[str, Any]) -> None:
        self._update(parameter, group["lr"])
        parameter.grad = None
        self._updated.add(parameter)

    def _update(self, parameter: Parameter, step_size: float) -> None:
        if self.rule is None:
            online_em_([parameter], step_size)
        else:
            state = self.state[parameter] if self.rule.keeps_state else {}
            self.rule.update(parameter, state, step_size)
