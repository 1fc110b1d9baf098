"""Model folders: `model.safetensors` (statistics) and `circuit.json` (everything else).

Both are written under temporary names, the JSON last: a folder with `circuit.json` is complete.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from distpc.artifacts.files import file_digest, write_json
from distpc.artifacts.tensors import read_tensors, write_tensors
from distpc.errors import DistpcError, ModelFileError
from distpc.structures.region_graph import RegionGraph

if TYPE_CHECKING:
    from distpc.circuits.circuit import Circuit

FORMAT_VERSION = 1
TENSORS = "model.safetensors"
RESTORE = "copy the model folder again, or run the finetune stage again"
DESCRIPTION = "circuit.json"


def save_model(
    circuit: Circuit, folder: Path, *, dataset: dict[str, Any], training: dict[str, Any]
) -> None:
    """Write a circuit into `folder`.

    Args:
        circuit: the model.
        folder: made where it is missing; files of an earlier model are replaced.
        dataset: description of the data (JSON values).
        training: facts about training worth keeping (JSON values).

    Raises:
        ResourceError: the disk is full.
    """
    folder = Path(folder)
    # While the tensors are replaced, the old description must not vouch for the new file.
    (folder / DESCRIPTION).unlink(missing_ok=True)
    num_bytes = write_tensors(folder / TENSORS, circuit.state_dict())
    pseudocount, leaf_pseudocount, num_samples = circuit.smoothing
    write_json(
        folder / DESCRIPTION,
        {
            "format_version": FORMAT_VERSION,
            "graph": circuit.graph.to_json(),
            "num_categories": list(circuit.num_categories),
            "smoothing": {
                "pseudocount": pseudocount,
                "leaf_pseudocount": leaf_pseudocount,
                "num_samples": num_samples,
            },
            "max_fold_bytes": circuit.max_fold_bytes,
            "layout": _layout(circuit),
            "tensors": {
                "file": TENSORS,
                "bytes": num_bytes,
                "sha256": file_digest(folder / TENSORS),
            },
            "dataset": dataset,
            "training": training,
        },
    )


def load_model(folder: Path | str) -> Circuit:
    """Read the circuit in `folder`; its `dataset` and `training_facts` are what was saved.

    Raises:
        ModelFileError: a file is missing, cut, damaged, or of a version this code cannot read.
    """
    from distpc.circuits.circuit import Circuit

    folder = Path(folder)
    description = read_description(folder / DESCRIPTION)
    check_tensors(folder / TENSORS, description)
    try:
        graph = RegionGraph.from_json(description["graph"])
        circuit = Circuit(
            graph,
            description["num_categories"],
            max_fold_bytes=description["max_fold_bytes"],
        )
        circuit.set_smoothing(**description["smoothing"])
        circuit.dataset = description["dataset"]
        circuit.training_facts = description["training"]
        layout = description["layout"]
    except (KeyError, TypeError, ValueError, DistpcError) as error:
        raise ModelFileError(
            "a model's description is damaged",
            where=folder / DESCRIPTION,
            found=repr(error),
            fix=RESTORE,
        ) from error
    if layout != _layout(circuit):
        raise ModelFileError(
            "a model's parameters are laid out in a way that this code does not read",
            where=folder / DESCRIPTION,
            fix="use the version of distpc that wrote it",
        )
    tensors, _ = read_tensors(folder / TENSORS, holds="model parameters", error=ModelFileError)
    for name, bank in zip(circuit.banks, circuit.bank_list, strict=True):
        # A bank has a mask only where edges were pruned.
        if f"banks.{name}.mask" in tensors:
            bank.register_buffer("mask", torch.ones_like(bank.statistics, dtype=torch.bool))
    expected = {name: tuple(t.shape) for name, t in circuit.state_dict().items()}
    found = {name: tuple(t.shape) for name, t in tensors.items()}
    if found != expected:
        odd = sorted(n for n in {*found, *expected} if found.get(n) != expected.get(n))
        raise ModelFileError(
            "a model's tensors do not fit its region graph",
            where=f"{folder / TENSORS}, tensor '{odd[0]}'",
            found=found.get(odd[0], "no such tensor"),
            expected=expected.get(odd[0], "no such tensor"),
        )
    for name, tensor in tensors.items():
        if not tensor.isfinite().all():
            raise ModelFileError(
                "a model holds NaN or infinity",
                where=f"{folder / TENSORS}, layer '{name}'",
                found=f"{int((~tensor.isfinite()).sum())} of {tensor.numel()} entries",
                expected="finite statistics",
                fix=RESTORE,
            )
    circuit.load_state_dict(tensors)
    return circuit


def _layout(circuit: Circuit) -> dict[str, list[int]]:
    """For each parameter module, the first region of each of its tables."""
    plans = circuit.schedule.banks
    return {
        name: [owners[0] for owners in plan.owners]
        for name, plan in zip(circuit.banks, plans, strict=True)
    }


def read_description(path: Path, tensors: str = TENSORS) -> dict[str, Any]:
    """The JSON of a model's folder.

    Args:
        path: of the JSON.
        tensors: name of the file that belongs to it, for errors.

    Raises:
        ModelFileError: it is missing, damaged, or of a version this code cannot read.
    """
    try:
        description = json.loads(path.read_bytes())
    except OSError as error:
        raise ModelFileError(
            "not a model folder",
            where=path,
            found="no such file" if isinstance(error, FileNotFoundError) else error,
            expected=f"a folder with {path.name} and {tensors}",
            fix="name a model folder, such as runs/digits/model",
        ) from error
    except ValueError as error:
        raise ModelFileError(
            "a model's description is not valid JSON", where=path, found=str(error), fix=RESTORE
        ) from error
    version = description.get("format_version") if isinstance(description, dict) else None
    if version != FORMAT_VERSION:
        is_newer = isinstance(version, int) and version > FORMAT_VERSION
        raise ModelFileError(
            "a model has a format version that this code does not read",
            where=path,
            found=version,
            expected=FORMAT_VERSION,
            fix="update distpc: a newer one wrote it" if is_newer else RESTORE,
        )
    return description


def check_tensors(path: Path, description: dict[str, Any], where: str = DESCRIPTION) -> None:
    """Compare a file of tensors with what the model's JSON says of it.

    Args:
        path: of the tensors.
        description: the JSON.
        where: name of its file, for errors.

    Raises:
        ModelFileError: the tensors are missing, cut or damaged.
    """
    expected = description.get("tensors")
    if not isinstance(expected, dict) or not {"bytes", "sha256"} <= expected.keys():
        raise ModelFileError(
            "a model's description is damaged",
            where=path.parent / where,
            found=f"tensors: {expected!r}",
            expected="bytes and sha256 of the tensors",
            fix=RESTORE,
        )
    if not path.is_file():
        raise ModelFileError(
            "a model's tensors are missing",
            where=path,
            found="no such file",
            expected=f"{expected['bytes']} bytes",
            fix=RESTORE,
        )
    size = path.stat().st_size
    if size != expected["bytes"]:
        raise ModelFileError(
            "a model's tensors are cut",
            where=path,
            found=f"{size} bytes",
            expected=f"{expected['bytes']} bytes",
            fix=RESTORE,
        )
    digest = file_digest(path)
    if digest != expected["sha256"]:
        raise ModelFileError(
            "a model's tensors are damaged",
            where=path,
            found=f"sha256 {digest[:16]}...",
            expected=f"sha256 {expected['sha256'][:16]}...",
            fix=RESTORE,
        )
