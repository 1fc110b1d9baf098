"""The Ray stages on real data and a real local cluster, deaths of workers and driver included."""

from __future__ import annotations

import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from distpc.config.load import dump_config
from distpc.data import index as data_index
from distpc.data import shards as data_shards
from distpc.data.patches import PatchGrid
from distpc.data.reader import read_shard as read_data_shard
from distpc.errors import LatentError
from distpc.latents import assign, extract, fit, load_latents, shard_work
from distpc.latents.codebook import Codebook, read_codebook, write_codebook
from distpc.latents.state import FitState
from distpc.latents.store import feature_shards, read_shard, shard_path, write_shard
from distpc.teachers import train as teacher_train

from . import stages
from .jobs import blob_shards, local_job, write_features
from .stages import Run

LATENTS = {"num_clusters": 16, "num_rounds": 8, "num_restarts": 2}


def parallel(num_workers: int) -> dict[str, object]:
    """Room for up to four workers on two cores."""
    return {"num_workers": num_workers, "cpus_per_worker": 0.5}


def script(*arguments: str, **options: object) -> subprocess.Popen[str]:
    """A process that runs a function of `stages`."""
    root = Path(__file__).parents[2]
    path = os.pathsep.join([str(root), str(root / "tests")])
    return subprocess.Popen(
        [sys.executable, stages.__file__, *arguments],
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        text=True,
        **options,
    )


@pytest.fixture(scope="module", autouse=True)
def cluster():
    """An existing cluster that all stages join: starting one each would take most of the time."""
    # Ray reads these once a process, so they stay.
    os.environ.setdefault("RAY_AUTH_MODE", "token")
    os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("RAY_ADDRESS", raising=False)
        with script("serve", stdin=subprocess.PIPE, stdout=subprocess.PIPE) as server:
            patch.setenv("RAY_ADDRESS", server.stdout.readline().strip())
            yield
            server.stdin.close()


@pytest.fixture(scope="module")
def upstream(tmp_path_factory):
    """Digits: shards, index and the pixels teacher."""
    run = Run(tmp_path_factory.mktemp("upstream"))
    run.stage("shards", data_shards.run)
    run.stage("index", data_index.run)
    run.stage("teacher", teacher_train.run)
    return run.artifacts


@pytest.fixture(scope="module")
def finished(upstream, tmp_path_factory):
    """Digits' features, centroids and latents, by two workers of which one each died."""
    folder = tmp_path_factory.mktemp("finished")
    run = Run(folder, upstream, latents=LATENTS, parallel=parallel(2))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(extract, "WORKER", stages.DYING_EXTRACTOR)
        patch.setattr(fit, "WORKER", stages.DYING_HOLDER)
        run.stage("features", extract.run)
        (folder / ".died").unlink()
        run.stage("fit", fit.run)
        (folder / ".died").unlink()
    run.stage("assign", assign.run)
    return run


def train_shards(upstream):
    index = data_index.ShardIndex.load(upstream["index"].path)
    return index.spec, index.shards("train")


def test_features_are_the_teachers_and_keep_their_keys(finished, upstream):
    spec, entries = train_shards(upstream)
    variables = PatchGrid.of(spec, 2).variables()
    for entry in entries:
        shard = read_data_shard(entry, spec)
        found = read_shard(shard_path(finished.folder / "features", entry.name), "features")
        assert found.keys == shard.keys
        np.testing.assert_allclose(
            found.rows.float().numpy(), shard.x[:, variables] / 16, atol=1e-3
        )
    facts = finished.artifacts["features"].metadata
    assert facts["samples"] == sum(entry.num_samples for entry in entries)
    assert facts["grid"] == [4, 4]
    assert (facts["shards"], facts["kept_shards"]) == (len(entries), 0)
    assert facts["bad_samples"] == {}
    assert facts["bytes"] > facts["samples"] * 16 * 4 * 2


