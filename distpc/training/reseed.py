"""Dead states started again in the middle of a training, whatever the layout of its ranks."""

from __future__ import annotations

from distpc.circuits.circuit import Circuit
from distpc.circuits.transforms import reseed_states
from distpc.parallel.collectives import broadcast_object
from distpc.parallel.engine import Engine

RESEED_UNTIL = 0.8
"""Share of a training's samples after which states are left alone: new ones need to settle."""


def reseed_dead(engine: Engine, whole: Circuit, below: float, *, seed: int) -> int:
    """Start states that are hardly used again from parts of the most used ones; how many.

    Collective: every rank calls it. Rank 0 changes the whole circuit, and all ranks take their
    share of it.

    Args:
        engine: of the training.
        whole: on rank 0 a circuit that can hold whole parameters; the engine's own under ZeRO 0 to
            2 without a node axis.
        below: share of an even use, by the statistics, under which a state is dead.
        seed: of the noise that tells a state from the one that it is a part of.
    """
    state, number = engine.full_state(), 0
    if engine.mesh.is_main:
        if whole is not engine.module:
            whole.load_state_dict(state, assign=True)
        found = reseed_states(whole, below=below, seed=seed)
        state, number = found.circuit.state_dict(), found.number
    number = broadcast_object(number, engine.mesh)
    if number:
        engine.load_full_state(state)
    return number
