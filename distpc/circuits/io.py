"""Model folders: `model.safetensors` (statistics) and `circuit.json` (everything else).

Both are written under temporary names, the JSON last: a folder with `circuit.json` is complete.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from distpc.artifacts.files import file_digest, write_json
from distpc.artifacts.tensors import Entry, dtype_name, open_tensors, stream_tensors
from distpc.circuits.fill import fill_
from distpc.errors import DistpcError, ModelFileError
from distpc.parallel.places import Split
from distpc.structures.region_graph import RegionGraph

if TYPE_CHECKING:
    from distpc.circuits.circuit import Circuit

FORMAT_VERSION = 1
TENSORS = "model.safetensors"
RESTORE = "copy the model folder again, or run the finetune stage again"
DESCRIPTION = "circuit.json"
_HOLDS = "model parameters"


class InOrder(Protocol):
    """What parameters and buffers can be read from without holding one of them."""

    def in_order(self, name: str) -> Iterator[Tensor]:
        """All elements of a tensor, some at a time, flattened."""


def save_model(
    circuit: Circuit,
    folder: Path,
    *,
    dataset: dict[str, Any],
    training: dict[str, Any],
    values: InOrder | None = None,
) -> None:
    """Write a circuit into `folder`.

    Args:
        circuit: the model.
        folder: made where it is missing; files of an earlier model are replaced.
        dataset: description of the data (JSON values).
        training: facts about training worth keeping (JSON values).
        values: where to read parameters and buffers, some elements at a time, of a circuit that has
            none; None: the circuit's own.

    Raises:
        ResourceError: the disk is full.
    """
    folder = Path(folder)
    # While the tensors are replaced, the old description must not vouch for the new file.
    (folder / DESCRIPTION).unlink(missing_ok=True)
    num_bytes, digest = stream_tensors(
        folder / TENSORS,
        [
            Entry(
                name,
                dtype_name(tensor),
                tuple(tensor.shape),
                tensor.element_size(),
                partial(values.in_order, name) if values else partial(_itself, tensor),
            )
            for name, tensor in circuit.state_dict().items()
        ],
    )
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
                "sha256": digest,
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
    file = ModelFile(folder)
    circuit = file.circuit()
    fill_(circuit, file)
    return circuit


class ModelFile:
    """A model folder whose tensors are read one by one, or in parts; see `fill.Source`.

    Args:
        folder: of the model.
        verify: compare the tensors' checksum, which reads all of them once.

    Raises:
        ModelFileError: as `load_model`.
    """

    def __init__(self, folder: Path | str, *, verify: bool = True) -> None:
        self.folder = Path(folder)
        self._tensors = self.folder / TENSORS
        self._description = read_description(self.folder / DESCRIPTION)
        check_tensors(self._tensors, self._description, verify=verify)

    def circuit(self) -> Circuit:
        """The circuit without values, its parameters on torch's meta device.

        Raises:
            ModelFileError: description and tensors do not belong together.
        """
        from distpc.circuits.circuit import Circuit

        description = self._description
        try:
            graph = RegionGraph.from_json(description["graph"])
            circuit = Circuit(
                graph,
                description["num_categories"],
                max_fold_bytes=description["max_fold_bytes"],
                device="meta",
            )
            circuit.set_smoothing(**description["smoothing"])
            circuit.dataset = description["dataset"]
            circuit.training_facts = description["training"]
            layout = description["layout"]
        except (KeyError, TypeError, ValueError, DistpcError) as error:
            raise ModelFileError(
                "a model's description is damaged",
                where=self.folder / DESCRIPTION,
                found=repr(error),
                fix=RESTORE,
            ) from error
        if layout != _layout(circuit):
            raise ModelFileError(
                "a model's parameters are laid out in a way that this code does not read",
                where=self.folder / DESCRIPTION,
                fix="use the version of distpc that wrote it",
            )
        self._check_shapes(circuit)
        return circuit

    def part(self, name: str, split: Split | None, number: int) -> Tensor:
        """A tensor, or one part of it.

        Raises:
            ModelFileError: it holds NaN or infinity.
        """
        with open_tensors(self._tensors, holds=_HOLDS, error=ModelFileError) as file:
            stored = file.get_slice(name)
            size = len(stored.get_shape())
            place = [slice(None)] * size
            if split is not None:
                length = stored.get_shape()[split.dim] // split.parts
                place[split.dim] = slice(number * length, (number + 1) * length)
            # Not a view of the file, which may be replaced while the circuit is in use.
            tensor: Tensor = stored[tuple(place)].clone() if size else file.get_tensor(name)
        if not tensor.isfinite().all():
            raise ModelFileError(
                "a model holds NaN or infinity",
                where=f"{self._tensors}, layer '{name}'",
                found=f"{int((~tensor.isfinite()).sum())} of {tensor.numel()} entries",
                expected="finite statistics",
                fix=RESTORE,
            )
        return tensor

    def _check_shapes(self, circuit: Circuit) -> None:
        with open_tensors(self._tensors, holds=_HOLDS, error=ModelFileError) as file:
            found = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
        for name, bank in zip(circuit.banks, circuit.bank_list, strict=True):
            # A bank has a mask only where edges were pruned.
            if f"banks.{name}.mask" in found:
                bank.register_buffer("mask", torch.ones_like(bank.statistics, dtype=torch.bool))
        expected = {name: tuple(t.shape) for name, t in circuit.state_dict().items()}
        if found != expected:
            odd = sorted(n for n in {*found, *expected} if found.get(n) != expected.get(n))
            raise ModelFileError(
                "a model's tensors do not fit its region graph",
                where=f"{self._tensors}, tensor '{odd[0]}'",
                found=found.get(odd[0], "no such tensor"),
                expected=expected.get(odd[0], "no such tensor"),
            )


def _itself(tensor: Tensor) -> Iterator[Tensor]:
    yield tensor


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
            fix="name a model folder, such as runs/digits/model; `distpc run CONFIG` writes it",
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


def check_tensors(
    path: Path, description: dict[str, Any], where: str = DESCRIPTION, *, verify: bool = True
) -> None:
    """Compare a file of tensors with what the model's JSON says of it.

    Args:
        path: of the tensors.
        description: the JSON.
        where: name of its file, for errors.
        verify: compare the checksum, which reads the whole file.

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
    digest = file_digest(path) if verify else expected["sha256"]
    if digest != expected["sha256"]:
        raise ModelFileError(
            "a model's tensors are damaged",
            where=path,
            found=f"sha256 {digest[:16]}...",
            expected=f"sha256 {expected['sha256'][:16]}...",
            fix=RESTORE,
        )
