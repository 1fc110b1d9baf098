"""What is left of a training that has to stop: the best model so far, out of the stage's way."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from distpc.circuits.fill import fill_
from distpc.circuits.integral.circuit import IntegralCircuit
from distpc.circuits.io import save_model
from distpc.data.spec import DatasetSpec
from distpc.errors import DistpcError, TrainingError
from distpc.parallel.collectives import broadcast_object
from distpc.parallel.mesh import Mesh
from distpc.training.checkpoint import Checkpoints
from distpc.training.integral import Model, load_saved, save_both

LAST_GOOD = "last_good_model"
"""Folder beside the stage's own, which is emptied as soon as a setting changes."""


def with_last_good(
    error: TrainingError,
    checkpoints: Checkpoints,
    model: Model,
    spec: DatasetSpec,
    folder: Path,
    mesh: Mesh,
) -> TrainingError:
    """Save the best model so far, and say so in the error; a collective of all ranks.

    Args:
        error: why training stops; every rank has it.
        checkpoints: of the training.
        model: whole, without values; networks get those of the best model.
        spec: of the data.
        folder: of the model; an older one is replaced.
        mesh: this process among the ranks.

    Returns:
        the same error whose `fix` names the folder, or why nothing could be saved.
    """
    kept: str | None = None
    if mesh.is_main:
        try:
            kept = _save(error, checkpoints, model, spec, folder)
        except (DistpcError, OSError) as reason:
            # Why training stopped matters more than why its model cannot be saved.
            kept = f"the best model so far could not be saved: {reason}"
    # Ranks that raised before rank 0 is done would have it ended in the middle of its files.
    kept = broadcast_object(kept, mesh)
    fix = "; ".join(text for text in (error.fix, kept) if text)
    return TrainingError(
        error.what, where=error.where, found=error.found, expected=error.expected, fix=fix or None
    )


def _save(
    error: TrainingError,
    checkpoints: Checkpoints,
    model: Model,
    spec: DatasetSpec,
    folder: Path,
) -> str | None:
    # The newest complete checkpoint, because the trainer's own facts may count as the best a step
    # that could not be saved.
    newest = checkpoints.newest()
    if newest is None or newest.facts.best is None:
        return None
    best = newest.facts.best
    saved = checkpoints.at(int(best["step"]))
    training = {
        "stage": "finetune",
        "step": int(best["step"]),
        "epoch": best["epoch"],
        f"valid_{spec.unit}": best["bits"],
        "stopped_by": error.what,
    }
    facts: dict[str, Any] = {"dataset": spec.to_json(), "training": training}
    if isinstance(model, IntegralCircuit):
        load_saved(model, saved)
        save_both(model, folder, **facts)
    elif any(model.smoothing[:2]):
        save_model(model, folder, **facts, values=saved)
    else:
        # Rules that smooth in their update leave rows of any sum: back to the flow scale.
        fill_(model, saved)
        model.rescale_to_uses_()
        save_model(model, folder, **facts)
    return f"the best model so far, of step {int(best['step'])}, is kept in {folder}"
