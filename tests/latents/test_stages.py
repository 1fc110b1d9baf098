"""The Ray stages on real data and a real local cluster, deaths of workers and driver included."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from distpc.data.reader import read_shard as read_data_shard

from distpc.data import index as data_index
from distpc.data import shards as data_shards
from distpc.data.patches import PatchGrid
from distpc.errors import LatentError
from distpc.latents import assign, extract, fit, load_latents
from distpc.latents.lloyd import FitState
from distpc.latents.store import read_centroids, read_shard, shard_path, write_centroids
from distpc.teachers import train as teacher_train

from . import stages
from .jobs import blob_shards, local_job, write_features
from .stages import Run

LATENTS = {"num_clusters": 16, "num_rounds": 8, "num_restarts": 2}


def parallel(num_workers: int) -> dict[str, object]:
    """Room for up to four workers on two cores."""
    return {"num_workers": num_workers, "cpus_per_worker": 0.5}


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
    """Digits' features, centroids and latents."""
    run = Run(tmp_path_factory.mktemp("finished"), upstream, latents=LATENTS, parallel=parallel(2))
    run.stage("features", extract.run)
    run.stage("fit", fit.run)
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
    assert set(facts["seconds"]) == {"read", "encode", "write"}
    assert facts["bytes"] > facts["samples"] * 16 * 4 * 2


def test_latents_are_the_nearest_centroids(finished, upstream):
    _, entries = train_shards(upstream)
    folder = finished.folder
    features = finished.artifacts["features"]
    centroids = read_centroids(
        folder / "fit" / fit.CENTROIDS, features=features.fingerprint, width=4
    ).numpy()
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

    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for number, restart in enumerate(facts["restarts"]):
        events = EventAccumulator(str(folder / f"tb/fit/restart-{number}")).Reload()
        values = [event.value for event in events.Scalars("latents/inertia")]
        assert values == pytest.approx(restart["inertia"])


def test_finished_shards_are_kept_and_a_dead_worker_changes_nothing(
    finished, upstream, tmp_path, monkeypatch
):
    run = Run(tmp_path, upstream, latents=LATENTS, parallel=parallel(2))
    ctx = run.context("features")
    names = [entry.name for entry in train_shards(upstream)[1]]
    source = finished.folder / "features"
    whole, cut, foreign = (shard_path(ctx.out, name) for name in names[:3])
    whole.write_bytes((source / whole.name).read_bytes())
    cut.write_bytes((source / cut.name).read_bytes()[:-100])
    foreign.write_bytes((source / whole.name).read_bytes())
    shard_path(ctx.out, "train-000999").write_bytes(b"of an earlier configuration")
    before = whole.stat().st_mtime_ns
    monkeypatch.setattr(extract, "WORKER", stages.DYING_EXTRACTOR)

    extract.run(ctx)

    assert (tmp_path / ".died").exists()
    assert whole.stat().st_mtime_ns == before
    assert ctx.metadata["kept_shards"] == 1
    assert sorted(path.stem for path in ctx.out.iterdir()) == names
    for name in names:
        file = shard_path(ctx.out, name).name
        assert (ctx.out / file).read_bytes() == (source / file).read_bytes()


def test_max_samples_takes_the_first_shards(upstream, tmp_path):
    _, entries = train_shards(upstream)
    assert [e.name for e in extract.first_shards(entries, None)] == [e.name for e in entries]
    assert len(extract.first_shards(entries, 600)) == 2
    assert len(extract.first_shards(entries, 512)) == 2
    assert len(extract.first_shards(entries, 1)) == 1


