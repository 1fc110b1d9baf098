"""Encoding shards in this process: bad samples are found, left out and named."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
import torch

from distpc.data import index as data_index
from distpc.data import shards as data_shards
from distpc.data.reader import read_shard as read_data_shard
from distpc.errors import DistpcError, LatentError, ResourceError
from distpc.latents import extract
from distpc.latents.encode import NOT_FINITE, ShardTask
from distpc.latents.shard_work import BAD_SAMPLES, BadSamples, _cut, _without_killers
from distpc.latents.store import read_shard, shard_path, write_shard
from distpc.parallel.pool import Lost
from distpc.teachers import train as teacher_train
from distpc.training.samples import LatentSource

from .stages import Run


@pytest.fixture(scope="module")
def upstream(tmp_path_factory):
    run = Run(tmp_path_factory.mktemp("upstream"))
    run.stage("shards", data_shards.run)
    run.stage("index", data_index.run)
    run.stage("teacher", teacher_train.run)
    return run.artifacts


@pytest.fixture
def make_worker(upstream, tmp_path):
    run = Run(tmp_path, upstream, teacher={"kind": "pixels", "extraction_batch_size": 100})

    def make(max_bad=0):
        settings = extract.settings(run.context("features"))
        return extract.Extractor(dataclasses.replace(settings, max_bad=max_bad))

    return make


@pytest.fixture
def entry(upstream):
    return data_index.ShardIndex.load(upstream["index"].path).shards("train")[1]


def misbehave(worker, value, how):
    """Let the teacher fail on the samples whose pixel 20 has a value; their keys."""
    encode = worker._teacher.encode

    def failing(x):
        hit = x[:, 20] == value
        if hit.any() and how != "nan":
            raise how
        return encode(x) * torch.where(hit, 1e9, 1.0)[:, None, None]

    worker._teacher.encode = failing


def keys_with(entry, worker, value):
    shard = read_data_shard(entry, worker._spec)
    return [shard.keys[row] for row in np.flatnonzero(shard.x[:, 20] == value)]


@pytest.mark.parametrize("how", ["nan", ValueError("a bad picture")])
def test_bad_samples_are_named_and_left_out(make_worker, entry, tmp_path, how):
    worker = make_worker(max_bad=1000)
    bad = keys_with(entry, worker, 3)
    assert 0 < len(bad) < entry.num_samples / 2
    misbehave(worker, 3, how)
    note = worker(ShardTask(entry))
    assert list(note.bad) == bad and note.written
    assert set(note.bad.values()) == {NOT_FINITE if how == "nan" else f"ValueError: {how}"}
    assert note.samples == entry.num_samples - len(bad)
    path = shard_path(tmp_path / "features", entry.name)
    found = read_shard(path, "features", fingerprint="features-fingerprint")
    assert found.keys == [key for key in entry.samples().keys if key not in bad]
    assert found.metadata["bad"] == note.bad
    # The features of the others are what they are without bad samples around.
    honest = make_worker()
    rows = [row for row, key in enumerate(entry.samples().keys) if key not in bad]
    x = torch.from_numpy(read_data_shard(entry, worker._spec).x[rows]).long()
    assert torch.equal(found.rows, honest._run(x))


def test_no_shard_is_written_with_more_bad_samples_than_allowed(make_worker, entry, tmp_path):
    worker = make_worker(max_bad=1)
    misbehave(worker, 3, "nan")
    note = worker(ShardTask(entry))
    assert not note.written and len(note.bad) > 1
    assert not list((tmp_path / "features").iterdir())


def test_what_fails_for_all_samples_is_no_matter_of_samples(make_worker, entry):
    worker = make_worker(max_bad=10_000)
    worker._teacher.encode = lambda x: x.no_such_thing
    with pytest.raises(AttributeError, match="no_such_thing"):
        worker(ShardTask(entry))


def test_a_full_gpu_is_not_taken_for_a_bad_sample(make_worker, entry):
    worker = make_worker(max_bad=10_000)
    misbehave(worker, 3, torch.OutOfMemoryError("CUDA out of memory"))
    with pytest.raises(ResourceError, match="too little memory") as caught:
        worker(ShardTask(entry))
    assert caught.value.where == "teacher.extraction_batch_size"


def test_known_bad_samples_are_not_tried(make_worker, entry):
    worker = make_worker(max_bad=1000)
    bad = dict.fromkeys(keys_with(entry, worker, 3), "it kills")
    misbehave(worker, 3, KeyboardInterrupt())
    assert worker(ShardTask(entry, bad)).bad == bad


def test_rows_can_be_tried_alone(make_worker, entry, tmp_path):
    worker = make_worker(max_bad=1000)
    bad = keys_with(entry, worker, 3)
    misbehave(worker, 3, "nan")
    parts = _cut(0, entry.num_samples)
    assert len(parts) == 16 and parts[-1][1] == entry.num_samples
    found = {}
    for part in parts:
        found |= worker.try_rows(ShardTask(entry, rows=part))
    assert list(found) == bad
    assert not list((tmp_path / "features").iterdir())
    assert _cut(5, 7) == [(5, 6), (6, 7)]


def test_the_budget_names_every_key(tmp_path, upstream):
    ctx = Run(tmp_path, upstream, latents={"max_bad_samples": 2}).context("features")
    bad = BadSamples(ctx)
    bad.add({})
    assert not (ctx.out / BAD_SAMPLES).exists()
    bad.add({"b": "second", "a": "first"})
    with pytest.raises(LatentError, match="cannot be encoded") as caught:
        bad.add({f"key{number}": "more" for number in range(6)})
    assert "'a': first; 'b': second; 'key0': more" in caught.value.found
    assert caught.value.found.endswith("; 3 more")
    assert "at most 2" in caught.value.expected
    assert len(json.loads((ctx.out / BAD_SAMPLES).read_text())) == 8


def test_training_leaves_out_what_has_no_latents(make_worker, entry, upstream, tmp_path):
    worker = make_worker()
    index = data_index.ShardIndex.load(upstream["index"].path)
    keys = entry.samples().keys
    left = [key for key in keys if key not in (keys[0], keys[5])]
    latents = torch.arange(len(left), dtype=torch.int32)[:, None] % 4
    notes = {"fingerprint": "f", "num_clusters": 4, "bad": {keys[0]: "nan", keys[5]: "nan"}}
    write_shard(shard_path(tmp_path, entry.name), "latents", latents, left, notes)
    source = LatentSource(index, tmp_path, 1, 4, "f")
    x, found = source.read(entry)
    whole = read_data_shard(entry, worker._spec).x
    assert np.array_equal(x, np.delete(whole, [0, 5], axis=0))
    assert np.array_equal(found, latents.numpy())
    write_shard(shard_path(tmp_path, entry.name), "latents", latents, left, {**notes, "bad": {}})
    with pytest.raises(DistpcError, match="do not belong to the data"):
        source.read(entry)


class Deaths:
    """Stands for workers that die over tasks that `kills(task)`; others are encoded here."""

    def __init__(self, worker, kills):
        self.worker, self.kills, self.tasks = worker, kills, []

    def map(self, tasks, *, method="__call__", **options):
        self.tasks += tasks
        for number, task in enumerate(tasks):
            dies = self.kills(task)
            yield number, Lost(1, "killed") if dies else getattr(self.worker, method)(task)


def test_a_shard_that_kills_as_a_whole_is_an_error_of_resources(
    make_worker, entry, tmp_path, upstream
):
    bad = BadSamples(Run(tmp_path, upstream).context("features"))
    pool = Deaths(make_worker(), lambda task: task.rows is None)
    with pytest.raises(ResourceError, match="no single sample") as caught:
        _without_killers(pool, entry, bad)
    assert entry.name in caught.value.where and caught.value.found == "killed"
    assert len(pool.tasks) == 16 + 1


def test_killers_are_found_in_parts_and_counted_at_once(make_worker, entry, tmp_path, upstream):
    run = Run(tmp_path, upstream, latents={"max_bad_samples": 2})
    keys = entry.samples().keys

    def kills(task, rows):
        start, stop = task.rows or (0, len(keys))
        return any(start <= row < stop and keys[row] not in task.bad for row in rows)

    worker = make_worker(max_bad=2)
    pool = Deaths(worker, lambda task: kills(task, (3, 200)))
    note = _without_killers(pool, entry, BadSamples(run.context("features")))
    assert list(note.bad) == [keys[3], keys[200]] and note.written
    pool = Deaths(worker, lambda task: kills(task, range(100)))
    with pytest.raises(LatentError, match="cannot be encoded") as caught:
        _without_killers(pool, entry, BadSamples(run.context("features")))
    # It stops at the third: nobody waits for a hundred deaths.
    assert caught.value.found.count("every worker that encodes it dies") == 3