def test_latents_are_the_nearest_centroids(finished, upstream):
    _, entries = train_shards(upstream)
    folder = finished.folder
    features = finished.artifacts["features"]
    centroids = read_codebook(
        folder / "fit" / fit.CENTROIDS, features=features.fingerprint, shape=(16, 4)
    ).centroids.numpy()
    usage = np.zeros(16, dtype=int)
    squares = 0.0
    for entry in entries:
        rows = read_shard(shard_path(features.path, entry.name), "features")
        keys, latents = load_latents(folder / "assign", entry.name)
        assert keys == rows.keys
        assert latents.dtype == np.int32
        distances = np.square(rows.rows.numpy()[:, :, None].astype(float) - centroids).sum(-1)
        np.testing.assert_array_equal(latents, distances.argmin(-1))
        usage += np.bincount(latents.ravel(), minlength=16)
        squares += distances.min(-1).sum()
    report = json.loads((folder / "assign/report.json").read_text())
    assert report["usage"] == usage.tolist()
    facts = finished.artifacts["assign"].metadata
    assert facts["num_clusters"] == 16
    assert facts["used"] == 16
    assert 3 < facts["usage_entropy_bits"] <= 4
    assert facts["neighbour_information_bits"]["horizontal"] > 0.1
    assert facts["mean_squared_distance"] == pytest.approx(squares / usage.sum(), rel=1e-5)
    assert 0.5 < facts["explained_variance"] < 1


def test_fit_notes_what_it_did(finished):
    folder = finished.folder
    facts = json.loads((folder / "fit/fit.json").read_text())
    assert facts["samples_used"] == finished.artifacts["features"].metadata["samples"]
    assert facts["points_used"] == facts["samples_used"] * 16
    assert len(facts["restarts"]) == 2
    assert facts["inertia"] == min(restart["inertia"][-1] for restart in facts["restarts"])
    report = json.loads((folder / "assign/report.json").read_text())
    # The best centroids' inertia, measured twice.
    assert report["mean_squared_distance"] == pytest.approx(facts["mean_squared_distance"])
    assert not (folder / "fit" / fit.CHECKPOINT).exists()

    for number, restart in enumerate(facts["restarts"]):
        events = EventAccumulator(str(folder / f"tb/fit/restart-{number}")).Reload()
        values = [event.value for event in events.Scalars("latents/inertia")]
        assert values == pytest.approx(restart["inertia"])


def test_stages_note_where_their_workers_time_went(finished):
    workers = {
        name: finished.artifacts[name].metadata["workers"] for name in ("features", "fit", "assign")
    }
    for stage, facts in workers.items():
        assert facts["start_seconds"] > 0 and facts["most_workers"] in (1, 2)
        assert facts["lost_workers"] == (0 if stage == "assign" else 1)
        assert facts["peak_memory_bytes"] > 2**20
        seconds = facts["seconds"]
        assert set(seconds) == {"read", "wait", "compute", "write", "idle"}
        assert min(seconds["read"], seconds["compute"]) > 0
        assert (seconds["write"] == 0) == (stage == "fit")
        if stage != "features":
            # Calls of one worker do not overlap there.
            assert sum(seconds.values()) <= 2 * facts["wall_seconds"] + 1

        events = EventAccumulator(str(finished.folder / "tb" / stage)).Reload()
        tags = set(events.Tags()["scalars"])
        unit = "points" if stage == "fit" else "samples"
        assert facts[f"{unit}_per_second"] > 0
        assert {f"workers/{unit}_per_second", "workers/lost"} <= tags
        for name in (*(f"{part}_seconds" for part in seconds), "peak_memory_bytes"):
            assert {f"workers/{name}/{which}" for which in ("least", "largest", "0")} <= tags
        at_least = 1437 * (16 if stage == "fit" else 1)
        assert facts[f"{unit}_per_second"] * facts["wall_seconds"] >= 0.99 * at_least


def test_finished_shards_are_kept(finished, upstream, tmp_path, monkeypatch):
    run = Run(tmp_path, upstream, latents=LATENTS, parallel=parallel(1))
    ctx = run.context("features")
    names = [entry.name for entry in train_shards(upstream)[1]]
    source = finished.folder / "features"
    for name in names:
        shutil.copy(shard_path(source, name), ctx.out)
    whole, cut, foreign, missing = (shard_path(ctx.out, name) for name in names[:4])
    cut.write_bytes(cut.read_bytes()[:-100])
    shutil.copy(whole, foreign)
    missing.unlink()
    shard_path(ctx.out, "train-000999").write_bytes(b"of an earlier configuration")
    before = whole.stat().st_mtime_ns

    class Here:
        """Does the work of a cluster in this process."""

        def __enter__(self):
            return self

        def __exit__(self, *error):
            pass

        def pool(self, worker, kwargs, ahead, tally):
            self.made = extract.Extractor(**kwargs)
            return self

        def map(self, tasks, **options):
            assert [task.entry.name for task in tasks] == names[1:4]
            return [(number, self.made(task)) for number, task in enumerate(tasks)]

    monkeypatch.setattr(shard_work.Cluster, "connect", lambda parallel: Here())
    extract.run(ctx)

    assert whole.stat().st_mtime_ns == before
    assert ctx.metadata["kept_shards"] == len(names) - 3
    assert sorted(path.stem for path in ctx.out.iterdir()) == names
    # What the workers wrote, one of which died, is what one process writes, byte for byte.
    for name in names:
        assert shard_path(ctx.out, name).read_bytes() == shard_path(source, name).read_bytes()