def test_features_that_are_not_finite_are_refused(upstream, tmp_path):
    _, entries = train_shards(upstream)
    worker = extract.Extractor(
        index=str(upstream["index"].path),
        teacher=str(upstream["teacher"].path),
        out=str(tmp_path),
        fingerprint="f",
        teacher_fingerprint="t",
        patch_size=2,
        batch_size=100,
        device="cpu",
    )
    encode = worker._teacher.encode
    worker._teacher.encode = lambda x: (
        encode(x) * torch.where(x[:, 20] == 3, 1e9, 1.0)[:, None, None]
    )
    with pytest.raises(LatentError, match="not finite in float16") as caught:
        worker(entries[1])
    assert entries[1].name in caught.value.where
    x = read_data_shard(entries[1], data_index.ShardIndex.load(upstream["index"].path).spec).x
    bad = entries[1].samples().keys[int(np.flatnonzero(x[:, 20] == 3)[0])]
    assert f"'{bad}'" in caught.value.found
    assert not any(tmp_path.iterdir())


def feature_run(folder, shards, num_workers, latents):
    """A run whose features stage is already sealed."""
    run = Run(folder, latents=latents, parallel=parallel(num_workers))
    ctx = run.context("features")
    names = write_features(ctx.out, shards, ctx.fingerprint)
    run.seal(ctx, "features")
    return run, names


def test_centroids_are_the_same_for_any_workers_and_deaths(tmp_path, monkeypatch):
    rng = np.random.default_rng(0)
    shards = [rng.normal(size=(2 * rng.integers(200, 400), 6)) for _ in range(5)]
    latents = {"num_clusters": 24, "num_rounds": 6, "num_restarts": 2, "tolerance": 0.0}
    found = {}
    for num_workers, worker in ((1, None), (2, None), (3, stages.DYING_HOLDER)):
        run, names = feature_run(tmp_path / f"workers-{num_workers}", shards, num_workers, latents)
        if worker is not None:
            monkeypatch.setattr(fit, "WORKER", worker)
        run.stage("fit", fit.run)
        assert (run.folder / ".died").exists() == (worker is not None)
        found[num_workers] = (run.folder / "fit" / fit.CENTROIDS).read_bytes()
    assert found[1] == found[2] == found[3]

    write_features(tmp_path, shards)
    job, _ = local_job(tmp_path, names, run.config.latents, run.config.seed)
    alone = job.run(FitState()).best
    path = tmp_path / "workers-1/fit" / fit.CENTROIDS
    assert torch.equal(read_centroids(path, features="features-fingerprint", width=6), alone)


def test_a_killed_driver_goes_on(tmp_path):
    rng = np.random.default_rng(1)
    shards = [rng.normal(size=(4000, 8)) for _ in range(3)]
    latents = {"num_clusters": 64, "num_rounds": 40, "num_restarts": 2, "tolerance": 0.0}
    run, names = feature_run(tmp_path / "run", shards, 2, latents)
    ctx = run.context("fit")
    request = tmp_path / "context.json"
    request.write_text(json.dumps(ctx.to_json()))
    root = Path(__file__).parents[2]
    with subprocess.Popen(
        [sys.executable, str(Path(stages.__file__)), str(request)],
        env={**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"},
    ) as driver:
        checkpoint = ctx.out / fit.CHECKPOINT
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline and driver.poll() is None and not checkpoint.exists():
            time.sleep(0.01)
        driver.send_signal(signal.SIGKILL)
    rounds = sum(len(history) for history in FitState.load(checkpoint, ctx.fingerprint).inertia)
    assert 0 < rounds < 80
    assert not (ctx.out / fit.CENTROIDS).exists()

    fit.run(ctx)

    write_features(tmp_path, shards)
    job, _ = local_job(tmp_path, names, run.config.latents, run.config.seed)
    whole = job.run(FitState())
    path = ctx.out / fit.CENTROIDS
    assert torch.equal(read_centroids(path, features="features-fingerprint", width=8), whole.best)
    facts = json.loads((ctx.out / "fit.json").read_text())
    assert [restart["inertia"] for restart in facts["restarts"]] == whole.inertia


def test_collapsed_features_are_refused(tmp_path):
    run, _ = feature_run(tmp_path, [np.ones((40, 3))] * 2, 2, {"num_clusters": 4})
    with pytest.raises(LatentError, match="fewer different features than clusters"):
        run.stage("fit", fit.run)


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
    write_centroids(ctx.out / fit.CENTROIDS, torch.zeros(16, 3), {"features": "of another teacher"})
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
