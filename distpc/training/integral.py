"""Training of integral circuits: where networks start, and what becomes of them."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from distpc.circuits.circuit import Circuit
from distpc.circuits.integral.circuit import IntegralCircuit
from distpc.circuits.integral.io import FOLDER, save_networks
from distpc.circuits.integral.settings import IntegralSettings
from distpc.circuits.io import save_model
from distpc.config.integral import IntegralConfig
from distpc.config.schema import RunConfig
from distpc.data.spec import DatasetSpec
from distpc.structures.region_graph import RegionGraph
from distpc.training.checkpoint import Checkpoint, check_shapes
from distpc.training.start import marginals_of

Model = Circuit | IntegralCircuit
"""What the trainer trains."""


def as_circuit(model: Model) -> Circuit:
    """The model as an ordinary circuit: itself, or what its networks write."""
    return model.materialise() if isinstance(model, IntegralCircuit) else model


def settings_of(config: IntegralConfig) -> IntegralSettings:
    """The part of the section that the circuit reads."""
    values: dict[str, Any] = config.model_dump(exclude={"enabled", "evaluate_states"})
    return IntegralSettings(**values)


def starting_networks(
    config: RunConfig,
    graph: RegionGraph,
    spec: DatasetSpec,
    batches: Iterable[np.ndarray] | None,
) -> IntegralCircuit:
    """Networks that training starts from, equal on every rank.

    Args:
        config: of the run.
        graph: the structure.
        spec: of the data.
        batches: (B, V) samples whose marginals input units start at; None where a checkpoint
            follows.

    Raises:
        StructureError: networks cannot write this structure's weights, or it cannot have one of the
            numbers of states to be evaluated.
    """
    model = IntegralCircuit(
        graph,
        spec.num_categories,
        settings_of(config.integral),
        seed=config.seed,
        max_fold_bytes=config.structure.max_fold_bytes,
    )
    # Training may take long: better before it than after.
    model.check_states(*config.integral.evaluate_states)
    if batches is not None:
        model.start_near_(marginals_of(batches, spec.num_categories).counts)
    return model


def load_saved(model: IntegralCircuit, saved: Checkpoint) -> None:
    """Give networks the parameters that they had at a checkpoint.

    Raises:
        ArtifactError: it is of other networks, or cannot be read.
    """
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    check_shapes(saved.path, saved.shapes, shapes)
    model.load_state_dict(saved.statistics())


def save_both(
    model: IntegralCircuit, folder: Path, *, dataset: dict[str, Any], training: dict[str, Any]
) -> None:
    """Write networks, and the circuit of the structure's own number of states, into `folder`.

    Args:
        model: the networks.
        folder: of the model, see `circuits.io`.
        dataset, training: see there.

    Raises:
        ResourceError: the disk is full.
    """
    save_networks(model, folder / FOLDER, dataset=dataset, training=training)
    save_model(model.materialise(), folder, dataset=dataset, training=training)


def count_parameters(config: RunConfig, graph: RegionGraph, spec: DatasetSpec) -> int:
    """Trainable parameters of a run's networks.

    Raises:
        StructureError: networks cannot write this structure's weights.
    """
    return starting_networks(config, graph, spec, None).num_parameters


def begin_step(model: Model, step: int) -> None:
    """Tell a model that draws something anew in each training step which one comes next."""
    if isinstance(model, IntegralCircuit):
        model.begin_step(step)
