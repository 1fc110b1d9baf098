"""Samples as pictures and values."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from distpc.circuits.io import load_model
from distpc.errors import EvidenceError, ModelFileError
from distpc.inference.pictures import tile_size
from distpc.inference.sample import draw_samples, sample_command, to_lines

from .conftest import load_split


def test_pictures_and_values(model_dir, tmp_path):
    with Image.open(sample_command(model_dir, 10, 3, tmp_path / "samples.png")) as picture:
        assert (picture.height, picture.width) == tile_size(10, 4, 8, 8)
    values = np.load(sample_command(model_dir, 10, 3, tmp_path / "samples.npy"))
    assert values.shape == (10, 64)
    assert values.min() >= 0
    assert values.max() <= 16
    again = np.load(sample_command(model_dir, 10, 3, tmp_path / "again.npy"))
    other = np.load(sample_command(model_dir, 10, 4, tmp_path / "other.npy"))
    assert np.array_equal(values, again)
    assert not np.array_equal(values, other)
    rows = sample_command(model_dir, 10, 3, tmp_path / "samples.csv").read_text().splitlines()
    assert rows[1] == ",".join(map(str, values[0]))


def test_samples_look_like_the_data(model_dir, digits_run):
    values = draw_samples(load_model(model_dir), 1500, 0)
    train = load_split(digits_run, "train").numpy()
    assert np.abs(values.mean(0) - train.mean(0)).max() < 1.0
    assert (values[:, train.max(0) == 0] == 0).mean() > 0.99


def test_refusals(model_dir, tmp_path):
    with pytest.raises(EvidenceError, match="npy"):
        sample_command(model_dir, 1, 0, tmp_path / "samples.txt")
    with pytest.raises(EvidenceError, match="at least 1"):
        sample_command(model_dir, 0, 0, tmp_path / "samples.png")
    with pytest.raises(ModelFileError):
        sample_command(tmp_path / "nothing", 1, 0, tmp_path / "samples.png")
    assert not list(tmp_path.iterdir())


def test_text_lines_escape_control_characters():
    values = np.array([list(b"a\nb\x00\xff!"), [*b"ok", -1, -1, -1, -1]])
    assert to_lines(values) == ["a\\nb\\x00\ufffd!", "ok"]
