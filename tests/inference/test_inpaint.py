"""Completions keep what is observed; uncertainty is the exact conditional's entropy."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from distpc.circuits.exact import log_prob_exact
from distpc.circuits.io import load_model
from distpc.errors import EvidenceError
from distpc.inference.inpaint import complete, completion_grid, inpaint_command
from distpc.inference.masks import MASKS, observed_mask
from distpc.inference.model import spec_of
from distpc.inference.pictures import GAP, HEADER_PIXELS, HEAT, tile_size, to_pictures

from .conftest import load_split


@pytest.fixture(scope="module")
def circuit(model_dir):
    return load_model(model_dir)


@pytest.fixture(scope="module")
def x(digits_run):
    return load_split(digits_run, "test")[:6]


@pytest.mark.parametrize("mask", MASKS)
def test_observed_pixels_are_kept(circuit, x, mask):
    spec = spec_of(circuit)
    observed = observed_mask(mask, spec, seed=1)
    result = complete(circuit, x, observed, n=3, seed=0)
    assert result.values.shape == (6, 3, 64)
    assert torch.equal(result.values[:, :, observed], x[:, None, observed].expand(-1, 3, -1))
    assert (result.values >= 0).all()
    assert (result.values <= 16).all()
    assert (result.entropy_bits[:, observed] == 0).all()
    assert (result.entropy_bits[:, ~observed] >= 0).all()
    assert result.entropy_bits.max() > 1


def test_entropy_is_that_of_the_exact_conditional(circuit, x):
    observed = observed_mask("right", spec_of(circuit))
    result = complete(circuit, x[:1], observed, n=1, seed=0)
    variable = 8 * 3 + 5
    trials = x[:1].repeat(17, 1)
    trials[:, variable] = torch.arange(17)
    visible = observed.clone()
    visible[variable] = True
    joint = torch.as_tensor(log_prob_exact(circuit, trials, visible.expand(17, -1), None))
    p = torch.softmax(joint, dim=0)
    bits = float(-(p * p.log2()).sum())
    assert float(result.entropy_bits[0, variable]) == pytest.approx(bits, abs=1e-4)


def test_each_image_may_hide_other_pixels(circuit, x):
    spec = spec_of(circuit)
    observed = torch.stack([observed_mask(mask, spec) for mask in MASKS])
    result = complete(circuit, x, observed, n=2, seed=0)
    kept = result.values == x[:, None]
    assert kept[observed[:, None].expand_as(kept)].all()
    assert (result.entropy_bits[observed] == 0).all()


def test_missing_values_are_hidden_too(circuit, x):
    x = x.clone()
    x[:, 20] = -1
    result = complete(circuit, x, torch.ones(64, dtype=torch.bool), n=2, seed=0)
    assert (result.values[:, :, 20] >= 0).all()
    others = torch.arange(64) != 20
    assert torch.equal(result.values[:, 0, others], x[:, others])


def test_the_grid_shows_originals_hidden_parts_and_uncertainty(circuit, x):
    spec = spec_of(circuit)
    observed = observed_mask("left", spec)
    result = complete(circuit, x, observed, n=3, seed=0)
    grid = completion_grid(result, spec)
    assert grid.shape == (*tile_size(6 * 6, 6, 8, 8, headers=True), 3)
    cells = grid[HEADER_PIXELS + GAP :, GAP:][:64, :].copy()
    original, hidden, first, *_, bits = [cells[:, i * 66 : i * 66 + 64] for i in range(6)]
    expected = to_pictures(x[:1].numpy(), spec)[0, ..., 0].repeat(8, 0).repeat(8, 1)
    assert np.array_equal(original[..., 0], expected)
    assert np.array_equal(hidden[:, 32:], original[:, 32:])
    assert np.array_equal(first[:, 32:], original[:, 32:])
    assert (hidden[:, :32] == hidden[0, 0]).all()
    assert (bits[:, 32:] == HEAT[0]).all()


def test_the_command_takes_the_runs_test_images(model_dir, digits_run, tmp_path):
    out = inpaint_command(model_dir, None, "random", 5, 2, 7, tmp_path / "c.npy")
    values = np.load(out)
    test = load_split(digits_run, "test")[:5].numpy()
    observed = observed_mask("random", spec_of(load_model(model_dir)), 7).numpy()
    assert values.shape == (5, 2, 64)
    assert (values[:, :, observed] == test[:, None, observed]).all()
    link = digits_run / "model"
    if not link.exists():
        link.symlink_to(model_dir, target_is_directory=True)
    again = inpaint_command(link, None, "random", 5, 2, 7, tmp_path / "again.npy")
    assert np.array_equal(np.load(again), values)


def test_the_command_takes_arrays_and_folders(model_dir, circuit, x, tmp_path):
    np.save(tmp_path / "x.npy", x.numpy().reshape(-1, 8, 8, 1))
    folder = tmp_path / "pictures"
    folder.mkdir()
    for number, image in enumerate(to_pictures(x.numpy(), spec_of(circuit))):
        Image.fromarray(image[..., 0]).save(folder / f"{number}.png")
    of_array = inpaint_command(model_dir, tmp_path / "x.npy", "top", 4, 2, 0, tmp_path / "a.npy")
    of_folder = inpaint_command(model_dir, folder, "top", 4, 2, 0, tmp_path / "b.npy")
    assert np.array_equal(np.load(of_array), np.load(of_folder))
    picture = inpaint_command(model_dir, folder, "top", 4, 2, 0, tmp_path / "c.png")
    with Image.open(picture) as image:
        assert (image.height, image.width) == tile_size(4 * 5, 5, 8, 8, headers=True)


def test_completions_by_the_most_probable_values_and_by_means(circuit, x):
    observed = observed_mask("left", spec_of(circuit))
    best = complete(circuit, x, observed, n=4, seed=0, fill="mpe")
    assert torch.equal(best.values, circuit.mpe(x, observed).x[:, None])
    mean = complete(circuit, x, observed, n=4, seed=0, fill="mean")
    assert mean.values.dtype == torch.int64
    assert mean.values.shape == (6, 1, 64)
    assert torch.equal(mean.values[:, 0, observed], x[:, observed])
    samples = complete(circuit, x, observed, n=400, seed=0).values.double()
    assert (samples.mean(1) - mean.values[:, 0]).abs().max() < 2.0
    with pytest.raises(EvidenceError, match="unknown completion"):
        complete(circuit, x, observed, n=1, seed=0, fill="zeros")


def test_fewer_images_than_asked_for_are_refused(model_dir, x, tmp_path):
    np.save(tmp_path / "x.npy", x.numpy())
    out = tmp_path / "c.npy"
    with pytest.raises(EvidenceError, match="fewer images than are asked for") as caught:
        inpaint_command(model_dir, tmp_path / "x.npy", n=7, out=out)
    assert "6 images" in str(caught.value)
    assert not out.exists()
    inpaint_command(model_dir, tmp_path / "x.npy", num_completions=2, out=out, fill="mpe")
    assert np.load(out).shape == (6, 1, 64)


def test_refusals(model_dir, tmp_path):
    out = tmp_path / "c.png"
    np.save(tmp_path / "wide.npy", np.zeros((2, 65), dtype=int))
    with pytest.raises(EvidenceError, match="64 values a row"):
        inpaint_command(model_dir, tmp_path / "wide.npy", out=out)
    bad = np.zeros((2, 64), dtype=int)
    bad[1, 5] = 17
    np.save(tmp_path / "bad.npy", bad)
    with pytest.raises(EvidenceError, match="row 1, column 5"):
        inpaint_command(model_dir, tmp_path / "bad.npy", out=out)
    with pytest.raises(EvidenceError, match="unknown mask"):
        inpaint_command(model_dir, None, "diagonal", out=out)
    with pytest.raises(EvidenceError, match="do not exist"):
        inpaint_command(model_dir, tmp_path / "none", out=out)
    with pytest.raises(EvidenceError, match=r"\.png or \.npy"):
        inpaint_command(model_dir, None, out=tmp_path / "c.jpg")
    assert not out.exists()
