"""Model folders: equal after a round trip, refused when anything is off."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from distpc.circuits import load_model, save_model
from distpc.circuits.circuit import Circuit
from distpc.errors import ModelFileError

from .graphs import SMALL, hclt, random_evidence, small_circuit


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    circuit = small_circuit("grouped-patches", seed=3)
    circuit.set_smoothing(0.5, 0.1, 100)
    save_model(circuit, tmp_path / "model", dataset={"name": "toy"}, training={"epochs": 3})
    return tmp_path / "model"


@pytest.mark.parametrize("name", sorted(SMALL))
def test_a_round_trip_is_bit_equal(name: str, tmp_path: Path) -> None:
    circuit = small_circuit(name, seed=3)
    circuit.set_smoothing(0.5, 0.1, 100)
    save_model(circuit, tmp_path, dataset={"name": "toy"}, training={"epochs": 3})
    again = load_model(tmp_path)
    x, latents = random_evidence(circuit, 20, 0)
    assert torch.equal(again(x, latents), circuit(x, latents))
    for a, b in zip(again.parameters(), circuit.parameters(), strict=True):
        assert torch.equal(a, b)
    assert again.dataset == {"name": "toy"}
    assert again.training_facts == {"epochs": 3}
    assert sorted(p.name for p in tmp_path.iterdir()) == ["circuit.json", "model.safetensors"]
    save_model(again, tmp_path, dataset={}, training={})
    assert load_model(tmp_path).dataset == {}


def test_real_variables_keep_their_centres(tmp_path: Path) -> None:
    circuit = Circuit(hclt([-1, 0], 2), [None, 3])
    circuit.standardise(torch.tensor([7.0, 0.0]), torch.tensor([3.0, 1.0]))
    save_model(circuit, tmp_path, dataset={}, training={})
    x = torch.tensor([[5.0, 1.0], [9.5, 2.0]])
    assert torch.equal(load_model(tmp_path)(x), circuit(x))


def test_a_file_is_no_model_folder(tmp_path: Path) -> None:
    (tmp_path / "file.txt").write_text("no model")
    with pytest.raises(ModelFileError, match="not a model folder") as caught:
        load_model(tmp_path / "file.txt")
    assert "file.txt" in str(caught.value) and "distpc run CONFIG" in str(caught.value)
    (tmp_path / "circuit.json").mkdir()
    with pytest.raises(ModelFileError, match="not a model folder"):
        load_model(tmp_path)


def edit(folder: Path, **changes: object) -> None:
    description = json.loads((folder / "circuit.json").read_text())
    (folder / "circuit.json").write_text(json.dumps({**description, **changes}))


def test_damage_is_refused_with_its_place(saved: Path) -> None:
    tensors = saved / "model.safetensors"
    whole = tensors.read_bytes()
    tensors.write_bytes(whole[:-5])
    with pytest.raises(ModelFileError, match="cut") as caught:
        load_model(saved)
    assert str(len(whole) - 5) in str(caught.value)
    tensors.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(ModelFileError, match="damaged"):
        load_model(saved)
    tensors.unlink()
    with pytest.raises(ModelFileError, match="missing"):
        load_model(saved)
    tensors.write_bytes(whole)
    load_model(saved)
    (saved / "circuit.json").write_text("{")
    with pytest.raises(ModelFileError, match="JSON"):
        load_model(saved)
    (saved / "circuit.json").unlink()
    with pytest.raises(ModelFileError, match="not a model folder"):
        load_model(saved)


@pytest.mark.parametrize("version", [0, 2, None])
def test_other_versions_are_refused(saved: Path, version: int | None) -> None:
    edit(saved, format_version=version)
    with pytest.raises(ModelFileError, match="format version") as caught:
        load_model(saved)
    assert caught.value.expected == "1"
    assert ("newer" in str(caught.value.fix)) == (version == 2)


def test_region_graphs_of_either_format_are_read(tmp_path: Path) -> None:
    circuit = small_circuit("hclt")
    save_model(circuit, tmp_path, dataset={}, training={})
    graph = json.loads((tmp_path / "circuit.json").read_text())["graph"]
    assert graph["format_version"] == 2
    edit(tmp_path, graph={**graph, "format_version": 1})
    x, _ = random_evidence(circuit, 5, 0)
    assert torch.equal(load_model(tmp_path)(x), circuit(x))
    edit(tmp_path, graph={**graph, "format_version": 3})
    with pytest.raises(ModelFileError, match="description") as caught:
        load_model(tmp_path)
    assert "format version" in str(caught.value)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_nan_in_tensors_names_the_layer(saved: Path, value: float) -> None:
    tensors = load_file(saved / "model.safetensors")
    name = sorted(name for name in tensors if "sum" in name)[-1]
    tensors[name].view(-1)[-1] = value
    save_file(tensors, saved / "model.safetensors")
    content = (saved / "model.safetensors").read_bytes()
    facts = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    edit(saved, tensors={"file": "model.safetensors", **facts})
    with pytest.raises(ModelFileError, match="NaN") as caught:
        load_model(saved)
    assert f"layer '{name}'" in str(caught.value.where)
    assert caught.value.found == f"1 of {tensors[name].numel()} entries"


REFUSE_HEAVY = """
import sys
heavy = {"ray", "deepspeed", "pydantic", "webdataset", "tensorboard", "cirkit", "pyjuice", "triton"}
class Refuse:
    def find_spec(self, name, path=None, target=None):
        # torch itself asks whether triton is there, and lives without.
        if name.split(".")[0] in heavy:
            raise ModuleNotFoundError(f"{name} is not installed", name=name)
sys.meta_path.insert(0, Refuse())
import distpc.structures, distpc.circuits.exchange.pyjuice, distpc.circuits.exchange.cirkit
from distpc.training.optimizer import CircuitOptimizer
from distpc.circuits import load_model
circuit = load_model(sys.argv[1])
(-circuit([[0] * circuit.num_variables]).sum()).backward()
CircuitOptimizer(circuit.parameter_groups()).step()
assert not heavy & {name.split(".")[0] for name in sys.modules}, sorted(sys.modules)
"""


def test_models_load_and_train_without_heavy_libraries(saved: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", REFUSE_HEAVY, str(saved)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    "changes",
    [{"graph": {"format_version": 9}}, {"num_categories": [2]}, {"tensors": 3}, {"layout": {}}],
)
def test_a_description_that_does_not_fit_is_refused(saved: Path, changes) -> None:
    edit(saved, **changes)
    with pytest.raises(ModelFileError):
        load_model(saved)
