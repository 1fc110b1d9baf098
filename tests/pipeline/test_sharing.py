"""Runs share shards and finished stages by URL: real stages, real digits, a real object store."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from distpc.artifacts import Artifact, RunLock
from distpc.artifacts.files import file_digest
from distpc.artifacts.place import Place, _filesystem
from distpc.cli import main
from distpc.config import load_config
from distpc.data.index import ShardIndex
from distpc.data.loader import Loader
from distpc.data.reader import read_shard
from distpc.errors import ArtifactError, DataError, PlaceError
from distpc.pipeline.runner import Pipeline

CONFIG = Path(__file__).parents[2] / "configs" / "digits_hclt.yaml"
UNTIL = "structure"
GRAPH = "structure/region_graph.json"


def pipeline(folder: Path, *overrides: str) -> Pipeline:
    return Pipeline(load_config(CONFIG, ["structure.max_samples=200", *overrides]), folder)


def run(folder: Path, *overrides: str, until: str = UNTIL) -> None:
    pipeline(folder, *overrides).run_until(until)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that knows of no other place."""
    folder = tmp_path_factory.mktemp("runs") / "plain"
    run(folder)
    return folder


@pytest.fixture
def shards(plain: Path, bucket: str) -> Place:
    """The plain run's shards in an object store, as any tool would copy them."""
    place = Place.of(f"{bucket}/shards")
    for path in (plain / "shards").iterdir():
        if not path.name.startswith("."):
            place.put(path.name, path)
    return place


def of_shards(place: Place) -> str:
    return f"data.source={{kind: shards, url: '{place}'}}"


def test_shards_by_url_are_the_same_data(
    plain: Path, shards: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(tmp_path / "run", of_shards(shards))
    assert not list((tmp_path / "run" / "shards").glob("*.tar"))
    here, there = (ShardIndex.load(folder / "index") for folder in (plain, tmp_path / "run"))
    assert [entry.sha256 for entry in here.entries] == [entry.sha256 for entry in there.entries]
    assert (plain / GRAPH).read_bytes() == (tmp_path / "run" / GRAPH).read_bytes()
    for one, other in zip(here.entries[:2], there.entries[:2], strict=True):
        assert (read_shard(one, here.spec).x == read_shard(other, there.spec).x).all()
    batches = [
        next(Loader(index, index.spec, "train", global_batch=64, seed=1).batches(64)).x
        for index in (here, there)
    ]
    assert (batches[0] == batches[1]).all()
    # Moved elsewhere: the same shards, so nothing is redone, and they are read where they are now.
    moved = Place.of(plain / "shards")
    states = [step.state for step in pipeline(tmp_path / "run", of_shards(moved)).steps()[:3]]
    assert states == ["done", "done", "done"]
    run(tmp_path / "run", of_shards(moved))
    assert ShardIndex.load(tmp_path / "run" / "index").entries[0].path == here.entries[0].path


def test_a_worker_elsewhere_reads_by_url(shards: Place, tmp_path: Path) -> None:
    """An entry travels to another process, which has a cache of its own, and no shards."""
    run(tmp_path / "run", of_shards(shards), until="index")
    code = (
        "import sys, pickle; from distpc.data.reader import read_shard;"
        "entry, spec = pickle.load(sys.stdin.buffer); print(len(read_shard(entry, spec).keys))"
    )
    index = ShardIndex.load(tmp_path / "run" / "index")
    environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path / "other-cache")}
    result = subprocess.run(
        [sys.executable, "-c", code],
        input=pickle.dumps((index.entries[0], index.spec)),
        capture_output=True,
        env=environment,
        check=True,
    )
    assert int(result.stdout) == index.entries[0].num_samples
    assert len(list((tmp_path / "other-cache" / "distpc").iterdir())) == 2


