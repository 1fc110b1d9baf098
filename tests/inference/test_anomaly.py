"""tools/anomaly.py on a small model: areas under curves, and data that do not fit."""

from __future__ import annotations

import gzip
import importlib.util
import json
import struct
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

from distpc.circuits.circuit import Circuit
from distpc.circuits.io import save_model
from distpc.structures.region_graph import Region, RegionGraph


@pytest.fixture
def tool(repository: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The script as a module."""
    spec = importlib.util.spec_from_file_location("anomaly", repository / "tools/anomaly.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "anomaly", module)
    spec.loader.exec_module(module)
    return module


def write_images(path: Path, images: np.ndarray) -> None:
    """(N, height, width) uint8 as a gzipped IDX file."""
    header = bytes([0, 0, 8, 3]) + struct.pack(">3I", *images.shape)
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(gzip.compress(header + images.tobytes()))


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path, Path]:
    """A model of 4 x 4 pixels that are dark, dark images and bright ones."""
    regions = [Region("input", 1, variable=pixel) for pixel in range(16)]
    graph = RegionGraph([*regions, Region("product", 1, tuple(range(16)))], 16)
    circuit = Circuit(graph, [256] * 16)
    for pixel in range(16):
        circuit.statistics_of(pixel)[:] = torch.exp(-torch.arange(256) / 20.0)
    save_model(circuit, tmp_path / "model", dataset={}, training={})
    generator = np.random.default_rng(0)
    dark = generator.exponential(20.0, (60, 4, 4)).clip(0, 255).astype(np.uint8)
    bright = generator.integers(100, 256, (40, 4, 4)).astype(np.uint8)
    write_images(tmp_path / "dark" / "t10k-images-idx3-ubyte.gz", dark[:30])
    write_images(tmp_path / "dark" / "train-images-idx3-ubyte.gz", dark[30:])
    write_images(tmp_path / "bright" / "t10k-images-idx3-ubyte.gz", bright)
    return tmp_path / "model", tmp_path / "dark", tmp_path / "bright"


def test_areas_under_curves(tool, folders, monkeypatch, capsys) -> None:
    monkeypatch.setattr(sys, "argv", ["anomaly", *map(str, folders), "--json"])
    assert tool.main() == 0
    found = json.loads(capsys.readouterr().out)
    assert found["normal_images"] == 30
    assert found["other_images"] == 40
    areas = found["area_under_curve"]
    assert areas["surprise"] == 1.0
    assert areas["surprise_reversed"] == 0.0
    assert areas["typicality"] == 1.0
    assert areas["surprise_less_png"] > 0.95


def test_the_area_is_the_chance_of_a_higher_score(tool) -> None:
    generator = np.random.default_rng(1)
    a, b = generator.integers(0, 9, 50), generator.integers(2, 12, 30)
    pairs = b[None, :] - a[:, None]
    expected = ((pairs > 0) + 0.5 * (pairs == 0)).mean()
    assert tool.area_under_curve(a, b) == pytest.approx(expected, abs=1e-12)


def test_images_that_do_not_fit_are_refused(tool, folders, monkeypatch, capsys, tmp_path) -> None:
    model, dark, _ = folders
    write_images(tmp_path / "wide" / "t10k-images-idx3-ubyte.gz", np.zeros((2, 4, 5), np.uint8))
    for other, message in ((tmp_path / "wide", "16 values"), (tmp_path, "t10k-images")):
        monkeypatch.setattr(sys, "argv", ["anomaly", str(model), str(dark), str(other)])
        assert tool.main() == 2
        assert message in capsys.readouterr().err
