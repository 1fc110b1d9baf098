"""Model folders: equal after a round trip, refused when anything is off."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from distpc.circuits import load_model, save_model
from distpc.circuits.circuit import Circuit
from distpc.errors import ModelFileError

from .graphs import hclt, random_evidence, small_circuit


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    circuit = small_circuit("grouped-patches", seed=3)
    circuit.set_smoothing(0.5, 0.1, 100)
    save_model(circuit, tmp_path / "model", dataset={"name": "toy"}, training={"epochs": 3})
    return tmp_path / "model"


@pytest.mark.parametrize("name", ["grouped-patches", "hclt", "shared-child"])
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
    assert "file.txt" in str(caught.value)
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


@pytest.mark.parametrize(
    "changes",
    [{"graph": {"format_version": 9}}, {"num_categories": [2]}, {"tensors": 3}, {"layout": {}}],
)
def test_a_description_that_does_not_fit_is_refused(saved: Path, changes) -> None:
    edit(saved, **changes)
    with pytest.raises(ModelFileError):
        load_model(saved)
