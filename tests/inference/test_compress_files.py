"""The commands compress and decompress: every kind of input, and nothing half written."""

from __future__ import annotations

import dataclasses
import gzip
import importlib.util
import os
import struct
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from distpc.circuits.circuit import Circuit
from distpc.circuits.io import load_model, save_model
from distpc.cli import main
from distpc.inference.compressed_file import from_bytes, to_bytes
from distpc.structures.region_graph import Region, RegionGraph

from .conftest import load_split


def run(*arguments) -> int:
    return main([str(argument) for argument in arguments])


def there_and_back(model_dir, data, tmp_path, *options) -> np.ndarray:
    packed, out = tmp_path / "samples.dpcz", tmp_path / "out.npy"
    assert run("compress", model_dir, data, "-o", packed, *options) == 0
    assert run("decompress", model_dir, packed, "-o", out) == 0
    return np.load(out)


def test_a_split_of_the_run(model_dir, digits_run, tmp_path, capsys):
    found = there_and_back(model_dir, "test", tmp_path, "--num", 33, "--batch-size", 8)
    assert found.shape == (33, 8, 8, 1) and found.dtype == np.uint8
    assert np.array_equal(found.reshape(33, 64), load_split(digits_run, "test")[:33])
    text = capsys.readouterr().out
    assert "33 samples in" in text and "bits a value" in text and "a second" in text


def test_another_process_decodes(model_dir, digits_run, tmp_path):
    packed, out = tmp_path / "z.dpcz", tmp_path / "out.npy"
    assert run("compress", model_dir, "valid", "-o", packed, "--num", 20) == 0
    command = [sys.executable, "-m", "distpc", "decompress", model_dir, packed, "-o", out]
    subprocess.run(command, check=True, env={**os.environ, "OMP_NUM_THREADS": "2"})
    assert np.array_equal(np.load(out).reshape(20, 64), load_split(digits_run, "valid")[:20])


def test_the_benchmark(model_dir, repository):
    path = repository / "tools" / "bench_compress.py"
    spec = importlib.util.spec_from_file_location("bench_compress", path)
    bench = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(bench)
    figures = bench.measure(model_dir, "test", num=40, batch_size=20)
    assert figures["bit_exact"] and figures["num_values"] == 40 * 64
    assert 1 < figures["ratio_to_model"] < 1.01
    assert figures["coded_bits_per_value"] < figures["lzma_bits_per_value"]
    assert figures["lzma_bits_per_value"] < figures["png_bits_per_value"]


@pytest.mark.parametrize("dtype", [np.uint8, np.int64, ">i2", np.float32, np.float64])
def test_arrays_keep_their_type_and_shape(model_dir, digits_run, tmp_path, dtype):
    x = load_split(digits_run, "test")[:9].numpy().astype(dtype).reshape(9, 8, 8, 1)
    if np.issubdtype(dtype, np.floating):
        x[3, 2:5] = np.nan
    elif np.dtype(dtype).kind == "i":
        x[3, 2:5] = -1
    np.save(tmp_path / "x.npy", x)
    found = there_and_back(model_dir, tmp_path / "x.npy", tmp_path)
    assert found.dtype == x.dtype and found.shape == x.shape
    assert found.tobytes() == x.tobytes()


def test_negative_zeros_could_not_come_back(model_dir, tmp_path, capsys):
    x = np.zeros((2, 64))
    x[1, 5] = -0.0
    np.save(tmp_path / "x.npy", x)
    assert run("compress", model_dir, tmp_path / "x.npy", "-o", tmp_path / "z") == 2
    assert "bit for bit" in capsys.readouterr().err


def test_csv(model_dir, digits_run, tmp_path):
    x = load_split(digits_run, "test")[:4].numpy()
    lines = [",".join(map(str, row)) for row in x.tolist()]
    (tmp_path / "x.csv").write_text("\n".join(lines) + "\n")
    assert np.array_equal(there_and_back(model_dir, tmp_path / "x.csv", tmp_path).reshape(4, 64), x)


@pytest.fixture(scope="module")
def pixel_model(tmp_path_factory):
    """A model of 4 x 4 grey images of 256 values."""
    regions = [Region("input", 1, variable=v) for v in range(16)]
    regions.append(Region("product", 1, tuple(range(16))))
    graph = RegionGraph([*regions, Region("sum", 1, (16,))], 16)
    folder = tmp_path_factory.mktemp("pixels") / "model"
    facts = {
        "name": "pixels",
        "kind": "image",
        "num_variables": 16,
        "num_categories": [256] * 16,
        "image_shape": [4, 4, 1],
        "columns": [],
        "color": "as_is",
        "has_missing": False,
    }
    save_model(Circuit(graph, [256] * 16), folder, dataset=facts, training={})
    return folder


