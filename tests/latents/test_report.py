"""Figures of a codebook, and its refusal."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from distpc.artifacts import Artifact, read_json, write_json
from distpc.config import parse_config
from distpc.config.schema import LatentsConfig
from distpc.errors import LatentError
from distpc.latents import assign, extract
from distpc.latents.report import (
    LatentReport,
    entropy_bits,
    log_report,
    make_report,
    mutual_information_bits,
    refuse_collapse,
    usage_picture,
)


def report_of(latents, num_clusters, grid=None):
    return make_report([latents], num_clusters, grid, inertia=10.0, feature_variance=2.0)


def test_figures_of_known_latents():
    latents = np.array([[0, 1, 1, 0], [2, 2, 0, 1]], dtype=np.int32)
    report = make_report([latents[:1], latents[1:]], 4, (2, 2), 4.0, 2.0)
    assert report.usage == [3, 3, 2, 0]
    assert (report.used, report.dead, report.samples, report.latents_per_sample) == (3, 1, 2, 4)
    shares = np.array([3, 3, 2]) / 8
    assert report.usage_entropy_bits == pytest.approx(-(shares * np.log2(shares)).sum())
    assert report.max_entropy_bits == 2
    assert report.largest_share == 3 / 8
    assert report.mean_squared_distance == 0.5
    assert report.explained_variance == 0.75
    assert json.loads(json.dumps(report.to_json()))["pair_samples"] == 2


def test_neighbours_are_told_apart():
    rng = np.random.default_rng(0)
    column = rng.integers(8, size=(4000, 5, 1))
    # Every row of a sample repeats one value: horizontal neighbours agree, vertical ones do not.
    latents = np.broadcast_to(column, (4000, 5, 6)).reshape(4000, 30)
    information = report_of(latents, 8, (5, 6)).neighbour_information_bits
    assert information["horizontal"] == pytest.approx(3, abs=0.01)
    assert information["vertical"] == pytest.approx(0, abs=0.01)
    assert report_of(latents, 8).neighbour_information_bits == {}


def test_mutual_information_is_corrected_for_few_counts():
    rng = np.random.default_rng(0)
    first, second = rng.integers(64, size=(2, 10_000))
    pairs = np.unique(first * 64 + second, return_counts=True)[1]
    marginals = entropy_bits(np.bincount(first)) + entropy_bits(np.bincount(second))
    assert marginals - entropy_bits(pairs) > 0.2
    assert mutual_information_bits(first, second) < 0.1
    assert mutual_information_bits(first, first) == pytest.approx(6, abs=0.01)


def test_pairs_of_many_clusters_take_no_table_of_all():
    latents = np.array([[65_535, 1], [0, 65_535]])
    assert "horizontal" in report_of(latents, 65_536, (1, 2)).neighbour_information_bits


def test_codebooks_of_positions_are_counted_apart():
    rng = np.random.default_rng(0)
    first = rng.integers(8, size=4000)
    # The same of both positions, under other numbers; all alike at the last.
    latents = np.stack([first, (first + 3) % 8, np.full(4000, 5)], axis=1)
    report = make_report([latents], 8, (1, 3), 1.0, 2.0, per_position=True)
    assert (report.num_codebooks, report.used, report.dead) == (3, 17, 7)
    assert len(report.usage) == 24 and report.usage[16:] == [0] * 5 + [4000, 0, 0]
    assert report.usage_entropy_bits == pytest.approx(2, abs=0.01)
    assert report.largest_share == 1
    assert report.neighbour_information_bits["horizontal"] == pytest.approx(1.5, abs=0.01)
    with pytest.raises(LatentError, match="collapsed") as caught:
        refuse_collapse(report, LatentsConfig(num_clusters=8), Path("report.json"))
    assert "17 of 24 clusters used" in caught.value.found


def test_collapse_is_refused_with_the_figures():
    config = LatentsConfig(num_clusters=16)
    healthy = np.arange(64).reshape(16, 4) % 16
    refuse_collapse(report_of(healthy, 16), config, Path("x"))

    few = np.zeros((100, 4), dtype=np.int32)
    few[0] = [1, 2, 3, 4]
    with pytest.raises(LatentError, match="collapsed") as caught:
        refuse_collapse(report_of(few, 16), config, Path("report.json"))
    assert "5 of 16 clusters used" in caught.value.found
    assert "min_usage_entropy_fraction" in caught.value.expected

    # Well spread over 12 of 16: enough bits, too many dead.
    dead = np.arange(48).reshape(12, 4) % 12
    with pytest.raises(LatentError, match="collapsed") as caught:
        refuse_collapse(report_of(dead, 16), config, Path("report.json"))
    assert "4 dead" in caught.value.found
    refuse_collapse(
        report_of(dead, 16), LatentsConfig(num_clusters=16, max_dead_fraction=0.5), Path("x")
    )


def test_finished_latents_are_judged_by_the_limits_of_now(tmp_path):
    report = report_of(np.arange(48).reshape(12, 4) % 12, 16)
    write_json(tmp_path / assign.REPORT, {"format_version": 1, **report.to_json()})
    assert LatentReport.from_json(read_json(tmp_path / assign.REPORT)) == report
    bad = {"bad_samples": {"key7": "it kills"}}
    artifact = Artifact.seal(tmp_path, "assign", "f", 1.0, bad)

    def config(**latents):
        return parse_config(
            {
                "name": "x",
                "data": {"source": {"kind": "digits"}},
                "latents": {"num_clusters": 16, **latents},
            },
            "test",
        )

    assign.judge(config(max_dead_fraction=0.25, max_bad_samples=1), artifact)
    extract.judge(config(max_bad_samples=1), artifact)
    for limits, words in (
        ({"max_dead_fraction": 0.2, "max_bad_samples": 1}, "4 dead"),
        ({"min_usage_entropy_fraction": 0.95, "max_bad_samples": 1}, "3.585 bits"),
        ({"max_dead_fraction": 0.25}, "'key7': it kills"),
    ):
        with pytest.raises(LatentError) as caught:
            assign.judge(config(**limits), artifact)
        assert words in caught.value.found and str(tmp_path) in caught.value.where
    with pytest.raises(LatentError, match="cannot be encoded"):
        extract.judge(config(), artifact)
    older = report.to_json()
    del older["missing"]
    assert LatentReport.from_json(older) == report


def test_pictures_and_scalars(tmp_path):
    picture = usage_picture(np.array([0, 10, 5]), height=11, width=6)
    assert picture.shape == (11, 6)
    assert (picture[:, 0] < 255).sum() == 10
    assert (picture[:, 2] < 255).sum() == 5
    assert (picture[:, 5] == 255).all()

    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    log_report(report_of(np.arange(64).reshape(16, 4) % 16, 16, (2, 2)), tmp_path)
    events = EventAccumulator(str(tmp_path)).Reload()
    assert events.Scalars("latents/usage_entropy_bits")[0].value == pytest.approx(4)
    assert events.Tags()["images"] == ["latents/usage_sorted"]
    assert events.Tags()["histograms"] == ["latents/patches_per_cluster"]
