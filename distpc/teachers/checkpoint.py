"""Checkpoints of teacher training: one file each, complete or absent."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from distpc.artifacts.tensors import read_tensors, write_tensors
from distpc.data.plan import LoaderState
from distpc.errors import TeacherError

_MOMENTS = ("exp_avg", "exp_avg_sq")
_START_AGAIN = "remove the file: training starts again from its beginning"


@dataclass(frozen=True)
class TrainingState:
    """Where training stands, beside weights and moments; nothing in it depends on the ranks.

    Attributes:
        step: optimizer steps taken; the seeds of masks follow from it.
        loader: samples read.
        seconds: of training so far, over all attempts.
    """

    step: int = 0
    loader: LoaderState = field(default_factory=LoaderState)
    seconds: float = 0.0


def checkpoint_path(out: Path) -> Path:
    """Where the training of the teacher in folder `out` keeps its checkpoint."""
    return out / "checkpoints" / "latest.safetensors"


def save_checkpoint(
    path: Path,
    model: nn.Module,
    optimizer: torch.optim.AdamW,
    state: TrainingState,
    fingerprint: str,
) -> None:
    """Write weights, AdamW's moments and the state to `path`, in place of what was there.

    The state travels in the header of the tensors' file: two files could be of different steps.

    Raises:
        ResourceError: the disk is full.
    """
    tensors: dict[str, Tensor] = {}
    for name, weight in model.state_dict(keep_vars=True).items():
        tensors[f"weight/{name}"] = weight
        if weight.requires_grad:
            for moment in _MOMENTS:
                tensors[f"{moment}/{name}"] = optimizer.state[weight][moment]
    write_tensors(path, tensors, {"state": asdict(state), "fingerprint": fingerprint})


def load_checkpoint(
    path: Path, model: nn.Module, optimizer: torch.optim.AdamW, fingerprint: str
) -> TrainingState:
    """Put weights and moments of the checkpoint at `path` into model and optimizer.

    Returns:
        The state to go on from; that of a fresh start where there is no checkpoint, or one of
        another configuration.

    Raises:
        TeacherError: the file is damaged or does not fit the model.
    """
    if not path.is_file():
        return TrainingState()
    tensors, header = read_tensors(
        path, holds="teacher training", error=TeacherError, fix=_START_AGAIN
    )
    try:
        if header["fingerprint"] != fingerprint:
            return TrainingState()
        state = header["state"]
        _restore(model, optimizer, tensors, int(state["step"]))
        loader = LoaderState.from_json(state["loader"])
        return TrainingState(int(state["step"]), loader, float(state["seconds"]))
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise TeacherError(
            "a checkpoint of teacher training is damaged",
            where=path,
            found=str(error) or repr(error),
            expected="weights and moments of the configured teacher",
            fix=_START_AGAIN,
        ) from error


def _restore(
    model: nn.Module, optimizer: torch.optim.AdamW, tensors: dict[str, Tensor], step: int
) -> None:
    with torch.no_grad():
        for name, weight in model.state_dict(keep_vars=True).items():
            weight.copy_(tensors[f"weight/{name}"])
            if not weight.requires_grad:
                continue
            moments: dict[str, Any] = {
                moment: torch.empty_like(weight).copy_(tensors[f"{moment}/{name}"])
                for moment in _MOMENTS
            }
            optimizer.state[weight] = {"step": torch.tensor(float(step)), **moments}
