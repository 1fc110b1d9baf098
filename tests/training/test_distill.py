import dataclasses
import json
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from distill_runs import NUM_CLUSTERS, Runs

from distpc.artifacts import Artifact, StageContext
from distpc.circuits.circuit import Circuit
from distpc.circuits.exact import log_prob_exact
from distpc.circuits.io import load_model
from distpc.data.index import ShardIndex
from distpc.errors import LatentError, ResourceError
from distpc.latents.store import read_shard, shard_path, write_shard
from distpc.parallel.cluster import Cluster
from distpc.structures import PatchLayout
from distpc.training import distill, growing
from distpc.training.assembly import mix_rows
from distpc.training.cluster_jobs import ClusterWorker, cluster_piece, leaf_folder
from distpc.training.distill import collect
from distpc.training.leaf import train_group
from distpc.training.pieces import describe, load_graph, plan_pieces
from distpc.training.samples import LatentSource

EXACT = {"emission_noise": 0.0, "transition_noise": 0.0, "pseudocount": 0.0}


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    with Cluster.session():
        yield Runs(tmp_path_factory.mktemp("runs"))


@pytest.fixture(scope="module")
def product(runs):
    ctx = runs.variant("product")
    distill.run(ctx)
    return ctx


@pytest.fixture(scope="module")
def unmixed(runs, product):
    ctx = runs.variant("unmixed", distill=EXACT)
    # Counts do not depend on these settings: no worker has to start.
    ctx.fingerprint = product.fingerprint
    shutil.copytree(product.out / "pieces", ctx.out / "pieces")
    distill.run(ctx)
    return ctx


@pytest.fixture(scope="module")
def groups(runs):
    ctx = runs.variant(
        "groups",
        structure={"leaf": "hclt", "leaf_num_groups": 2, "leaf_num_states": 6},
        distill={"leaf_epochs": 6, "leaf_batch_size": 512},
    )
    distill.run(ctx)
    return ctx


def training_data(ctx):
    source = LatentSource.of(ctx, 16)
    parts = [source.read(entry) for entry in source.shards()]
    x, latents = (np.concatenate(rows) for rows in zip(*parts, strict=True))
    return torch.from_numpy(x).long(), torch.from_numpy(latents).long()


def test_counts_are_the_flows_of_the_circuit_under_latents(unmixed):
    circuit = load_model(unmixed.out / "model")
    x, latents = training_data(unmixed)
    (-circuit(x, latents=latents).sum() / len(x)).backward()
    used = np.bincount(latents.numpy().ravel(), minlength=NUM_CLUSTERS) > 0
    flows = Circuit(circuit.graph, circuit.num_categories)
    for parameter, other in zip(flows.parameters(), circuit.parameters(), strict=True):
        parameter.data.copy_(-other.grad)
    layout = PatchLayout.of(circuit.graph)
    for region in layout.tied.values():
        found, expected = circuit.statistics_of(region), flows.statistics_of(region)
        torch.testing.assert_close(found[used], expected[used], rtol=1e-4, atol=1e-7)
    root = circuit.statistics_of(layout.root)
    torch.testing.assert_close(root, flows.statistics_of(layout.root), rtol=1e-4, atol=1e-7)
    for patch, parent in enumerate(layout.tree.parents):
        if parent >= 0:
            seen = np.bincount(latents[:, parent].numpy(), minlength=NUM_CLUSTERS) > 0
            found = circuit.statistics_of(layout.transitions[patch])[seen]
            expected = flows.statistics_of(layout.transitions[patch])[seen]
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-7)


def test_rows_keep_their_sums_and_unused_states_get_small_ones(product):
    circuit = load_model(product.out / "model")
    _, latents = training_data(product)
    layout = PatchLayout.of(circuit.graph)
    uses = np.bincount(latents.numpy().ravel(), minlength=NUM_CLUSTERS) / len(latents)
    for region in layout.tied.values():
        sums = circuit.statistics_of(region).sum(-1).numpy()
        np.testing.assert_allclose(sums[uses > 0], uses[uses > 0], rtol=1e-4)
        assert (sums[uses == 0] > 0).all()
        assert (sums[uses == 0] < 0.1).all()
    assert product.metadata["states_never_used"] == (uses == 0).sum() == 1
    expected = [float(use.sum()) for use in circuit.uses()]
    totals = [float(circuit.statistics_of(index).sum()) for index in layout.tied.values()]
    emissions = sum(expected[region] for region in layout.emissions)
    np.testing.assert_allclose(totals, emissions, rtol=0.02)


