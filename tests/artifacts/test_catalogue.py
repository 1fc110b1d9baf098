"""Finished stages at a place: published whole or not at all, found by fingerprint, checked."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from distpc.artifacts import Artifact, fingerprint, write_json
from distpc.artifacts.catalogue import check, difference, entries, find, publish, take
from distpc.artifacts.fields import ABSENT, Named, names_in, plain
from distpc.artifacts.place import Place
from distpc.errors import ArtifactError

MADE_FROM = {"fields": {"num_clusters": 4}, "inputs": {"features": "abc"}}
MARK = fingerprint(MADE_FROM)


def finished(folder: Path, text: str = "12345") -> Artifact:
    """A finished stage of two files."""
    (folder / "sub").mkdir(parents=True)
    (folder / "sub" / "a.bin").write_text(text)
    (folder / "b.bin").write_text("b")
    return Artifact.seal(folder, "fit", MARK, 1.0, {"n": 3}, MADE_FROM)


@pytest.fixture(params=["folder", "object store"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Place:
    if request.param == "folder":
        return Place.of(tmp_path / "place")
    return Place.of(request.getfixturevalue("bucket"))


def test_publish_find_take(place: Place, tmp_path: Path) -> None:
    artifact = finished(tmp_path / "fit")
    assert find(place, "fit", MARK) is None
    arrived: list[int] = []
    assert publish(artifact, place, arrived.append) and sorted(arrived) == [1, 5]
    assert not publish(artifact, place), "once is enough"
    assert find(place, "fit", "f" * 16) is None and find(place, "assign", MARK) is None
    entry = find(place, "fit", MARK)
    assert entry is not None and list(check(entry)) == [] and entry.num_bytes == 6
    assert [found.artifact.fingerprint for found in entries(place)] == [MARK]
    taken = take(entry, tmp_path / "taken")
    assert taken.taken_from == str(entry.place)
    assert Artifact.open(tmp_path / "taken") == taken
    assert (taken.metadata, taken.sha256) == ({"n": 3}, artifact.sha256)
    assert (tmp_path / "taken" / "sub" / "a.bin").read_text() == "12345"


def test_a_run_folder_is_a_catalogue(tmp_path: Path) -> None:
    finished(tmp_path / "run" / "fit")
    entry = find(Place.of(tmp_path / "run"), "fit", MARK)
    assert entry is not None
    assert take(entry, tmp_path / "taken").taken_from == str(tmp_path / "run" / "fit")


def damage_content(place: Place, name: str) -> None:
    place.write(name, b"x2345")


def damage_size(place: Place, name: str) -> None:
    place.write(name, b"")


@pytest.mark.parametrize("damage", [damage_content, damage_size])
def test_damage_is_named_and_never_taken(
    place: Place, tmp_path: Path, damage: Callable[[Place, str], None]
) -> None:
    publish(finished(tmp_path / "fit"), place)
    entry = find(place, "fit", MARK)
    assert entry is not None
    damage(entry.place, "sub/a.bin")
    (error,) = check(entry)
    assert error.where == entry.place.at("sub/a.bin")
    with pytest.raises(ArtifactError) as caught:
        take(entry, tmp_path / "taken")
    assert caught.value.where == error.where
    assert Artifact.find(tmp_path / "taken") is None
    assert not (tmp_path / "taken" / "sub" / "a.bin").exists()


@pytest.mark.parametrize("name", ["../outside", "/tmp/outside"])
def test_a_manifest_cannot_write_elsewhere(tmp_path: Path, name: str) -> None:
    artifact = finished(tmp_path / "fit")
    (tmp_path / "outside").write_text("12345")
    forged = {**artifact.to_json(), "files": {name: 5}, "sha256": {name: "0" * 64}}
    write_json(tmp_path / "fit" / "manifest.json", forged)
    (entry,) = entries(Place.of(tmp_path / "fit"))
    with pytest.raises(ArtifactError, match="outside of its folder"):
        take(entry, tmp_path / "deep" / "taken")
    assert not (tmp_path / "deep" / "outside").exists()


def test_a_forged_fingerprint_is_noticed(tmp_path: Path) -> None:
    (tmp_path / "b.bin").touch()
    Artifact.seal(tmp_path, "fit", "0" * 16, 1.0, {}, MADE_FROM)
    (entry,) = entries(Place.of(tmp_path))
    assert [error.found for error in check(entry)] == ["0" * 16]


def test_a_file_changed_after_the_end_is_not_published(place: Place, tmp_path: Path) -> None:
    artifact = finished(tmp_path / "fit")
    (tmp_path / "fit" / "sub" / "a.bin").write_text("54321")
    with pytest.raises(ArtifactError, match="another content"):
        publish(artifact, place)
    assert find(place, "fit", MARK) is None and list(entries(place)) == []


def test_two_results_of_one_fingerprint_never_mix(place: Place, tmp_path: Path) -> None:
    one, other = finished(tmp_path / "one"), finished(tmp_path / "other", "54321")
    with pytest.raises(RuntimeError):
        publish(one, place, broken_off)
    assert publish(other, place)
    entry = find(place, "fit", MARK)
    assert entry is not None and list(check(entry)) == []
    assert entry.place.read("sub/a.bin") == b"54321"


def broken_off(count: int) -> None:
    raise RuntimeError("broken off")


DIES = """
import os, signal, sys
from pathlib import Path
from distpc.artifacts import Artifact
from distpc.artifacts import catalogue
from distpc.artifacts.place import Place

