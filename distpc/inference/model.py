"""Opening a saved model for queries, together with what its data look like."""

from __future__ import annotations

from pathlib import Path

import torch

from distpc.circuits.circuit import Circuit
from distpc.circuits.io import load_model
from distpc.data.spec import DatasetSpec
from distpc.errors import EvidenceError


def open_model(folder: Path) -> tuple[Circuit, DatasetSpec]:
    """Load the model in `folder` and the description of its samples.

    A model that was saved without a data set counts as a nameless array.

    Raises:
        ModelFileError: the folder is missing a file, cut, or of another version.
    """
    circuit = load_model(Path(folder))
    if torch.cuda.is_available():
        circuit = circuit.to("cuda")
    circuit.eval()
    return circuit, spec_of(circuit)


def spec_of(circuit: Circuit) -> DatasetSpec:
    """What a sample of the circuit's data set is, or of an array of the circuit's width."""
    if circuit.dataset:
        return DatasetSpec.from_json(circuit.dataset)
    return DatasetSpec("data", "array", circuit.num_variables, tuple(circuit.num_categories))


def image_shape(spec: DatasetSpec) -> tuple[int, int, int]:
    """(height, width, channels) of the model's images.

    Raises:
        EvidenceError: the model is not one of images.
    """
    if spec.image_shape is None:
        raise EvidenceError(
            "pictures need a model of images",
            where=spec.name,
            found=f"a model of {spec.kind} data",
            expected="image data",
            fix="write values instead: an output that ends in .npy or .csv (text: .txt)",
        )
    return spec.image_shape
