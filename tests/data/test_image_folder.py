"""Folders and tars of image files, good ones and hostile ones."""

from __future__ import annotations

import io
import os
import struct
import tarfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from distpc.config.sources import ImageFolderSource
from distpc.data.sources import BadSampleError, Source, open_source
from distpc.errors import DataError

from .conftest import Build, run_shards


def picture(seed: int, height: int = 6, width: int = 6) -> Image.Image:
    rng = np.random.default_rng(seed)
    return Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))


def pixels(seed: int, height: int = 6, width: int = 6) -> np.ndarray:
    return np.asarray(picture(seed, height, width))


def fill(folder: Path, count: int) -> None:
    (folder / "sub").mkdir(parents=True)
    for number in range(count):
        place = folder if number % 2 else folder / "sub"
        picture(number).save(place / f"{number:02d}.png")


def huge_png() -> bytes:
    """A PNG of a few hundred bytes that says it has 60,000 x 60,000 pixels."""
    header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(bytes(1000))), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        for kind, body in chunks
    )


def opened(path: Path, **fields: Any) -> Source:
    config = ImageFolderSource(kind="image_folder", path=str(path), **fields)
    return open_source(config, path.parent)


def test_folder_in_order_of_name(tmp_path: Path) -> None:
    folder = tmp_path / "set"
    fill(folder, 6)
    (folder / "readme.md").write_text("no image")
    (folder / "._00.png").write_text("no image either")
    (folder / "again.png").symlink_to(folder / "01.png")
    source = opened(folder)
    order = [1, 3, 5, 0, 2, 4]
    found = [source.read(position).reshape(6, 6, 3) for position in range(source.num_samples)]
    assert np.array_equal(found, [pixels(seed) for seed in order])
    assert source.facts() == {"ignored_files": 3}
    assert source.spec.image_shape == (6, 6, 3) and source.spec.name == "set"


@pytest.mark.parametrize("suffix", ["tar", "tar.gz"])
def test_tar_reads_as_the_folder_does(tmp_path: Path, suffix: str) -> None:
    folder = tmp_path / "set"
    fill(folder, 6)
    path = tmp_path / f"set.{suffix}"
    with tarfile.open(path, "w:gz" if suffix.endswith("gz") else "w") as archive:
        archive.add(folder, arcname=".")
    source, expected = opened(path), opened(folder)
    for position in range(6):
        assert np.array_equal(source.read(position), expected.read(position))
    source.close()


def test_crop_resize_and_modes(tmp_path: Path) -> None:
    picture(0, 8, 12).save(tmp_path / "a.png")
    found = opened(tmp_path, crop_size_pixels=4).read(0).reshape(4, 4, 3)
    assert np.array_equal(found, pixels(0, 8, 12)[2:6, 4:8])
    found = opened(tmp_path, crop_size_pixels=8, resize_pixels=4).read(0).reshape(4, 4, 3)
    means = pixels(0, 8, 12)[:, 2:10].reshape(4, 2, 4, 2, 3).mean(axis=(1, 3))
    assert np.abs(found - means).max() <= 1
    source = opened(tmp_path, mode="grey")
    assert source.spec.image_shape == (8, 12, 1)
    assert np.array_equal(source.read(0), np.asarray(picture(0, 8, 12).convert("L")).reshape(-1))


def test_transparent_pixels_are_white(tmp_path: Path) -> None:
    Image.new("RGBA", (2, 2), (10, 20, 30, 0)).save(tmp_path / "a.png")
    assert opened(tmp_path).read(0).tolist() == [255] * 12