def test_shards_that_changed(
    shards: Place, tmp_path: Path, plain: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(DataError, match="manifest vouches") as caught:
        # In a folder the manifest's digests are compared as well.
        folder = Place.of(tmp_path / "copy")
        for path in (plain / "shards").glob("*.*"):
            folder.put(path.name, path)
        folder.put("valid-000000.tar", plain / "shards" / "test-000000.tar")
        run(tmp_path / "other", of_shards(folder), until="index")
    assert caught.value.where == folder.at("valid-000000.tar")

    run(tmp_path / "run", of_shards(shards), "artifacts.cache_bytes=400000", until="index")
    entry = ShardIndex.load(tmp_path / "run" / "index").entries[0]
    spec = ShardIndex.load(tmp_path / "run" / "index").spec
    content = bytearray(shards.read("train-000000.tar"))
    content[600] ^= 1
    shards.write("train-000000.tar", bytes(content))
    with pytest.raises(PlaceError, match="another content") as changed:
        read_shard(entry, spec)
    assert changed.value.where == shards.at("train-000000.tar")
    (error,) = bad_files(tmp_path / "run", capsys)
    assert shards.at("train-000000.tar") in error
    shards.write("train-000000.tar", b"")
    with pytest.raises(PlaceError):
        read_shard(entry, spec)


def test_shards_without_description_or_none(bucket: str, tmp_path: Path, plain: Path) -> None:
    place = Place.of(f"{bucket}/bare")
    with pytest.raises(DataError, match="there are no shards"):
        run(tmp_path, of_shards(place))
    place.put("train-000000.tar", plain / "shards" / "train-000000.tar")
    with pytest.raises(DataError, match="no description") as caught:
        run(tmp_path, of_shards(place))
    assert caught.value.where == place.at("dataset.json")
    assert not (tmp_path / "shards").exists()


def bad_files(target: Path | str, capsys: pytest.CaptureFixture[str]) -> list[str]:
    """What `distpc index --check` says of each bad file; its exit code must agree."""
    capsys.readouterr()
    code = main(["index", "--check", str(target)])
    bad = capsys.readouterr().err.split("[distpc] BAD: ")[1:]
    assert code == (2 if bad else 0)
    return bad


def test_published_stages_are_taken_by_another_run(
    bucket: str, plain: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    place = f"{bucket}/stages"
    run(tmp_path / "one", f"artifacts.url={place}", "artifacts.publish=[index, structure]")
    run(tmp_path / "one", f"artifacts.url={place}")
    assert capsys.readouterr().err.count("published") == 3
    run(tmp_path / "two", f"artifacts.reuse=['{tmp_path / 'nothing'}', '{place}']")
    said = capsys.readouterr().err
    for stage in ("shards", "index", "structure"):
        assert f"{stage}: taken from {place}/{stage}/" in said
        assert Artifact.open(tmp_path / "two" / stage).taken_from is not None
    assert "started" not in said
    assert file_digest(tmp_path / "two" / GRAPH) == file_digest(plain / GRAPH)
    assert ShardIndex.load(tmp_path / "two" / "index").entries[0].path.is_file()

    # Of another config: said why, and computed. A run folder is a place like any other.
    run(tmp_path / "three", f"artifacts.reuse=['{tmp_path / 'one'}']", "structure.num_bins=8")
    said = capsys.readouterr().err
    assert "index: taken from" in said and "structure: finished" in said
    assert "another result: structure.num_bins is 16 there, 8 here" in said

    dry = ["run", str(CONFIG), "structure.max_samples=200", "--out", str(tmp_path / "four")]
    assert main([*dry, "--reuse", place, "--dry-run"]) == 0
    shown = capsys.readouterr().out.split("stages:")[1]
    assert f"take      from {place}/index/" in shown and "finetune   run" in shown
    assert not (tmp_path / "four").exists()

    assert main(["catalogue", place, "--json"]) == 0
    listed = json.loads(capsys.readouterr().out)
    assert [entry["stage"] for entry in listed] == ["index", "shards", "structure"]
    assert listed[2]["made_from"]["fields"][0]["num_bins"] == 16
    assert main(["catalogue", place, "--stage", "structure"]) == 0
    assert listed[2]["fingerprint"] in capsys.readouterr().out
    assert main(["catalogue", f"{bucket}/empty"]) == 2


def test_damage_there_is_computed_again_and_every_bad_file_named(
    bucket: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    place = Place.of(bucket)
    run(tmp_path / "one", f"artifacts.url={bucket}")
    assert bad_files(bucket, capsys) == [] and bad_files(tmp_path / "one", capsys) == []
    names = [name for name in place.list() if name.endswith(("region_graph.json", "-000001.tar"))]
    for name in names:
        place.write(name, b"damaged")
    capsys.readouterr()
    run(tmp_path / "two", f"artifacts.reuse=['{bucket}']", f"artifacts.url={bucket}")
    said = capsys.readouterr().err
    assert "structure: not taken" in said and "damaged there" in said
    assert "index: taken from" in said and "structure: finished" in said
    named = {error.split("where:")[1].split()[0] for error in bad_files(bucket, capsys)}
    assert named == {place.at(name) for name in names}
    run_folder = tmp_path / "one"
    (run_folder / "structure" / "region_graph.json").write_text("{}")
    (run_folder / "index" / "train-000000.npz").unlink()
    damaged = run_folder / "shards" / "valid-000000.tar"
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"x")
    text = "".join(bad_files(run_folder, capsys))
    for name in ("region_graph.json", "train-000000.npz", "valid-000000.tar"):
        assert name in text
    assert "train-000001" not in text


def test_shards_at_a_place_are_those_of_the_index_there(
    plain: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    place = Place.of(tmp_path / "place")
    run(tmp_path / "one", f"artifacts.url={place}", until="index")
    assert bad_files(str(place), capsys) == []
    (name,) = (name for name in place.list() if name.endswith("train-000001.tar"))
    (noted,) = (n for n in place.list() if n.startswith("shards/") and n.endswith("manifest.json"))
    # Shards made anew under the old name, with a manifest that vouches for them.
    content = place.read(name)[:-1] + b"x"
    place.write(name, content)
    manifest = json.loads(place.read(noted))
    manifest["sha256"]["train-000001.tar"] = hashlib.sha256(content).hexdigest()
    place.write(noted, json.dumps(manifest).encode())
    (error,) = bad_files(str(place), capsys)
    assert "a shard has changed since it was indexed" in error and place.at(name) in error
    assert manifest["sha256"]["train-000001.tar"] in error
    del manifest["files"]["train-000001.tar"], manifest["sha256"]["train-000001.tar"]
    place.write(noted, json.dumps(manifest).encode())
    (error,) = bad_files(str(place), capsys)
    assert "a shard of the index is missing" in error and place.at(name) in error

    # Shards that lie elsewhere are read there; without them there is nothing to compare with.
    copy, other = Place.of(tmp_path / "copy"), Place.of(tmp_path / "other")
    for path in (plain / "shards").glob("*.*"):
        copy.put(path.name, path)
    run(tmp_path / "two", of_shards(copy), f"artifacts.url={other}", until="index")
    assert bad_files(str(other), capsys) == []
    copy.write("valid-000000.tar", b"x")
    (error,) = bad_files(str(other), capsys)
    assert "changed since it was indexed" in error and copy.at("valid-000000.tar") in error
    shutil.rmtree(tmp_path / "other" / "shards")
    capsys.readouterr()
    assert main(["index", "--check", str(other)]) == 0
    assert "the shards are not at this place, not compared" in capsys.readouterr().err


def test_secrets_are_nowhere(
    bucket: str, shards: Place, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    run(tmp_path / "run", of_shards(shards), f"artifacts.url={bucket}/out")
    assert main(["index", "--check", str(tmp_path / "run")]) == 0
    secrets = (os.environ["AWS_SECRET_ACCESS_KEY"].encode(), b"an-access-key")
    files = [path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()]
    place = Place.of(bucket)
    files += [place.read(name) for name in place.list()]
    shown = "".join(capfd.readouterr()).encode()
    assert len(files) > 20 and b"published" in shown
    assert not any(secret in content for content in [*files, shown] for secret in secrets)


def test_two_runs_in_one_folder(
    tmp_path: Path, bucket: str, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    run(out, until="index")
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    with RunLock(out):
        command = ["shards", str(CONFIG), "seed=1", "--out", str(out), f"artifacts.url={bucket}"]
        assert main(command) == 2
    said = capsys.readouterr().err
    assert "another process is working in this run folder" in said
    assert f"process {os.getpid()}" in said
    after = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    assert {path for path in before | after if before.get(path) != after.get(path)} <= {
        out / ".lock"
    }
    assert Place.of(bucket).list() == {}


def test_no_server_is_told_before_anything_is_written(
    bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    for option in ("artifacts.url", "artifacts.reuse"):
        value = bucket if option == "artifacts.url" else f"['{bucket}']"
        with pytest.raises(PlaceError, match="does not answer"):
            run(tmp_path / "run", f"{option}={value}")
    assert not (tmp_path / "run").exists()
    with pytest.raises(ArtifactError, match="its own run folder"):
        run(tmp_path / "run", f"artifacts.url={tmp_path / 'run'}")
    assert _filesystem(False) is not None
