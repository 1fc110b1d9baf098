"""Values to pictures and back, grids and their sizes."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from distpc.data import color
from distpc.data.pictures import from_display
from distpc.data.spec import DatasetSpec
from distpc.errors import EvidenceError
from distpc.inference import pictures

GREY = DatasetSpec("grey", "image", 8 * 8, (17,) * 64, (8, 8, 1))


def rgb_spec(space: str) -> DatasetSpec:
    counts = color.NUM_CATEGORIES[space] * (8 * 6)
    return DatasetSpec("rgb", "image", len(counts), counts, (8, 6, 3), color=space)


def test_seventeen_values_span_black_to_white_and_come_back():
    values = np.arange(64 * 17).reshape(17, 64) % 17
    shown = pictures.to_pictures(values, GREY)
    assert shown.shape == (17, 8, 8, 1)
    assert (shown.min(), shown.max()) == (0, 255)
    assert np.array_equal(from_display(shown, GREY), values)


@pytest.mark.parametrize(("space", "off"), [("as_is", 0), ("ycocg_r", 0), ("ycocg_lossy", 6)])
def test_colour_spaces_are_inverted(space, off):
    rgb = np.random.default_rng(0).integers(0, 256, (5, 8, 6, 3)).astype(np.uint8)
    spec = rgb_spec(space)
    values = from_display(rgb, spec)
    counts = np.array(spec.num_categories)
    assert (values >= 0).all()
    assert (values < counts).all()
    shown = pictures.to_pictures(values, spec)
    assert shown.dtype == np.uint8
    assert np.abs(shown.astype(int) - rgb).max() <= off


def test_colours_outside_rgb_are_clipped():
    spec = rgb_spec("ycocg_r")
    values = np.random.default_rng(0).integers(0, 256, (4, spec.num_variables))
    assert pictures.to_pictures(values, spec).shape == (4, 8, 6, 3)


@pytest.mark.parametrize("side", [4, 8, 28, 32, 64, 200])
def test_a_grid_has_the_size_it_says_and_small_pixels_are_enlarged(side):
    images = np.random.default_rng(0).integers(0, 256, (5, side, side, 1)).astype(np.uint8)
    grid = pictures.tile(images, columns=2)
    assert grid.shape == (*pictures.tile_size(5, 2, side, side), 3)
    with_headers = pictures.tile(images, columns=2, headers=[(0, "one"), (1, "two")])
    assert with_headers.shape == (*pictures.tile_size(5, 2, side, side, headers=True), 3)
    assert pictures.pixel_size(side, side) >= (4 if side <= 32 else 1)


def test_pictures_lie_where_the_grid_says():
    images = np.full((3, 8, 8, 1), 9, dtype=np.uint8)
    images[2] = 200
    grid = pictures.tile(images, columns=2)
    top, left = pictures.tile_size(2, 2, 8, 8)[0], pictures.GAP
    assert (grid[top : top + 64, left : left + 64] == 200).all()


def test_hidden_pixels_are_tinted_and_others_untouched():
    images = np.full((1, 8, 8, 1), 77, dtype=np.uint8)
    hidden = np.zeros((1, 8, 8), dtype=bool)
    hidden[:, :4] = True
    tinted = pictures.tint_hidden(images, hidden)
    assert (tinted[0, :4] == pictures.HIDDEN_TINT).all()
    assert (tinted[0, 4:] == 77).all()


def test_heat_runs_from_dark_to_bright():
    heat = pictures.heat_map(np.linspace(0, 3, 50).reshape(1, 5, 10), 3.0).reshape(50, 3)
    assert tuple(heat[0]) == pictures.HEAT[0]
    assert tuple(heat[-1]) == pictures.HEAT[-1]
    luma = heat @ [0.3, 0.6, 0.1]
    assert (np.diff(luma) > 0).all()


def test_a_saved_picture_is_read_back(tmp_path):
    values = np.random.default_rng(0).integers(0, 17, (3, 64))
    for number, image in enumerate(pictures.to_pictures(values, GREY)):
        Image.fromarray(image[..., 0]).save(tmp_path / f"{number}.png")
    assert np.array_equal(pictures.read_pictures(tmp_path, GREY), values)
    assert np.array_equal(pictures.read_pictures(tmp_path / "1.png", GREY), values[1:2])


def test_bad_picture_files_are_named(tmp_path):
    with pytest.raises(EvidenceError, match="no pictures"):
        pictures.read_pictures(tmp_path, GREY)
    Image.new("L", (9, 8)).save(tmp_path / "wide.png")
    with pytest.raises(EvidenceError) as error:
        pictures.read_pictures(tmp_path, GREY)
    assert "8 x 9" in error.value.found
    assert error.value.where.endswith("wide.png")
    (tmp_path / "wide.png").write_bytes(b"\x89PNG\r\n\x1a\nno")
    with pytest.raises(EvidenceError, match="cannot be read"):
        pictures.read_pictures(tmp_path, GREY)


def test_data_without_pixels_are_refused():
    spec = DatasetSpec("t", "array", 2, (3, 3))
    with pytest.raises(EvidenceError, match="images"):
        pictures.to_pictures(np.zeros((1, 2)), spec)