def test_distilled_beats_random_by_far_and_bits_are_right(product):
    circuit = load_model(product.out / "model")
    facts = product.metadata
    x, latents = training_data(product)
    some = slice(0, 60)
    joint = log_prob_exact(circuit, x[some], latents=latents[some])
    found = circuit.log_prob(x[some], latents=latents[some])
    np.testing.assert_allclose(found, joint, rtol=1e-4)
    bits = circuit.log_prob(x, latents=latents).double().mean() / -np.log(2) / 64
    assert facts["train_with_latents_bpd"] == pytest.approx(float(bits), abs=1e-4)
    assert facts["train_samples_measured"] == len(x)
    assert facts["valid_impossible"] == 0
    workers = facts["workers"]
    assert workers["patches_per_second"] > 0 and workers["pieces_per_second"] > 0
    assert set(workers["seconds"]) == {"read", "wait", "compute", "write", "idle"}
    assert sum(workers["seconds"].values()) <= 2 * workers["wall_seconds"] + 1
    assert facts["train_bpd"] < facts["train_with_latents_bpd"]
    random = Circuit(circuit.graph, circuit.num_categories)
    bits = float(random.log_prob(x[:300]).mean()) / -np.log(2) / 64
    assert facts["valid_bpd"] < 2.6 < 3.5 < bits
    assert circuit.dataset["num_variables"] == 64


def test_hclt_leaves_in_two_groups(groups, product):
    facts = groups.metadata
    circuit = load_model(groups.out / "model")
    curves = [facts["pieces"][f"leaf-{group}"]["nats_by_epoch"] for group in range(2)]
    for curve in curves:
        assert len(curve) == 6
        assert curve[-1] > curve[0] + 0.5
    patches = [facts["pieces"][f"leaf-{group}"]["patches"] for group in range(2)]
    _, latents = training_data(groups)
    assert patches == [int((latents < 6).sum()), int((latents >= 6).sum())]
    assert facts["valid_bpd"] < product.metadata["valid_bpd"] + 0.05
    assert facts["states_never_used"] == 1
    uses = circuit.uses()
    layout = PatchLayout.of(circuit.graph)
    for group, clusters in enumerate(layout.groups):
        heads = circuit.statistics_of(layout.tied[f"leaf/{group}/heads"]).sum(-1)
        expected = sum(
            uses[emission][clusters.start : clusters.stop] for emission in layout.emissions
        )
        torch.testing.assert_close(heads, expected.float(), rtol=0.3, atol=0.05)


def test_leaves_do_not_depend_on_how_fine_tuning_starts(groups):
    ctx = StageContext.from_json(groups.to_json())
    other = ctx.config.finetune.model_copy(update={"init_noise": 1e-3})
    ctx.config = ctx.config.model_copy(update={"finetune": other})
    layout = PatchLayout.of(load_graph(ctx))
    found, _ = train_group(ctx, layout, LatentSource.of(ctx, layout.num_patches), 0)
    first = next(p for p in plan_pieces(ctx, layout, LatentSource.of(ctx, 16)) if p.group == 0)
    kept, _ = first.load(ctx)
    for tie, tensor in kept.items():
        torch.testing.assert_close(found[tie], tensor, rtol=1e-2, atol=1e-3)


def test_a_second_attempt_keeps_pieces_and_gives_the_same(runs, product):
    ctx = runs.variant("again")
    ctx.fingerprint = product.fingerprint
    pieces = ctx.out / "pieces"
    shutil.copytree(product.out / "pieces", pieces)
    files = sorted(pieces.iterdir())
    assert len(files) >= 3
    files[0].write_bytes(files[0].read_bytes()[:-100])
    files[1].unlink()
    kept = {path: path.stat().st_mtime_ns for path in files[2:]}
    distill.run(ctx)
    assert ctx.metadata["kept_pieces"] == len(kept)
    assert all(path.stat().st_mtime_ns == time for path, time in kept.items())
    first, second = (load_model(c.out / "model").state_dict() for c in (product, ctx))
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name])


def test_no_finished_piece_is_trained_again(runs, groups, monkeypatch):
    """Workers die in one piece until the attempt ends; the next one makes that piece alone."""
    monkeypatch.setattr(distill, "WORKER", "distill_runs:CountedWorker")
    ctx = runs.variant(
        "killed",
        structure={"leaf": "hclt", "leaf_num_groups": 2, "leaf_num_states": 6},
        distill={"leaf_epochs": 6, "leaf_batch_size": 512},
    )
    ctx.fingerprint = groups.fingerprint
    folder = ctx.out.parent
    longest, other, _ = plan_pieces(ctx, PatchLayout.of(load_graph(ctx)), LatentSource.of(ctx, 16))
    (folder / f"die-in-{other.name}").write_text(f"2 {longest.name}")
    with pytest.raises(ResourceError, match="2 workers in a row died"):
        distill.run(ctx)
    assert longest.is_finished(ctx) and not other.is_finished(ctx)
    distill.run(ctx)
    begun, finished = (
        Counter((folder / f"{what}.txt").read_text().split()) for what in ("begun", "finished")
    )
    assert (begun[longest.name], begun[other.name]) == (1, 3)
    assert (finished[longest.name], finished[other.name], max(finished.values())) == (1, 1, 1)
    first, second = (load_model(c.out / "model").state_dict() for c in (groups, ctx))
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name])


