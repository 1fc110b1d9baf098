"""Hostile and broken tars."""

from __future__ import annotations

import gzip
import io
import tarfile
from pathlib import Path

import pytest

from distpc.data.archive import open_tar, regular_members
from distpc.errors import DataError


def add(archive: tarfile.TarFile, name: str, content: bytes = b"x", **fields: object) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(content)
    for field, value in fields.items():
        setattr(member, field, value)
    archive.addfile(member, io.BytesIO(content))


def names(path: Path) -> list[str]:
    with open_tar(path, path.parent) as handle:
        return [member.name for member in regular_members(handle, path)]


@pytest.fixture
def good(tmp_path: Path) -> Path:
    path = tmp_path / "good.tar"
    with tarfile.open(path, "w") as archive:
        add(archive, "folder", b"", type=tarfile.DIRTYPE)
        for number in range(20):
            add(archive, f"folder/{number}.png", bytes(700 + number))
    return path


def test_files_of_a_good_archive(good: Path) -> None:
    assert names(good) == [f"folder/{number}.png" for number in range(20)]


def test_packed_archive(tmp_path: Path) -> None:
    path = tmp_path / "a.tar.gz"
    with tarfile.open(path, "w:gz") as archive:
        add(archive, "a.png", bytes(range(256)) * 20)
    assert names(path) == ["a.png"]
    assert sorted(file.name for file in tmp_path.iterdir()) == ["a.tar.gz"]
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(DataError, match="cut"):
        names(path)


@pytest.mark.parametrize(
    "name", ["../escape.png", "/etc/escape.png", "a/../../escape.png", "a\\..\\escape.png"]
)
def test_paths_that_leave_the_folder(tmp_path: Path, name: str) -> None:
    path = tmp_path / "bad.tar"
    with tarfile.open(path, "w") as archive:
        add(archive, "fine.png")
        add(archive, name)
    with pytest.raises(DataError, match="leave the target folder"):
        names(path)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["bad.tar"]


@pytest.mark.parametrize(
    "kind",
    [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE],
)
def test_links_and_devices(tmp_path: Path, kind: bytes) -> None:
    path = tmp_path / "bad.tar"
    with tarfile.open(path, "w") as archive:
        add(archive, "fine.png")
        add(archive, "odd.png", b"", type=kind, linkname="/etc/passwd")
    with pytest.raises(DataError, match="no plain file") as caught:
        names(path)
    assert "odd.png" in str(caught.value)


def test_every_cut_is_noticed(good: Path) -> None:
    content = good.read_bytes()
    end = content.rstrip(b"\0")
    for length in range(0, len(end), 333):
        good.write_bytes(content[:length])
        with pytest.raises(DataError, match="cut or broken"):
            names(good)
    # Between two members a reader sees nothing wrong, but for the missing end mark.
    with tarfile.open(fileobj=io.BytesIO(content)) as archive:
        border = archive.getmembers()[7].offset
    good.write_bytes(content[:border])
    with pytest.raises(DataError, match="cut or broken"):
        names(good)


def test_archives_that_unpack_to_absurd_sizes(tmp_path: Path) -> None:
    path = tmp_path / "bomb.tar.gz"
    path.write_bytes(gzip.compress(bytes(30_000_000)))
    with pytest.raises(DataError, match="absurd size"):
        names(path)


def test_no_archive_at_all(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    path.write_bytes(b"this is not a tar archive" * 100)
    with pytest.raises(DataError, match="cut or broken"):
        names(path)
