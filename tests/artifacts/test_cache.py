"""The cache of object stores: bounded, shared by processes, and nothing in use is dropped."""

from __future__ import annotations

import hashlib
import subprocess
import sys
import time
from pathlib import Path

import pytest

from distpc.artifacts import cache as caches
from distpc.artifacts.cache import Cache
from distpc.artifacts.place import Place
from distpc.errors import PlaceError, ResourceError

SIZE = 1000


def content(number: int) -> bytes:
    return bytes([number]) * SIZE


def digest(number: int) -> str:
    return hashlib.sha256(content(number)).hexdigest()


@pytest.fixture
def place(bucket: str) -> Place:
    """Six files of SIZE bytes, named 0 .. 5."""
    made = Place.of(f"{bucket}/files")
    for number in range(6):
        made.write(str(number), content(number))
    return made


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "copies"


def read(cache: Cache, place: Place, number: int) -> bytes:
    with cache.hold(place, str(number), SIZE, digest(number)) as (path, _):
        return path.read_bytes()


def kept(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir() if not path.name.startswith(".")}


def test_least_recently_used_goes_first(place: Place, folder: Path) -> None:
    cache = Cache(str(folder), 3 * SIZE)
    for number in (0, 1, 2, 0, 3):
        assert read(cache, place, number) == content(number)
        time.sleep(0.01)
    assert kept(folder) == {digest(0), digest(2), digest(3)}
    place.write("0", b"gone")
    assert read(cache, place, 0) == content(0), "read from the copy"


def test_what_is_in_use_stays(place: Place, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(caches, "WAIT_SECONDS", 0.3)
    cache = Cache(str(folder), 2 * SIZE)
    with (
        cache.hold(place, "0", SIZE, digest(0)) as (first, _),
        cache.hold(place, "1", SIZE, digest(1)),
    ):
        with pytest.raises(ResourceError, match="too small") as caught:
            read(cache, place, 2)
        assert "artifacts.cache_bytes" in (caught.value.fix or "")
        assert first.read_bytes() == content(0)
    assert read(cache, place, 2) == content(2)
    with pytest.raises(ResourceError):
        read(Cache(str(folder), SIZE - 1), place, 3)


def test_changed_missing_and_cut_files(place: Place, folder: Path) -> None:
    cache = Cache(str(folder), 10 * SIZE)
    place.write("0", content(7))
    with pytest.raises(PlaceError, match="another content") as caught:
        read(cache, place, 0)
    assert caught.value.where == place.at("0") and digest(7) in str(caught.value.found)
    with pytest.raises(PlaceError, match="missing"), cache.hold(place, "none", SIZE):
        pass
    read(cache, place, 1)
    (folder / digest(1)).write_bytes(b"cut")
    assert read(cache, place, 1) == content(1)
    assert kept(folder) == {digest(1)}


def test_unknown_digests_are_found(place: Place, folder: Path) -> None:
    with Cache(str(folder)).hold(place, "4", SIZE) as (path, found):
        assert found == digest(4) == path.name


DIES = """
import os, signal, sys
from distpc.artifacts.cache import Cache
from distpc.artifacts.place import Place

Place.fetch = lambda self, name, target: (
    target.write_bytes(b"half"), os.kill(os.getpid(), signal.SIGKILL)
)
with Cache(sys.argv[1], 1500).hold(Place.of(sys.argv[2]), "0", 1000, sys.argv[3]):
    pass
"""


def test_a_dead_download_leaves_no_reservation(place: Place, folder: Path) -> None:
    code = [sys.executable, "-c", DIES, str(folder), str(place), digest(0)]
    assert subprocess.run(code, check=False).returncode < 0
    assert len([path for path in folder.iterdir() if digest(0) in path.name]) == 2
    assert read(Cache(str(folder), 1500), place, 1) == content(1)
    assert {path.name for path in folder.iterdir()} == {digest(1), ".lock"}


READS = """
import hashlib, random, sys
from distpc.artifacts.cache import Cache
from distpc.artifacts.place import Place

cache, place = Cache(sys.argv[1], 3000), Place.of(sys.argv[2])
draw = random.Random(int(sys.argv[3]))
fetched = []
fetch = Place.fetch
Place.fetch = lambda self, name, target: (fetched.append(name), fetch(self, name, target))

def size(copy):
    try:
        return copy.stat().st_size
    except FileNotFoundError:
        return 0  # removed by another process since it was listed

for _ in range(25):
    number = draw.randrange(6)
    content = bytes([number]) * 1000
    with cache.hold(place, str(number), 1000, hashlib.sha256(content).hexdigest()) as (path, _):
        assert path.read_bytes() == content
        total = sum(size(p) for p in path.parent.iterdir() if p.name[0] != ".")
        assert total <= 3000, total
print(len(fetched))
"""


def test_several_processes_share_it(place: Place, folder: Path) -> None:
    readers = [
        subprocess.Popen(
            [sys.executable, "-c", READS, str(folder), str(place), str(seed)],
            stdout=subprocess.PIPE,
            text=True,
        )
        for seed in range(3)
    ]
    fetched = [int(reader.communicate(timeout=120)[0]) for reader in readers]
    assert [reader.returncode for reader in readers] == [0, 0, 0]
    assert sum(fetched) < 3 * 25
    names = {path.name for path in folder.iterdir()}
    assert len(names - {".lock"}) <= 3 and (folder / ".lock").stat().st_size == 0
