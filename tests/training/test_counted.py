"""Hidden Chow-Liu trees over pixels, distilled by a run on digits: what is counted, and refused."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from distpc.artifacts import Artifact, StageContext, read_json
from distpc.circuits.circuit import Circuit
from distpc.circuits.io import load_model
from distpc.config import RunConfig, parse_config
from distpc.config.distillation import DistillConfig
from distpc.data.index import ShardIndex
from distpc.data.spec import DatasetSpec
from distpc.errors import ConfigError, LatentError
from distpc.pipeline.comparison.budget import distillation_visits
from distpc.pipeline.comparison.variants import plan_runs
from distpc.pipeline.runner import Pipeline
from distpc.structures import Tree, hclt_graph
from distpc.training import counted
from distpc.training.counted import CountWorker, count_pieces, distil_tree, summed, table_parts
from distpc.training.counting import assemble_counted_
from distpc.training.pieces import describe, load_graph
from distpc.training.samples import LatentSource, take_rows
from distpc.training.start import start_near_data_
from distpc.training.structure import check_codebook, check_fit, sketch

STATES = 6


def make_config(**sections: Any) -> RunConfig:
    values: dict[str, Any] = {
        "name": "pixels",
        "data": {"source": {"kind": "digits"}, "samples_per_shard": 400, "patch_size_pixels": 1},
        "teacher": {"kind": "pixels", "pixels": {"radius": 1}},
        "latents": {
            "num_clusters": STATES,
            "codebook": "per_position",
            "num_rounds": 5,
            "max_dead_fraction": 0.5,
        },
        "structure": {"kind": "hclt", "num_states": STATES},
        "distill": {"emission_noise": 0, "transition_noise": 0, "pseudocount": 0},
        "parallel": {"num_workers": 1, "cpus_per_worker": 0.5, "num_ranks": 1},
    }
    for section, fields in sections.items():
        values[section] = {**values.get(section, {}), **fields}
    return parse_config(values, where="test")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run up to the stage `distill`, on a Ray cluster."""
    folder = tmp_path_factory.mktemp("pixels")
    Pipeline(make_config(), folder).run_until("distill")
    return folder


@pytest.fixture
def ctx(run: Path, tmp_path: Path) -> StageContext:
    """What the stage was given, with a folder of its own."""
    inputs = {name: Artifact.open(run / name) for name in ("index", "assign", "structure")}
    return StageContext(make_config(), tmp_path, inputs, "again", tmp_path / "tb")


def rows_of(ctx: StageContext) -> tuple[np.ndarray, np.ndarray]:
    source = LatentSource.of(ctx, 64)
    parts = [source.read(entry) for entry in source.shards()]
    x, latents = (np.concatenate(rows) for rows in zip(*parts, strict=True))
    return x, latents


def regions_of(circuit: Circuit) -> dict[int, tuple[int, dict[int, int]]]:
    """By variable its input region, and by child variable the sum on the edge to it."""
    regions = circuit.graph.regions
    found = {}
    for region in regions:
        if region.latent is not None:
            first, *sums = region.children
            below = {regions[regions[index].children[0]].latent: index for index in sums}
            found[region.latent] = first, below
    return found


def test_parameters_are_relative_frequencies(run: Path, ctx: StageContext) -> None:
    x, latents = rows_of(ctx)
    assert x.shape == latents.shape == (len(x), 64)
    circuit = load_model(run / "distill" / "model")
    parents = read_json(run / "structure" / "tree.json")["variables"]["parents"]
    by_variable = regions_of(circuit)
    assert sorted(by_variable) == list(range(64))

    def check(region: int, pairs: Any, width: int) -> None:
        counts = np.zeros((circuit.statistics_of(region).shape[0], width))
        for unit, column in pairs:
            counts[unit, column] += 1
        used = counts.sum(1) > 0
        expected = counts[used] / counts[used].sum(1, keepdims=True)
        weights = circuit.weights_of(region).numpy()
        np.testing.assert_allclose(weights[used], expected, rtol=1e-5, atol=1e-7)
        np.testing.assert_allclose(
            circuit.statistics_of(region).detach().numpy()[used], counts[used] / len(x), rtol=1e-5
        )

    for variable, (first, below) in by_variable.items():
        z = latents[:, variable]
        check(first, zip(z, x[:, variable], strict=True), 17)
        assert {child for child, parent in enumerate(parents) if parent == variable} == set(below)
        for child, region in below.items():
            check(region, zip(z, latents[:, child], strict=True), STATES)
    root = parents.index(-1)
    check(circuit.graph.root, ((0, value) for value in latents[:, root]), STATES)
    facts = Artifact.open(run / "distill").metadata
    assert facts["num_samples"] == len(x)
    assert facts["states_never_used"] == 0
    assert len(facts["pieces"]) == 4 and facts["kept_pieces"] == 0
    assert Artifact.open(run / "structure").metadata["num_parameters"] == circuit.num_parameters


def test_the_distilled_start_is_better_than_a_random_one(ctx: StageContext) -> None:
    graph = load_graph(ctx)
    source = LatentSource.of(ctx, 64)
    tables = counted.count_shards(graph, source, source.shards())
    samples = int(tables.pop("num_samples"))
    distilled, random = (Circuit(graph, [17] * 64, seed=0) for _ in range(2))
    assemble_counted_(distilled, tables, samples, DistillConfig(), seed=0)
    start_near_data_(random, take_rows(source.index, "train", 1000))
    x = torch.from_numpy(np.concatenate(list(take_rows(source.index, "valid", 200))))
    bits = [-float(c.log_prob(x).mean()) / (64 * np.log(2)) for c in (distilled, random)]
    assert bits[0] < bits[1] - 0.2


