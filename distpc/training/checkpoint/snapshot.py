"""Between an engine in training and the element ranges of a checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from distpc.errors import ArtifactError
from distpc.parallel.engine import Engine
from distpc.parallel.places import Place
from distpc.training.checkpoint.folder import Checkpoint
from distpc.training.checkpoint.shard import SLOT, Piece

_OTHER_CIRCUIT = "remove the stage's folder, or choose another --out"


def take_snapshot(engine: Engine) -> list[Piece]:
    """This rank's share of parameters, buffers and optimizer tensors, copied to the CPU.

    Over all ranks each element occurs once, under every ZeRO stage; no rank sees the whole.
    """
    pieces = []
    for place in engine.places(owned=True):
        values = _copy(place.values)
        pieces.append(Piece(place.name, place.shape, place.start, values, place.split))
        for slot, tensor in _state(engine, place).items():
            key = f"{place.name}{SLOT}{slot}"
            if tensor.dim():
                values = _copy(_elements(tensor, place))
                pieces.append(Piece(key, place.shape, place.start, values, place.split))
            elif place.start == 0:
                # Counts belong to a parameter as a whole: the owner of its first element has them.
                pieces.append(Piece(key, (), 0, _copy(tensor.reshape(1))))
    return pieces


def load_optimizer(engine: Engine, checkpoint: Checkpoint) -> None:
    """Give the optimizer back what it kept, each rank the elements that it holds now.

    Raises:
        ArtifactError: it is the state of other parameters, or cannot be read.
    """
    for place in engine.places(owned=False):
        for slot, shape in checkpoint.slots.get(place.name, {}).items():
            key = f"{place.name}{SLOT}{slot}"
            if place.holder is None or shape not in ((), place.shape):
                raise ArtifactError(
                    "a checkpoint's optimizer state belongs to another circuit",
                    where=f"{checkpoint.path}, '{key}'",
                    found=f"shape {shape}",
                    expected="nothing" if place.holder is None else f"shape {place.shape}",
                    fix=_OTHER_CIRCUIT,
                )
            state = engine.optimizer.state[place.holder]
            if shape:
                stop = place.start + len(place.values)
                values = checkpoint.read(key, place.start, stop, place.split)
                if slot not in state:
                    state[slot] = torch.zeros_like(place.holder, dtype=values.dtype)
                _elements(state[slot], place).copy_(values)
            else:
                _set_count(checkpoint, key, slot, state)


def check_shapes(
    where: Path,
    found: Mapping[str, tuple[int, ...]],
    expected: Mapping[str, tuple[int, ...]],
) -> None:
    """Refuse parameters of other names or shapes than a circuit's.

    Raises:
        ArtifactError: naming the first parameter that differs and both shapes.
    """
    for name in sorted({*found, *expected}):
        theirs, ours = found.get(name), expected.get(name)
        if theirs != ours:
            raise ArtifactError(
                f"a checkpoint belongs to another circuit: parameter '{name}' differs",
                where=where,
                found="no such parameter" if theirs is None else f"shape {theirs}",
                expected="no such parameter" if ours is None else f"shape {ours}",
                fix=_OTHER_CIRCUIT,
            )


def _set_count(checkpoint: Checkpoint, key: str, slot: str, state: dict[str, Tensor]) -> None:
    """A number of a parameter as a whole; parameters that ZeRO updates together share it."""
    value = checkpoint.whole(key, ())
    if slot in state and not torch.equal(state[slot], value):
        raise ArtifactError(
            "parameters that ZeRO updates together stand at different steps in a checkpoint",
            where=f"{checkpoint.path}, '{key}'",
            found=value.item(),
            expected=state[slot].item(),
            fix="go on under the ZeRO stage that it was saved under",
        )
    state[slot] = value.clone()


def _state(engine: Engine, place: Place) -> dict[str, Tensor]:
    return {} if place.holder is None else engine.optimizer.state.get(place.holder, {})


def _elements(tensor: Tensor, place: Place) -> Tensor:
    """The elements of a place in a tensor that the optimizer keeps beside the place's holder."""
    return tensor.view(-1).narrow(0, place.offset, len(place.values))


def _copy(values: Tensor) -> Tensor:
    return values.detach().to("cpu", copy=True)