def test_max_samples_takes_the_first_shards(upstream, tmp_path):
    _, entries = train_shards(upstream)
    assert [e.name for e in extract.first_shards(entries, None)] == [e.name for e in entries]
    assert len(extract.first_shards(entries, 600)) == 2
    assert len(extract.first_shards(entries, 512)) == 2
    assert len(extract.first_shards(entries, 1)) == 1


def test_a_sample_that_kills_every_worker_is_named_and_left_out(upstream, tmp_path, monkeypatch):
    entries = train_shards(upstream)[1]
    killer = entries[1].samples().keys[100]
    (tmp_path / "killer").write_text(killer)
    monkeypatch.setattr(extract, "WORKER", stages.KILLED_EXTRACTOR)
    workers = {**parallel(1), "max_worker_restarts": 0}
    run = Run(tmp_path, upstream, latents={"max_bad_samples": 1}, parallel=workers)
    facts = run.stage("features", extract.run).metadata
    assert list(facts["bad_samples"]) == [killer]
    assert "every worker that encodes it dies" in facts["bad_samples"][killer]
    assert facts["samples"] == sum(entry.num_samples for entry in entries) - 1
    # The whole shard once, then the part that holds the sample, then the sample alone.
    assert (tmp_path / "deaths").read_text().split() == ["256", "16", "1"]
    found = read_shard(shard_path(tmp_path / "features", entries[1].name), "features")
    assert found.keys == [key for key in entries[1].samples().keys if key != killer]
    listed = json.loads((tmp_path / "features" / shard_work.BAD_SAMPLES).read_text())
    assert list(listed) == [killer]

    events = EventAccumulator(str(tmp_path / "tb/features")).Reload()
    assert events.Scalars("features/bad_samples")[0].value == 1
    table = events.Tensors("features/bad_samples/text_summary")[0].tensor_proto.string_val[0]
    assert f"| {killer} |" in table.decode()

    # With none allowed, what is there already is refused without a worker.
    strict = Run(tmp_path, upstream, parallel=workers)
    monkeypatch.setattr(shard_work.Cluster, "connect", None)
    with pytest.raises(LatentError, match="cannot be encoded") as caught:
        extract.run(strict.context("features"))
    assert f"'{killer}'" in caught.value.found


def test_latents_without_kept_features_are_the_same(finished, upstream, tmp_path, capsys):
    _, entries = train_shards(upstream)
    latents = {"num_clusters": 16, "num_rounds": 8, "keep_features": False, "fit_samples": 256}
    run = Run(tmp_path, upstream, latents=latents, parallel=parallel(1))
    features = run.stage("features", extract.run)
    assert (features.metadata["shards"], features.metadata["samples"]) == (1, 256)
    run.stage("fit", fit.run)
    facts = run.stage("assign", assign.run).metadata
    saved = (
        f"assign: features not kept, {facts['feature_bytes_saved'] / 1024:.3g} KiB of disk saved"
    )
    assert saved in capsys.readouterr().err
    assert facts["samples"] == sum(entry.num_samples for entry in entries)
    codebook = read_codebook(
        tmp_path / "fit" / fit.CENTROIDS, features=features.fingerprint, shape=(16, 4)
    )
    for entry in entries:
        # From the features that another run kept.
        kept = read_shard(shard_path(finished.folder / "features", entry.name), "features")
        keys, found = load_latents(tmp_path / "assign", entry.name)
        labels, _ = codebook.assign(kept.rows)
        assert keys == kept.keys
        assert found.tolist() == labels.tolist()
    whole = finished.artifacts["features"].metadata["bytes"]
    assert facts["feature_bytes_saved"] + features.metadata["bytes"] == pytest.approx(whole, 0.01)
    # Fitted to a fifth of the samples, the centroids serve all of them about as well.
    report = json.loads((finished.folder / "assign/report.json").read_text())
    assert facts["mean_squared_distance"] < 1.1 * report["mean_squared_distance"]