def test_pieces_of_another_fingerprint_are_made_anew(runs, product):
    ctx = runs.variant("stale")
    shutil.copytree(product.out / "pieces", ctx.out / "pieces")
    layout = PatchLayout.of(load_graph(ctx))
    pieces = plan_pieces(ctx, layout, LatentSource.of(ctx, 16))
    assert not any(piece.is_finished(ctx) for piece in pieces)
    with pytest.raises(LatentError):
        collect(ctx, layout, pieces)


def test_pieces_do_not_depend_on_workers_and_start_with_the_longest(groups):
    layout = PatchLayout.of(load_graph(groups))
    pieces = plan_pieces(groups, layout, LatentSource.of(groups, 16))
    assert [piece.kind for piece in pieces] == ["leaf", "leaf", "top"]
    assert pieces[0].cost >= pieces[1].cost >= pieces[2].cost


def damaged(ctx: StageContext, folder: Path, change) -> StageContext:
    """A context whose first latent shard was changed."""
    source = ctx.input("assign")
    shutil.copytree(source.path, folder)
    name = ShardIndex.load(ctx.input("index").path).shards("train")[0].name
    path = shard_path(folder, name)
    shard = read_shard(path, "latents")
    rows, keys = change(shard.rows.clone(), list(shard.keys))
    write_shard(path, "latents", rows, keys, shard.metadata)
    (folder / "manifest.json").unlink()
    artifact = Artifact.seal(folder, "assign", source.fingerprint, 0.0, {})
    return StageContext(
        ctx.config, ctx.out, {**ctx.inputs, "assign": artifact}, "damaged", ctx.tensorboard
    )


def test_latents_of_another_assignment_are_refused(product):
    source = LatentSource.of(product, 16)
    entry = source.shards()[0]
    assert len(source.latents(entry))
    with pytest.raises(LatentError, match=r"fingerprint|another"):
        dataclasses.replace(source, fingerprint="0" * 16).latents(entry)


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda rows, keys: (rows, keys[1:] + keys[:1]), "key '"),
        (lambda rows, keys: (rows[1:], keys[1:]), "key"),
        (lambda rows, keys: (rows[:, 1:].contiguous(), keys), "15"),
    ],
    ids=["order", "one less", "grid"],
)
def test_latents_of_other_samples_are_refused(product, tmp_path, change, words):
    ctx = damaged(product, tmp_path / "assign", change)
    with pytest.raises(LatentError) as caught:
        distill.run(ctx)
    assert words in str(caught.value.found)
    assert "train-000000" in str(caught.value.where)


def test_graphs_of_other_clusters_are_refused(runs, product):
    config = product.config.model_copy(
        update={"latents": product.config.latents.model_copy(update={"num_clusters": 9})}
    )
    ctx = StageContext(config, product.out, product.inputs, "other", product.tensorboard)
    with pytest.raises(LatentError, match="other latents"):
        distill.run(ctx)


INNER = {"leaf": "hclt", "leaf_num_states": 6, "leaf_latents": True, "leaf_tied": True}
GROWN = {
    "structure": {"leaf": "hclt", "leaf_num_states": 4},
    "distill": {
        "kind": "progressive",
        "growing": {"final_heads": 3, "epochs": 2, "top_epochs": 2, "top_samples": 600},
    },
}


def test_every_level_supervised(runs):
    ctx = runs.variant("inner", structure=INNER)
    distill.run(ctx)
    circuit = load_model(ctx.out / "model")
    layout = PatchLayout.of(circuit.graph)
    assert circuit.num_latents == 16 + 64
    assert layout.leaf is not None and layout.leaf.tables == (0, 0, 0, 0)
    # The codebook, and the counts of all shards.
    assert ctx.metadata["pieces"].keys() >= {"codebook"} and ctx.metadata["kept_pieces"] == 0
    assert ctx.metadata["states_never_used"] == 1
    assert ctx.metadata["train_with_latents_bpd"] > ctx.metadata["train_bpd"]
    # Counted alone, where a circuit with random parameters has more than 3.5.
    assert ctx.metadata["valid_bpd"] < 2.7
    again = runs.variant("inner-again", structure=INNER)
    again.fingerprint = ctx.fingerprint
    shutil.copytree(ctx.out / "pieces", again.out / "pieces")
    next(iter((again.out / "pieces").glob("counts-*"))).unlink()
    distill.run(again)
    assert again.metadata["kept_pieces"] == len(ctx.metadata["pieces"]) - 1
    first, second = (load_model(c.out / "model").state_dict() for c in (ctx, again))
    assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())


