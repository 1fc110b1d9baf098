"""Folders of networks: `networks.safetensors` and `networks.json`, from which any K can be made.

A run's model folder holds one beside the ordinary circuit. The JSON is written last: a folder with
it is complete.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from distpc.artifacts.files import file_digest, write_json
from distpc.artifacts.tensors import read_tensors, write_tensors
from distpc.circuits.integral.circuit import IntegralCircuit
from distpc.circuits.integral.settings import IntegralSettings
from distpc.circuits.io import RESTORE, check_tensors, read_description
from distpc.errors import DistpcError, ModelFileError
from distpc.structures.region_graph import RegionGraph

FORMAT_VERSION = 1
FOLDER = "networks"
"""Inside the folder of the circuit that the networks wrote."""
TENSORS = "networks.safetensors"
DESCRIPTION = "networks.json"


def save_networks(
    circuit: IntegralCircuit, folder: Path, *, dataset: dict[str, Any], training: dict[str, Any]
) -> None:
    """Write an integral circuit's networks into `folder`.

    Args:
        circuit: the networks and their structure.
        folder: made where it is missing; files of earlier networks are replaced.
        dataset: description of the data (JSON values).
        training: facts about training worth keeping (JSON values).

    Raises:
        ResourceError: the disk is full.
    """
    folder = Path(folder)
    # While the tensors are replaced, the old description must not vouch for the new file.
    (folder / DESCRIPTION).unlink(missing_ok=True)
    num_bytes = write_tensors(folder / TENSORS, circuit.state_dict())
    write_json(
        folder / DESCRIPTION,
        {
            "format_version": FORMAT_VERSION,
            "graph": circuit.graph.to_json(),
            "num_categories": list(circuit.num_categories),
            "settings": circuit.settings.to_json(),
            "seed": circuit.seed,
            "max_fold_bytes": circuit.max_fold_bytes,
            "tensors": {
                "file": TENSORS,
                "bytes": num_bytes,
                "sha256": file_digest(folder / TENSORS),
            },
            "dataset": dataset,
            "training": training,
        },
    )


def load_networks(folder: Path | str) -> IntegralCircuit:
    """Read the integral circuit whose networks are in `folder`, or in the model folder `folder`.

    Raises:
        ModelFileError: a file is missing, cut, damaged, or of a version this code cannot read.
    """
    folder = Path(folder)
    if not (folder / DESCRIPTION).exists() and (folder / FOLDER).is_dir():
        folder = folder / FOLDER
    path = folder / DESCRIPTION
    if folder.is_dir() and not path.exists():
        raise ModelFileError(
            "a model has no networks to make other numbers of states from",
            where=folder,
            found=f"no {DESCRIPTION}",
            expected=f"a folder with {DESCRIPTION} and {TENSORS}",
            fix="train one with integral.enabled=true, such as configs/mnist7_integral.yaml",
        )
    description = read_description(path, TENSORS)
    check_tensors(folder / TENSORS, description, DESCRIPTION)
    try:
        circuit = IntegralCircuit(
            RegionGraph.from_json(description["graph"]),
            description["num_categories"],
            IntegralSettings.from_json(description["settings"]),
            seed=description["seed"],
            max_fold_bytes=description["max_fold_bytes"],
        )
        circuit.dataset = description["dataset"]
        circuit.training_facts = description["training"]
    except (KeyError, TypeError, ValueError, DistpcError) as error:
        raise ModelFileError(
            "a description of networks is damaged", where=path, found=repr(error), fix=RESTORE
        ) from error
    tensors, _ = read_tensors(folder / TENSORS, holds="networks", error=ModelFileError)
    expected = {name: tuple(tensor.shape) for name, tensor in circuit.state_dict().items()}
    found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    if found != expected:
        odd = sorted(n for n in {*found, *expected} if found.get(n) != expected.get(n))
        raise ModelFileError(
            "networks do not fit their region graph",
            where=f"{folder / TENSORS}, tensor '{odd[0]}'",
            found=found.get(odd[0], "no such tensor"),
            expected=expected.get(odd[0], "no such tensor"),
        )
    for name, tensor in tensors.items():
        if not tensor.isfinite().all():
            raise ModelFileError(
                "networks hold NaN or infinity",
                where=f"{folder / TENSORS}, tensor '{name}'",
                found=f"{int((~tensor.isfinite()).sum())} of {tensor.numel()} entries",
                expected="finite numbers",
                fix=RESTORE,
            )
    circuit.load_state_dict(tensors)
    return circuit
