"""Tokens that short chunks of text lack: no latents, no part in k-means, figures or pictures."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from distpc.artifacts import Artifact
from distpc.config.schema import LatentsConfig
from distpc.data import index as data_index
from distpc.data import shards as data_shards
from distpc.data.reader import read_shard as read_data_shard
from distpc.data.spec import MISSING
from distpc.errors import LatentError
from distpc.latents import extract, fit
from distpc.latents.assigners import Assigner, Assignment, FusedAssigner
from distpc.latents.codebook import Codebook, write_codebook
from distpc.latents.encode import ShardTask
from distpc.latents.fit import check_distinct, principal_directions
from distpc.latents.holder import View
from distpc.latents.looks import Looks
from distpc.latents.report import make_report
from distpc.latents.state import FitState
from distpc.latents.store import NO_LATENT, load_latents, read_shard, shard_path, write_shard
from distpc.teachers import train as teacher_train
from distpc.training.samples import LatentSource

from .jobs import local_holders, local_job
from .stages import Run

WIDTH, LATENTS = 4, 3
GARBAGE = 77.0


def write(folder: Path, shards: list[torch.Tensor], present: list[torch.Tensor | None]) -> list:
    names = [f"train-{number:06d}" for number in range(len(shards))]
    for name, rows, there in zip(names, shards, present, strict=True):
        keys = [f"{name}_{row}" for row in range(len(rows))]
        path = shard_path(folder, name)
        write_shard(path, "features", rows, keys, {"fingerprint": "f"}, there)
    return names


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    """Shards of chunks of 1 to 3 tokens, one without missing ones and one of nothing else at
    position 2; and the very same points without the gaps, by position and of all."""
    generator = torch.Generator().manual_seed(0)
    shards, present = [], []
    for number, size in enumerate((150, 60, 90)):
        rows = torch.randn(size, LATENTS, WIDTH, generator=generator).half()
        lengths = torch.randint(1, LATENTS + 1, (size, 1), generator=generator)
        lengths = (lengths, torch.full_like(lengths, 3), lengths.clamp(max=2))[number]
        there = torch.arange(LATENTS) < lengths
        # Whatever lies there must not matter.
        shards.append(torch.where(there[..., None], rows, torch.tensor(GARBAGE).half()))
        present.append(None if number == 1 else there)
    folder = tmp_path_factory.mktemp("texts")
    names = write(folder, shards, present)
    mask = [torch.ones(60, LATENTS).bool() if p is None else p for p in present]
    packed = {None: [rows[there][:, None] for rows, there in zip(shards, mask, strict=True)]}
    for position in range(LATENTS):
        column = zip(shards, mask, strict=True)
        packed[position] = [rows[m[:, position], position][:, None] for rows, m in column]
    folders = {}
    for position, points in packed.items():
        folders[position] = tmp_path_factory.mktemp("packed")
        write(folders[position], points, [None] * 3)
    return folder, names, folders


@pytest.mark.parametrize("position", [None, 0, 2])
@pytest.mark.parametrize(
    "settings",
    [
        {"init": "k-means||", "num_restarts": 2},
        {"init": "k-means++", "balanced": True},
        {"init": "random", "algorithm": "mini_batch", "batch_points": 40},
    ],
)
def test_clusters_are_those_of_the_tokens_that_are_there(texts, position, settings):
    folder, names, packed = texts
    config = LatentsConfig(num_clusters=12, num_rounds=5, **settings)
    job, facts = local_job(folder, names, config, position=position)
    wanted, wanted_facts = local_job(packed[position], names, config)
    assert [fact.size(position) for fact in facts] == [fact.points for fact in wanted_facts]
    assert position is not None or np.array_equal(facts[0].sums, wanted_facts[0].sums)
    found, expected = job.run(FitState()), wanted.run(FitState())
    assert torch.equal(found.best, expected.best) and found.inertia == expected.inertia
    for groups in (1, 3):
        other, _ = local_job(folder, names, config, position=position, num_groups=groups)
        assert torch.equal(other.run(FitState()).best, found.best)


def test_principal_directions_are_of_the_tokens_that_are_there(texts):
    folder, names, packed = texts
    config = LatentsConfig(num_clusters=12, projection="whiten")
    holders = [local_holders(where) for where in (folder, packed[None])]
    own, expected = (principal_directions(each, names, config, folder) for each in holders)
    assert torch.equal(own.basis, expected.basis) and torch.equal(own.mean, expected.mean)
    arrays = (own.mean.numpy(), own.basis.numpy())
    projected = [local_holders(where, projection=arrays) for where in (folder, packed[None])]
    facts = [each.each("describe", names) for each in projected]
    assert [fact.squares for fact in facts[0]] == [fact.squares for fact in facts[1]]


def test_held_in_memory_they_are_left_out_too(texts):
    folder, names, _ = texts
    views = [View(name, 2) for name in names]
    mapped, held = (local_holders(folder, in_memory=kept) for kept in (False, True))
    for _ in range(2):
        found = [each.each("distinct", [(view, 99) for view in views]) for each in (mapped, held)]
        assert [len(part) for part in found[0]] == [len(part) for part in found[1]]
    assert len(found[0][2]) == 0


def test_too_many_clusters_for_the_tokens_that_are_there(texts):
    folder, names, packed = texts
    views = [View(name, 2) for name in names]
    there = sum(len(read_shard(shard_path(packed[2], name), "features").rows) for name in names)
    check_distinct(local_holders(folder), views, there, folder)
    with pytest.raises(LatentError, match="fewer different features than clusters") as caught:
        check_distinct(local_holders(folder), views, there + 1, folder)
    assert caught.value.found == f"{there} different feature vectors"


@pytest.mark.parametrize("per_position", [False, True])
def test_missing_tokens_get_no_latent(texts, tmp_path, per_position):
    folder, names, _ = texts
    shape = (LATENTS, 5, WIDTH) if per_position else (5, WIDTH)
    codebook = Codebook(torch.randn(*shape, generator=torch.Generator().manual_seed(1)))
    shard = read_shard(shard_path(folder, names[0]), "features")
    latents, distances = codebook.assign(shard.rows, shard.present)
    whole = codebook.assign(shard.rows)
    assert latents.dtype == torch.int32 and (latents[~shard.present] == NO_LATENT).all()
    assert torch.equal(latents[shard.present], whole[0][shard.present])
    assert not distances[~shard.present].any()
    assert torch.allclose(distances[shard.present], whole[1][shard.present])


def test_figures_leave_missing_tokens_out():
    rng = np.random.default_rng(0)
    full = rng.integers(6, size=(500, 4))
    lacking = full.copy()
    lacking[:, 2:] = NO_LATENT
    report = make_report([lacking], 6, (1, 4), 10.0, 2.0)
    expected = make_report([full[:, :2]], 6, (1, 2), 10.0, 2.0)
    assert (report.missing, expected.missing) == (1000, 0)
    for name in ("usage", "dead", "usage_entropy_bits", "largest_share", "mean_squared_distance"):
        assert getattr(report, name) == getattr(expected, name)
    assert report.neighbour_information_bits == expected.neighbour_information_bits
    by_position = make_report([lacking[:, :3]], 6, (1, 3), 10.0, 2.0, per_position=True)
    assert by_position.usage[12:] == [0] * 6
    both = make_report([full[:, :2]], 6, (1, 2), 10.0, 2.0, per_position=True)
    assert by_position.neighbour_information_bits == both.neighbour_information_bits


def test_no_missing_token_is_looked_at(texts, tmp_path):
    folder, names, _ = texts
    codebook = Codebook(torch.randn(LATENTS, 5, WIDTH, generator=torch.Generator().manual_seed(1)))
    out = tmp_path / "assign"
    write_codebook(tmp_path / "fit" / fit.CENTROIDS, codebook, {"features": "f"})
    assignment = Assignment(
        str(tmp_path / "fit" / fit.CENTROIDS), "f", (LATENTS, WIDTH), str(out), "a", "cpu"
    )
    for name in names:
        Assigner(str(folder), assignment)(name)
    inputs = {
        "features": Artifact.seal(folder, "features", "f", 0.0, {}),
        "fit": Artifact.seal(tmp_path / "fit", "fit", "c", 0.0, {}),
    }
    latents = [load_latents(out, name)[1] for name in names]
    report = make_report(latents, 5, (1, LATENTS), 1.0, 2.0, per_position=True)
    looks = Looks(inputs, out, names, np.array(report.usage), 1, 5)
    features, labels = looks.features()
    assert len(features) == len(labels) == sum(report.usage)
    assert not (features == GARBAGE).any() and labels.min() >= 0
    for cluster, members in looks.members(15, 400).items():
        assert len(members) == report.usage[cluster]
        assert all(member.unit == cluster // 5 for member in members)


LINES = ["a cat", "the dog sat on the mat", "no", "to be or not to be", "x"]


@pytest.fixture(scope="module")
def upstream(tmp_path_factory):
    folder = tmp_path_factory.mktemp("upstream")
    for number in range(60):
        (folder / f"{number:02d}.txt").write_text(LINES[number % 5] + str(number))
    source = {"kind": "text", "path": str(folder), "chunk_length_tokens": 16}
    run = Run(
        folder / "run",
        data={"source": source},
        teacher={"kind": "onehot"},
        structure={"kind": "hmm", "num_states": 8},
    )
    run.stage("shards", data_shards.run)
    run.stage("index", data_index.run)
    run.stage("teacher", teacher_train.run)
    return run


def test_from_text_to_the_states_of_training(upstream, tmp_path):
    index = data_index.ShardIndex.load(upstream.artifacts["index"].path)
    entry = index.shards("train")[0]
    x = read_data_shard(entry, index.spec).x
    assert 0.3 < (x == MISSING).mean() < 0.9
    ctx = upstream.context("features")
    extract.Extractor(extract.settings(ctx))(ShardTask(entry))
    shard = read_shard(shard_path(ctx.out, entry.name), "features")
    assert np.array_equal(shard.present.numpy(), x != MISSING)

    path = tmp_path / fit.CENTROIDS
    centroids = torch.randn(8, 256, generator=torch.Generator().manual_seed(1))
    write_codebook(path, Codebook(centroids), {"features": ctx.fingerprint})
    assignment = Assignment(
        str(path), ctx.fingerprint, (16, 256), str(tmp_path), "assign-fingerprint", "cpu"
    )
    Assigner(str(ctx.out), assignment)(entry.name)
    source = LatentSource(index, tmp_path, 16, 8, "assign-fingerprint")
    latents = source.read(entry)[1]
    assert np.array_equal(latents == NO_LATENT, x == MISSING)
    stored = shard_path(tmp_path, entry.name).read_bytes()
    FusedAssigner(extract.settings(ctx), assignment)(ShardTask(entry))
    assert np.array_equal(source.read(entry)[1], latents)
    assert len(stored) == shard_path(tmp_path, entry.name).stat().st_size

    # A latent that is missing where a token is there would be counted as a state.
    noted = read_shard(shard_path(tmp_path, entry.name), "latents")
    rows = noted.rows.clone()
    rows[2, 0] = NO_LATENT
    write_shard(noted.path, "latents", rows, noted.keys, noted.metadata)
    with pytest.raises(LatentError, match="do not belong to the data") as caught:
        source.read(entry)
    assert caught.value.found == f"no latent of token 0 of sample '{noted.keys[2]}'"
    write_shard(noted.path, "latents", rows, noted.keys, {**noted.metadata, "missing": 0})
    with pytest.raises(LatentError, match="outside the clusters"):
        load_latents(tmp_path, entry.name)


def test_features_that_differ_by_missing_tokens_alone_have_no_variance(upstream, tmp_path):
    index = data_index.ShardIndex.load(upstream.artifacts["index"].path)
    run = Run(tmp_path, upstream.artifacts, data=upstream.config.data.model_dump())
    ctx = run.context("features")
    worker = extract.Extractor(extract.settings(ctx))
    worker._teacher.encode = lambda x: (x != MISSING).float()[:, :, None].expand(-1, -1, 256)
    entry = index.shards("train")[0]
    worker(ShardTask(entry))
    found = read_shard(shard_path(ctx.out, entry.name), "features")
    assert found.metadata["spread"] == 0.0