def test_features_without_variance_are_refused(upstream, tmp_path, monkeypatch):
    monkeypatch.setattr(extract, "encode_shards", lambda *arguments: {})
    monkeypatch.setattr(extract, "first_shards", lambda entries, most: entries[:1])
    run = Run(tmp_path, upstream)
    ctx = run.context("features")
    worker = extract.Extractor(extract.settings(ctx))
    entry = train_shards(upstream)[1][0]
    worker._teacher.encode = lambda x: torch.ones(len(x), 16, 4)
    worker(shard_work.ShardTask(entry))
    with pytest.raises(LatentError, match="no variance"):
        extract.run(ctx)


def test_centroids_do_not_depend_on_workers_or_deaths(finished, upstream):
    # Two Ray workers of which one died, against one process without Ray.
    names = [entry.name for entry in train_shards(upstream)[1]]
    features = finished.artifacts["features"]
    job, _ = local_job(features.path, names, finished.config.latents, 0, features.fingerprint)
    alone = job.run(FitState())
    path = finished.folder / "fit" / fit.CENTROIDS
    codebook = read_codebook(path, features=features.fingerprint, shape=(16, 4))
    assert torch.equal(codebook.centroids, alone.best)
    facts = json.loads((finished.folder / "fit/fit.json").read_text())
    assert [restart["inertia"] for restart in facts["restarts"]] == alone.inertia


def test_a_killed_driver_goes_on_with_other_workers(tmp_path):
    rng = np.random.default_rng(1)
    latents = {"num_clusters": 64, "num_rounds": 40, "num_restarts": 2, "tolerance": 0.0}
    run = Run(tmp_path, latents=latents, parallel=parallel(1))
    features = run.context("features")
    shards = [rng.normal(size=(4000, 8)) for _ in range(3)]
    names = write_features(features.out, shards, features.fingerprint)
    run.seal(features, "features")
    ctx = run.context("fit")
    (tmp_path / "context.json").write_text(json.dumps(ctx.to_json()))
    checkpoint = ctx.out / fit.CHECKPOINT
    with script("run_fit", str(tmp_path / "context.json")) as driver:
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline and driver.poll() is None and not checkpoint.exists():
            time.sleep(0.01)
        driver.send_signal(signal.SIGKILL)
    rounds = sum(len(history) for history in FitState.load(checkpoint, ctx.fingerprint).inertia)
    assert 0 < rounds < 80
    assert not (ctx.out / fit.CENTROIDS).exists()

    again = Run(tmp_path, run.artifacts, latents=latents, parallel=parallel(3))
    fit.run(again.context("fit"))

    job, _ = local_job(features.out, names, run.config.latents, 0, features.fingerprint)
    whole = job.run(FitState())
    path = ctx.out / fit.CENTROIDS
    codebook = read_codebook(path, features=features.fingerprint, shape=(2, 8))
    assert torch.equal(codebook.centroids, whole.best)
    facts = json.loads((ctx.out / "fit.json").read_text())
    assert [restart["inertia"] for restart in facts["restarts"]] == whole.inertia
    assert not checkpoint.exists()

    events = EventAccumulator(str(tmp_path / "tb/fit/restart-0")).Reload()
    scalars = events.Scalars("latents/inertia")
    assert [event.step for event in scalars] == list(range(41))
    assert [event.value for event in scalars] == pytest.approx(whole.inertia[0])