catalogue.THREADS = 1
publish = catalogue.publish
publish(
    Artifact.open(Path(sys.argv[1])),
    Place.of(sys.argv[2]),
    lambda count: os.kill(os.getpid(), signal.SIGKILL),
)
"""


def test_a_killed_upload_counts_for_nothing_and_goes_on(
    place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    artifact = finished(tmp_path / "fit")
    code = [sys.executable, "-c", DIES, str(tmp_path / "fit"), str(place)]
    assert subprocess.run(code, check=False).returncode < 0
    assert len(place.list()) == 1, "one file of two, and no manifest"
    assert find(place, "fit", MARK) is None and list(entries(place)) == []
    brought: list[str] = []
    put = Place.put

    def counted(self: Place, name: str, source: Path) -> None:
        brought.append(name)
        put(self, name, source)

    monkeypatch.setattr(Place, "put", counted)
    assert publish(artifact, place) and len(brought) == 1
    entry = find(place, "fit", MARK)
    assert entry is not None and list(check(entry)) == []


def test_differences_are_told() -> None:
    other = {"fields": {"num_clusters": 8}, "inputs": {"features": "abc"}}
    assert difference(MADE_FROM, other) == "fields.num_clusters is 4 there, 8 here"
    assert difference({"fields": [1, 2]}, {"fields": [1, 3]}) == "fields[1] is 2 there, 3 here"
    longer = "fields[2] is absent there, 5 here"
    assert difference({"fields": [1, 2]}, {"fields": [1, 2, 5]}) == longer
    assert difference(None, other) == "it does not say what it was made from"


def test_all_that_differs_is_named() -> None:
    fields = [Named("latents", {"num_clusters": 4, "init": "random"}), Named("seed", 3)]
    names = names_in(fields, "fields")
    here = {"fields": plain(fields)}
    there = {"fields": [{"num_clusters": 8, "init": "random"}, 5]}
    found = difference(there, here, names, ("before", "now"))
    assert found == "latents.num_clusters is 8 before, 4 now; seed is 5 before, 3 now"
    whole = difference({"fields": [{"width": 2}, 3]}, here, names)
    assert whole == 'latents is {"width": 2} there, {"num_clusters": 4, "init": "random"} here'
    many = difference({"fields": [1] * 9}, {"fields": [2] * 9}, names)
    assert many.startswith("latents is 1 there, 2 here; seed is 1 there")
    assert many.endswith("; 4 more differences")
    assert "..." in difference({"a": "x" * 200}, {"a": "y"}, {})


def test_what_is_left_out_has_a_name() -> None:
    def fields(samples: object) -> list[object]:
        return [Named("seed", 3), Named("latents.fit_samples", samples)]

    assert plain(fields(ABSENT)) == [3]
    with_it = {"fields": plain(fields(64))}
    for there, samples, words in (
        (with_it, ABSENT, "64 there, absent here"),
        ({"fields": [3]}, 64, "absent there, 64 here"),
    ):
        names = names_in(fields(samples), "fields")
        here = {"fields": plain(fields(samples))}
        assert difference(there, here, names) == f"latents.fit_samples is {words}"
    # What is left out before another value takes no place.
    state_and_bank = [Named("teacher.state", ABSENT), Named("teacher.bank", 5)]
    assert plain(state_and_bank) == [5]
    assert names_in(state_and_bank, "fields")["fields[0]"] == "teacher.bank"