def test_what_is_refused_at_once(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no images"):
        opened(tmp_path)
    picture(0).save(tmp_path / "a.png")
    with pytest.raises(DataError, match="smaller than the crop"):
        opened(tmp_path, crop_size_pixels=7)
    picture(1, 6, 7).save(tmp_path / "b.png")
    with pytest.raises(DataError, match="differ in size") as caught:
        opened(tmp_path).read(1)
    assert "b.png" in str(caught.value) and "resize_pixels" in str(caught.value)


def test_names_that_escape_or_repeat(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    picture(0).save(buffer, "PNG")
    for bad, message in (("../../evil.png", "leave the target"), ("a.png", "a name twice")):
        path = tmp_path / "bad.tar"
        with tarfile.open(path, "w") as archive:
            for name in ("a.png", bad):
                member = tarfile.TarInfo(name)
                member.size = len(buffer.getvalue())
                archive.addfile(member, io.BytesIO(buffer.getvalue()))
        with pytest.raises(DataError, match=message):
            opened(path)
    assert not (tmp_path.parent / "evil.png").exists()


def test_undecodable_files_say_why(tmp_path: Path) -> None:
    picture(0).save(tmp_path / "a.png")
    buffer = io.BytesIO()
    picture(1, 64, 64).save(buffer, "JPEG")
    (tmp_path / "b.jpg").write_bytes(buffer.getvalue()[:400])
    (tmp_path / "c.png").write_bytes(huge_png())
    Image.fromarray(np.full((6, 6), 40_000, np.uint16)).save(tmp_path / "d.png")
    (tmp_path / "e.bmp").write_bytes(b"GIF89a" + bytes(50))
    source = opened(tmp_path)
    reasons = {}
    for position in range(1, 5):
        with pytest.raises(BadSampleError) as caught:
            source.read(position)
        reasons[caught.value.name] = caught.value.reason
    assert "truncated" in reasons["b.jpg"].lower()
    assert "too many pixels" in reasons["c.png"]
    assert "8 bits" in reasons["d.png"]
    assert set(reasons) == {"b.jpg", "c.png", "d.png", "e.bmp"}


def test_budget_of_bad_samples(tmp_path: Path, build: Build) -> None:
    folder = tmp_path / "set"
    fill(folder, 30)
    (folder / "03.png").write_bytes(huge_png())
    (folder / "07.png").write_bytes(b"no image")
    data: dict[str, Any] = {"source": {"kind": "image_folder", "path": str(folder)}}
    with pytest.raises(DataError, match="cannot be decoded") as caught:
        build(data)
    assert ".png" in str(caught.value) and "max_bad_samples=0" in str(caught.value)
    with pytest.raises(DataError, match="than the budget allows"):
        build({**data, "max_bad_samples": 1})
    data["max_bad_samples"] = 2
    index = build(data)
    assert sum(entry.num_samples for entry in index.entries) == 28
    ctx = run_shards(tmp_path, data)
    assert {bad["name"] for bad in ctx.metadata["bad_samples"]} == {"03.png", "07.png"}
    assert sum(ctx.metadata["num_samples"].values()) == 28


def test_a_picture_painted_over_changes_the_identity(tmp_path: Path) -> None:
    folder = tmp_path / "set"
    fill(folder, 3)
    first = opened(folder).identity()
    assert opened(folder).identity() == first
    path = folder / "01.png"
    content = bytearray(path.read_bytes())
    content[-20] ^= 1
    path.write_bytes(content)
    status = path.stat()
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns + 1))
    assert opened(folder).identity() != first


@pytest.mark.parametrize("suffix", [".tar", ".tar.gz"])
def test_an_archive_packed_anew_changes_the_identity(tmp_path: Path, suffix: str) -> None:
    folder, path = tmp_path / "set", tmp_path / f"set{suffix}"
    fill(folder, 3)

    def identity() -> object:
        source = opened(path)
        source.close()
        return source.identity()

    with tarfile.open(path, "w:gz" if suffix.endswith("gz") else "w") as archive:
        archive.add(folder, "set")
    first = identity()
    assert identity() == first
    status = path.stat()
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns + 1))
    assert identity() != first


def test_random_crops_are_the_same_in_every_run(tmp_path: Path) -> None:
    folder = tmp_path / "set"
    folder.mkdir()
    for number in range(5):
        picture(number, 12, 12).save(folder / f"{number:02d}.png")
    fields = {"crop_size_pixels": 4, "crop_at": "random", "crop_step_pixels": 2}
    source = opened(folder, crops_per_image=3, **fields)
    assert source.num_samples == 15
    assert source.spec.image_shape == (4, 4, 3)
    assert source.groups is not None
    assert source.groups.tolist() == [0] * 3 + [1] * 3 + [2] * 3 + [3] * 3 + [4] * 3
    crops = [source.read(position).reshape(4, 4, 3) for position in range(15)]
    whole = pixels(2, 12, 12)
    corners = {
        (top, left)
        for crop in crops[6:9]
        for top in range(9)
        for left in range(9)
        if np.array_equal(whole[top : top + 4, left : left + 4], crop)
    }
    assert corners
    assert all(top % 2 == left % 2 == 0 for top, left in corners)
    assert len({crop.tobytes() for crop in crops}) > 10
    again = opened(folder, crops_per_image=3, **fields)
    assert all(np.array_equal(again.read(p).reshape(4, 4, 3), crops[p]) for p in range(15))


def test_test_images_of_their_own(tmp_path: Path) -> None:
    for name, numbers in (("train", range(6)), ("test", range(10, 13))):
        (tmp_path / name).mkdir()
        for number in numbers:
            picture(number).save(tmp_path / name / f"{number:02d}.png")
    source = opened(tmp_path / "train", test_path=str(tmp_path / "test"))
    assert (source.num_samples, source.num_published_test) == (9, 3)
    assert np.array_equal(source.read(7).reshape(6, 6, 3), pixels(11))
    assert set(source.identity()) == {"train", "test"}


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"crop_at": "random"}, "crop_size_pixels"),
        ({"crops_per_image": 2, "crop_size_pixels": 4}, "crop_at random"),
    ],
)
def test_crops_that_make_no_sense_are_refused(fields: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        ImageFolderSource(kind="image_folder", path="x", **fields)