def test_a_killed_stage_goes_on_and_ends_in_the_same_circuit(run: Path, ctx: StageContext) -> None:
    """The run's own pieces but one: that one is made, and nothing else."""
    done = Artifact.open(run / "distill")
    ctx.fingerprint = done.fingerprint
    files = sorted((run / "distill" / "pieces").iterdir())
    assert len(files) == 4
    (ctx.out / "pieces").mkdir()
    for file in files[1:]:
        (ctx.out / "pieces" / file.name).write_bytes(file.read_bytes())
    circuit, facts, _ = distil_tree(ctx)
    assert facts["kept_pieces"] == 3
    for name, tensor in load_model(done.path / "model").state_dict().items():
        assert torch.equal(tensor, circuit.state_dict()[name])


def test_large_tables_are_counted_some_at_a_time(
    run: Path, ctx: StageContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    graph, source = load_graph(ctx), LatentSource.of(ctx, 64)
    whole = summed(StageContext(ctx.config, run / "distill", ctx.inputs,
                                Artifact.open(run / "distill").fingerprint, ctx.tensorboard),
                   count_pieces(graph, source))  # fmt: skip
    monkeypatch.setattr(counted, "table_parts", partial(table_parts, most_bytes=20_000))
    parts = counted.table_parts(graph, [17] * 64)
    assert len(parts) > 3 and max(size for _, size in parts) <= 20_000
    assert sum(size for _, size in parts) == sum(8 * t.numel() for t in whole.values()) - 8
    pieces = count_pieces(graph, source)
    worker = CountWorker(ctx.to_json())
    for piece in pieces:
        worker(describe(piece))
        assert sum(8 * t.numel() for t in piece.load(ctx)[0].values()) <= 20_008
    found = summed(ctx, pieces)
    assert found.keys() == whole.keys()
    assert all(torch.equal(table, whole[name]) for name, table in found.items())


def test_latents_of_another_grid_or_number_are_refused(ctx: StageContext) -> None:
    with pytest.raises(LatentError, match="do not belong to the data") as caught:
        LatentSource.of(ctx, 16).latents(LatentSource.of(ctx, 16).shards()[0])
    assert "(N, 16)" in caught.value.expected
    ctx.config = make_config(latents={"num_clusters": 5}, structure={"num_states": 5})
    with pytest.raises(LatentError, match="made for other latents") as caught:
        distil_tree(ctx)
    assert caught.value.found == f"[{STATES}] values of a latent"


GREY = DatasetSpec("grey", "image", 64, (17,) * 64, image_shape=(8, 8, 1))
COLOUR = DatasetSpec("colour", "image", 192, (256,) * 192, image_shape=(8, 8, 3))
TABLE = DatasetSpec("table", "array", 4, (3,) * 4)


@pytest.mark.parametrize(
    ("spec", "sections", "where", "found", "expected"),
    [
        (COLOUR, {}, "structure.kind", "3 channels", "grey"),
        (TABLE, {}, "structure.kind", "array data", "grey"),
        (GREY, {"data": {"patch_size_pixels": 2}}, "data.patch_size_pixels", "2", "1"),
        (GREY, {"structure": {"num_states": 9}}, "structure.num_states", "9", str(STATES)),
        (GREY, {"structure": {"layer": "monarch"}}, "structure.layer", "monarch", "cp"),
    ],
)
def test_trees_that_no_latents_supervise_are_refused(
    spec: DatasetSpec, sections: dict[str, Any], where: str, found: str, expected: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        check_fit(make_config(**sections), spec)
    error = caught.value
    assert error.where == where and found in str(error.found) and error.fix
    assert expected in f"{error.expected} {error}"
    # Random ones are trees like any other.
    random = {**sections, "teacher": {"kind": "none"}, "finetune": {"initialization": "random"}}
    assert sketch(make_config(**random), spec).num_variables == spec.num_variables


def test_teacher_and_start_have_to_agree() -> None:
    for section in ({"teacher": {"kind": "none"}}, {"finetune": {"initialization": "random"}}):
        with pytest.raises(ConfigError, match="distilled from a teacher, or random without one"):
            make_config(**section)


def test_tied_trees_share_a_codebook() -> None:
    with pytest.raises(ConfigError, match="shares its leaves") as caught:
        check_codebook(make_config(structure={"tied": True}))
    assert "structure.tied=false" in caught.value.fix
    tied = make_config(structure={"tied": True}, latents={"codebook": "shared"})
    check_codebook(tied)
    check_fit(tied, GREY)
    graph = hclt_graph(Tree((-1, 0, 1)), STATES, tied=True)
    assert [len(names) for names, _ in table_parts(graph, [17] * 3)] == [3]


def test_comparisons_hold_sizes_and_visits_equal(run: Path, tmp_path: Path) -> None:
    config = make_config(finetune={"num_epochs": 3}, structure={"leaf": "hclt"})
    sizes = {"sizes": [4, 8], "size_fields": ["latents.num_clusters", "structure.num_states"]}
    config = config.model_copy(update={"compare": config.compare.model_copy(update=sizes)})
    runs = plan_runs(config, tmp_path)
    assert {run.variant for run in runs} >= {"pixels", "shuffled", "random_features", "em_smooth"}
    for one in runs:
        assert one.config.latents.num_clusters == one.config.structure.num_states == one.size
    # Counting passes every sample once; leaves of patches, which a tree has not, are no matter.
    entries = ShardIndex.load(run / "index").shards("train")
    assert distillation_visits(runs[-1].config, entries) == sum(e.num_samples for e in entries)
