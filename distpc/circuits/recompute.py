"""Messages that are computed again in the backward pass instead of being kept for it.

The steps of a schedule are cut into stretches. What passes from one stretch to another is kept;
what only its own steps read is dropped after the forward pass, and computed again when the backward
pass comes to the stretch. On a node axis that repeats its exchanges.

A stretch is computed again as a whole, and hands out flows of the parameters that it reads, so that
autograd adds up those of several stretches before anyone sees them: ZeRO 1 and 2 take what arrives
at a parameter for all of it. torch's recomputation with re-entry lets it arrive stretch by stretch,
and learns nothing from integers alone, which are all that the first stretch is given. Under ZeRO 3
parameters are empty by the time that those flows arrive: it is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from distpc.circuits.step import Message, Place, Stretch

Run = Callable[[dict[Place, Message]], Stretch]


def again_in_backward(
    run: Run, arrived: dict[Place, Message], parameters: Sequence[Tensor]
) -> Stretch:
    """What a stretch makes of the messages that arrive at it, which are all that is kept.

    Args:
        run: evaluates the stretch, alike whenever it is called.
        arrived: messages from earlier stretches.
        parameters: that it reads.
    """
    made: list[Stretch] = []
    values = [message.values for message in arrived.values()]
    out = StretchFunction.apply(run, arrived, made, len(values), *values, *parameters)
    return _with_values(made.pop(), out)


class StretchFunction(torch.autograd.Function):
    """Values of the messages that arrive -> values of the messages that are sent, then the root's.

    The rest of what a stretch makes, which no gradient goes through, is put into a list.
    """

    @staticmethod
    def forward(
        ctx: Any,
        run: Run,
        arrived: dict[Place, Message],
        made: list[Stretch],
        num_values: int,
        *read: Tensor,
    ) -> tuple[Tensor, ...]:
        ctx.run = run
        ctx.others = {place: (m.scale, m.is_weak) for place, m in arrived.items()}
        ctx.num_values = num_values
        ctx.save_for_backward(*read)
        ctx.set_materialize_grads(False)
        made.append(run(arrived))
        return tuple(tensor.detach() for tensor in _values(made[0]))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *flows: Tensor | None) -> tuple[Tensor | None, ...]:
        read = ctx.saved_tensors
        values = [tensor.detach().requires_grad_() for tensor in read[: ctx.num_values]]
        with torch.enable_grad():
            arrived = {
                place: Message(tensor, *others)
                for (place, others), tensor in zip(ctx.others.items(), values, strict=True)
            }
            out = _values(ctx.run(arrived))
        reached = [
            (tensor, flow)
            for tensor, flow in zip(out, flows, strict=True)
            if flow is not None and tensor.requires_grad
        ]
        passed = torch.autograd.grad(
            [tensor for tensor, _ in reached],
            [*values, *read[ctx.num_values :]],
            [flow for _, flow in reached],
            allow_unused=True,
        )
        return None, None, None, None, *passed


def _values(made: Stretch) -> list[Tensor]:
    """Of the messages that are sent, then of the root's."""
    messages = [*made.sent.values(), *([] if made.root is None else [made.root])]
    return [message.values for message in messages]


def _with_values(made: Stretch, values: tuple[Tensor, ...]) -> Stretch:
    """The same with other values."""
    sent = {
        place: message._replace(values=tensor)
        for (place, message), tensor in zip(made.sent.items(), values, strict=False)
    }
    root = None if made.root is None else made.root._replace(values=values[-1])
    return made._replace(sent=sent, root=root)
