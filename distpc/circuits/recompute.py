"""Messages that are computed again in the backward pass instead of being kept for it.

The steps of a schedule are cut into stretches. What passes from one stretch to another is kept;
what only its own steps read is dropped after the forward pass, and computed again when the backward
pass comes to the stretch. On a node axis that repeats its exchanges, and under ZeRO 3 its gathering
of parameters.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop

Made = TypeVar("Made")


def again_in_backward(run: Callable[..., Made], *arguments: object) -> Made:
    """What `run` makes of the arguments; of its inner tensors none is kept for the backward pass.

    Not the reentrant kind of recomputation: given integers only, as the first stretch is, that
    kind warns once and its parameters learn nothing.
    """
    # Stopping half-way through a module would leave out its hooks, by which ZeRO 3 lets go of
    # parameters.
    with set_checkpoint_early_stop(False):
        return checkpoint(run, *arguments, use_reentrant=False, preserve_rng_state=False)