@pytest.fixture(scope="module")
def grown(runs):
    ctx = runs.variant("grown", **GROWN)
    distill.run(ctx)
    return ctx


def test_progressive_growing_makes_one_circuit_of_all_heads(grown, product):
    circuit, facts = load_model(grown.out / "model"), grown.metadata
    assert len(facts["clusters"]) == NUM_CLUSTERS - 1
    assert circuit.latent_sizes == (facts["num_heads"],) * 16
    for cluster in facts["clusters"].values():
        heads = [found["heads"] for found in cluster["rounds"]]
        assert heads in ([1], [1, 2, 3], [2, 3])
    assert facts["num_heads"] == sum(
        cluster["rounds"][-1]["heads"] for cluster in facts["clusters"].values()
    )
    assert facts["top_nats_by_epoch"][-1] > facts["top_nats_by_epoch"][0]
    assert facts["valid_impossible"] == 0
    assert facts["valid_bpd"] < product.metadata["valid_bpd"] + 0.05
    assert not list((grown.out / "rounds").iterdir())
    assert list((grown.tensorboard / "distill" / "growing").iterdir())


def test_a_cluster_goes_on_after_its_last_round_and_finished_ones_stay(runs, grown, monkeypatch):
    """A cluster's job ends in its second round; the next attempt trains that round alone."""
    ctx = runs.variant("interrupted", **GROWN)
    ctx.fingerprint = grown.fingerprint
    patches = {c: f["patches"] for c, f in grown.metadata["clusters"].items()}
    cluster = int(max(patches, key=patches.__getitem__))
    item = describe(cluster_piece(ctx, PatchLayout.of(load_graph(ctx)), cluster, 1))
    fit, trained = growing.fit_heads, []

    def interrupted(*args, **kwargs):
        if len(trained) == 1:
            raise KeyboardInterrupt
        trained.append(1)
        return fit(*args, **kwargs)

    monkeypatch.setattr(growing, "fit_heads", interrupted)
    with pytest.raises(KeyboardInterrupt):
        ClusterWorker(ctx.to_json())(item)
    assert [path.name for path in (ctx.out / "rounds").iterdir()] == [f"{cluster:04d}-001"]
    # A round that was cut short while it was saved.
    (ctx.out / "rounds" / f"{cluster:04d}-002").mkdir()
    (ctx.out / "rounds" / f"{cluster:04d}-002" / "state.safetensors").write_bytes(b"cut")
    monkeypatch.setattr(growing, "fit_heads", lambda *a, **k: trained.append(1) or fit(*a, **k))
    ClusterWorker(ctx.to_json())(item)
    rounds = grown.metadata["clusters"][str(cluster)]["rounds"]
    assert len(trained) == len(rounds)
    first, second = (load_model(leaf_folder(one, cluster)).state_dict() for one in (ctx, grown))
    assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())


def test_features_of_other_samples_are_refused(runs, grown, tmp_path):
    source = grown.input("features")
    shutil.copytree(source.path, tmp_path / "features")
    path = next((tmp_path / "features").glob("train-*"))
    shard = read_shard(path, "features")
    write_shard(path, "features", shard.rows[:, 1:].contiguous(), shard.keys, shard.metadata)
    (tmp_path / "features" / "manifest.json").unlink()
    features = Artifact.seal(tmp_path / "features", "features", source.fingerprint, 0.0, {})
    ctx = runs.variant("other-features", **GROWN)
    ctx.inputs["features"] = features
    worker = ClusterWorker(ctx.to_json())
    with pytest.raises(LatentError, match="other samples") as caught:
        worker(describe(cluster_piece(ctx, PatchLayout.of(load_graph(ctx)), 0, 1)))
    assert caught.value.where == str(path)


def test_mixed_rows():
    rows = torch.tensor([[3.0, 1.0], [0.0, 0.0]])
    random = torch.tensor([[0.5, 0.5], [0.25, 0.75]])
    mixed = mix_rows(rows, random, 0.5, 0.01)
    torch.testing.assert_close(mixed, torch.tensor([[2.5, 1.5], [0.0025, 0.0075]]))


def test_facts_are_json(product, groups, grown):
    for ctx in (product, groups, grown):
        assert json.loads(json.dumps(ctx.metadata)) == ctx.metadata