def test_a_codebook_a_position_of_whitened_features(finished, tmp_path):
    """Mini-batches too, from features held in memory: what each point gets is its nearest."""
    latents = {
        **LATENTS,
        "num_clusters": 6,
        "codebook": "per_position",
        "projection": "whiten",
        "projection_width": 3,
        "algorithm": "mini_batch",
        "batch_points": 300,
        "feature_memory": "held",
        "max_dead_fraction": 1.0,
    }
    run = Run(tmp_path, finished.artifacts, latents=latents, parallel=parallel(1))
    features = run.artifacts["features"]
    # Corner patches of digits are always empty: two positions of other features take their place.
    ctx = run.context("features")
    for name in feature_shards(features):
        rows = read_shard(shard_path(features.path, name), "features")
        marks = {"fingerprint": ctx.fingerprint}
        write_shard(shard_path(ctx.out, name), "features", rows.rows[:, 5:7], rows.keys, marks)
    features = run.seal(ctx, "features")
    run.stage("fit", fit.run)
    run.stage("assign", assign.run)
    path = tmp_path / "fit" / fit.CENTROIDS
    codebook = read_codebook(path, features=features.fingerprint, shape=(2, 4))
    assert codebook.centroids.shape == (2, 6, 3)
    squares = 0.0
    for name in feature_shards(features):
        rows = read_shard(shard_path(features.path, name), "features").rows.flatten(0, 1)
        points = codebook.projection(rows).double().view(-1, 2, 3)
        distances = (points[:, :, None] - codebook.centroids).square().sum(-1)
        found = load_latents(tmp_path / "assign", name)[1]
        np.testing.assert_array_equal(found, distances.argmin(-1))
        squares += float(distances.min(-1).values.sum())
    facts = json.loads((tmp_path / "fit/fit.json").read_text())
    assert facts["inertia"] == pytest.approx(squares, rel=1e-5)
    assert facts["num_codebooks"] == 2
    assert [len(position["restarts"]) for position in facts["positions"]] == [2, 2]
    report = json.loads((tmp_path / "assign/report.json").read_text())
    assert 0 < report["explained_variance"] < 1
    assert sorted(path.name for path in (tmp_path / "fit").iterdir()) == [
        fit.CENTROIDS,
        "fit.json",
        "manifest.json",
    ]


def test_a_collapsed_codebook_is_refused(finished):
    limits = {**LATENTS, "min_usage_entropy_fraction": 1.0}
    run = Run(finished.folder, finished.artifacts, latents=limits, parallel=parallel(2))
    with pytest.raises(LatentError, match="codebook collapsed"):
        assign.run(run.context("assign"))


def test_what_does_not_belong_together_is_refused(finished, tmp_path):
    run = Run(tmp_path, finished.artifacts, latents=LATENTS, parallel=parallel(2))
    # Features of another teacher or split carry another fingerprint.
    other = run.context("features", fingerprint="of another teacher")
    write_features(other.out, [blob_shards(1)[0][0]], other.fingerprint)
    run.seal(other, "features")
    with pytest.raises(LatentError, match="fitted to other features") as caught:
        assign.run(run.context("assign"))
    assert "of another teacher" in caught.value.expected

    ctx = run.context("fit")
    marks = {"features": "of another teacher"}
    write_codebook(ctx.out / fit.CENTROIDS, Codebook(torch.zeros(16, 3)), marks)
    run.seal(ctx, "fit")
    with pytest.raises(LatentError, match="another width") as caught:
        assign.run(run.context("assign"))
    assert "(16, 3)" in caught.value.found

    # A shard of other features that was copied into the folder.
    source = finished.folder / "features/train-000000.safetensors"
    (other.out / source.name).write_bytes(source.read_bytes())
    run.seal(other, "features")
    with pytest.raises(LatentError, match="another run"):
        assign.run(run.context("assign"))


def test_a_run_can_be_looked_at(finished, upstream, repository, tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    for name in ("features", "fit", "assign"):
        (run / name).symlink_to(finished.folder / name)
    for name in ("shards", "index"):
        (run / name).symlink_to(upstream[name].path)
    (run / "resolved_config.yaml").write_text(dump_config(finished.config))
    command = [sys.executable, str(repository / "tools/inspect_latents.py"), str(run)]
    done = subprocess.run([*command, "--clusters", "3"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "usage entropy 3." in done.stdout
    names = sorted(path.name for path in (run / "inspect").iterdir())
    pictures = ["elbow.png", "members.png", "projection.png", "usage.png"]
    assert names == sorted([*pictures, "latents.json"])
    for name in pictures:
        with Image.open(run / "inspect" / name) as picture:
            pixels = np.asarray(picture.convert("L"))
        assert pixels.std() > 5 and min(pixels.shape) > 100
    figures = json.loads((run / "inspect/latents.json").read_text())
    report = json.loads((finished.folder / "assign/report.json").read_text())
    assert figures["usage"] == report["usage"]
    assert len(figures["clusters_shown"]) == 3
    held_out = [entry["held_out"] for entry in figures["elbow"]]
    assert held_out == sorted(held_out, reverse=True) and 16 in [
        entry["num_clusters"] for entry in figures["elbow"]
    ]
    assert (run / "tb/inspect").is_dir()

    (run / "assign").unlink()
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1
    assert "ArtifactError" in done.stderr and "assign" in done.stderr