@pytest.fixture
def pixels():
    return np.random.default_rng(0).integers(0, 256, (5, 4, 4), dtype=np.uint8)


def test_idx_files(pixel_model, pixels, tmp_path):
    content = struct.pack(">4B3I", 0, 0, 8, 3, 5, 4, 4) + pixels.tobytes()
    with gzip.open(tmp_path / "images.gz", "wb") as handle:
        handle.write(content)
    found = there_and_back(pixel_model, tmp_path / "images.gz", tmp_path)
    assert found.dtype == np.uint8 and np.array_equal(found, pixels)


def test_folders_of_pictures(pixel_model, pixels, tmp_path, capsys):
    (tmp_path / "in").mkdir()
    for number, picture in enumerate(pixels):
        Image.fromarray(picture).save(tmp_path / "in" / f"{number}.png")
    packed, out = tmp_path / "z.dpcz", tmp_path / "out"
    assert run("compress", pixel_model, tmp_path / "in", "-o", packed) == 0
    assert run("decompress", pixel_model, packed, "-o", out) == 0
    files = sorted(out.iterdir())
    assert [file.name for file in files] == [f"{n:06d}.png" for n in range(5)]
    assert all(np.array_equal(Image.open(f), p) for f, p in zip(files, pixels, strict=True))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in", "out", "z.dpcz"]
    assert run("decompress", pixel_model, packed, "-o", out) == 2
    assert "new folder" in capsys.readouterr().err


def test_bad_input_leaves_nothing_behind(model_dir, pixel_model, tmp_path, capsys):
    packed, out = tmp_path / "z.dpcz", tmp_path / "out.npy"
    assert run("compress", model_dir, "test", "-o", packed, "--num", 3) == 0
    cut = tmp_path / "cut.dpcz"
    cut.write_bytes(packed.read_bytes()[:-4])
    capsys.readouterr()
    for arguments, words in (
        (("decompress", model_dir, cut, "-o", out), "cut or damaged"),
        (("decompress", pixel_model, packed, "-o", out), "another model"),
        (("decompress", model_dir, tmp_path / "none", "-o", out), "no such file"),
        (("decompress", model_dir, packed, "-o", tmp_path / "out.jpg"), "unknown kind"),
        (("compress", model_dir, "nothing", "-o", out), "no such data"),
        (("compress", pixel_model, "test", "-o", out), "does not lie in a run folder"),
        (("compress", model_dir, "test", "-o", out, "--num", 0), "too few samples"),
        (("compress", model_dir, "test", "-o", out, "--batch-size", 0), "batch size"),
    ):
        assert run(*arguments) == 2
        assert words in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cut.dpcz", "z.dpcz"]


def test_real_variables_are_refused(tmp_path, capsys):
    circuit = Circuit(RegionGraph([Region("input", 1, variable=0)], 1), [None])
    save_model(circuit, tmp_path / "model", dataset={}, training={})
    assert load_model(tmp_path / "model").num_variables == 1
    np.save(tmp_path / "x.npy", np.zeros((2, 1)))
    assert run("compress", tmp_path / "model", tmp_path / "x.npy", "-o", tmp_path / "z") == 2
    assert "real variable" in capsys.readouterr().err
    assert not (tmp_path / "z").exists()


def test_a_header_may_name_no_array(pixel_model, pixels, tmp_path, capsys):
    np.save(tmp_path / "x.npy", pixels)
    assert run("compress", pixel_model, tmp_path / "x.npy", "-o", tmp_path / "z") == 0
    header, words = from_bytes((tmp_path / "z").read_bytes(), "z")
    for source in ({"dtype": "odd", "shape": [5, 16]}, {"dtype": "|u1", "shape": [3]}, {"a": 1}):
        odd = to_bytes(dataclasses.replace(header, source=source), words)[0]
        (tmp_path / "z").write_bytes(odd)
        assert run("decompress", pixel_model, tmp_path / "z", "-o", tmp_path / "out.npy") == 2
        assert "said to come from" in capsys.readouterr().err
    assert not (tmp_path / "out.npy").exists()
