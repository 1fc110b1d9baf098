"""Artifacts are complete or absent, and a run folder has one owner."""

import errno
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest

from distpc.artifacts import (
    Artifact,
    RunLock,
    atomic_path,
    fingerprint,
    read_json,
    remove_partials,
    write_json,
)
from distpc.errors import ArtifactError, DataError, ResourceError


def test_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    target = tmp_path / "value.json"
    write_json(target, {"a": 1})
    with pytest.raises(RuntimeError), atomic_path(target) as partial:
        partial.write_text("half")
        raise RuntimeError
    assert read_json(target) == {"a": 1}
    assert list(tmp_path.iterdir()) == [target]


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
def test_full_disk_is_a_resource_error(tmp_path: Path, number: int) -> None:
    with pytest.raises(ResourceError, match="no space left"), atomic_path(tmp_path / "x"):
        raise OSError(number, "No space left on device")


def test_writers_with_equal_process_ids_use_different_names(tmp_path: Path) -> None:
    with atomic_path(tmp_path / "x") as one, atomic_path(tmp_path / "x") as other:
        assert one != other
        assert f".{os.getpid()}-" in one.name
        one.write_text("one")
        other.write_text("other")
    assert (tmp_path / "x").read_text() == "one"


def test_partials_of_dead_writers_are_removed(tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / ".x.tar.123.partial").write_text("half")
    (tmp_path / "deep" / "x.tar").write_text("whole")
    remove_partials(tmp_path)
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["x.tar"]


def test_seal_and_open(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "data.bin").write_bytes(b"12345")
    Artifact.seal(tmp_path, "shards", "f" * 16, 1.5, {"n": 3})
    artifact = Artifact.open(tmp_path)
    assert (artifact.stage, artifact.metadata) == ("shards", {"n": 3})
    assert artifact.files == {"sub/data.bin": 5}


@pytest.mark.parametrize("damage", ["cut", "missing", "older", "newer", "no json"])
def test_damaged_artifacts_are_refused(tmp_path: Path, damage: str) -> None:
    (tmp_path / "data.bin").write_bytes(b"12345")
    Artifact.seal(tmp_path, "shards", "f" * 16, 1.5, {})
    manifest = tmp_path / "manifest.json"
    match damage:
        case "cut":
            (tmp_path / "data.bin").write_bytes(b"123")
        case "missing":
            (tmp_path / "data.bin").unlink()
        case "older":
            write_json(manifest, {**read_json(manifest), "format_version": 0})
        case "newer":
            write_json(manifest, {**read_json(manifest), "format_version": 99})
        case "no json":
            manifest.write_text("{")
    with pytest.raises(ArtifactError):
        Artifact.open(tmp_path)


def test_find_without_manifest(tmp_path: Path) -> None:
    assert Artifact.find(tmp_path) is None


def test_fingerprint_ignores_key_order_only() -> None:
    assert fingerprint({"a": 1, "b": [2]}) == fingerprint({"b": [2], "a": 1})
    assert fingerprint({"a": 1}) != fingerprint({"a": 2})


HOLDER = """
import sys, time
from pathlib import Path
from distpc.artifacts import RunLock
with RunLock(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


def test_lock_is_exclusive_and_dies_with_its_owner(tmp_path: Path) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(tmp_path)], stdout=subprocess.PIPE, text=True
    ) as holder:
        assert holder.stdout is not None and holder.stdout.readline().strip() == "held"
        with pytest.raises(ArtifactError, match=str(holder.pid)), RunLock(tmp_path):
            pass
        holder.kill()
        holder.wait()
    with RunLock(tmp_path):
        pass


def test_errors_cross_process_borders() -> None:
    error = DataError("bad", where="a.tar", found=1, expected=2, fix="mend")
    again = pickle.loads(pickle.dumps(error))
    assert type(again) is DataError and str(again) == str(error)
    assert "found:    1" in str(error)
