"""Circuits whose units ranks share, against the same trainings in one process."""

from itertools import product
from pathlib import Path

import pytest
from node_runs import STRUCTURES, Case, train_alone

from distpc.artifacts.tensors import read_tensors
from distpc.errors import ArtifactError
from distpc.parallel.launch import run_ranks


def train(cases: list[Case], num_ranks: int, folder: Path) -> None:
    """All cases in one launch, and compared with one process."""
    out = folder / "found.safetensors"
    run_ranks(
        "node_runs:train_all",
        {"cases": cases, "out": str(out)},
        num_ranks=num_ranks,
        threads_per_rank=1,
        log_folder=folder,
    )
    found, _ = read_tensors(out, holds="results", error=ArtifactError)
    alone = {key: train_alone(Case(*key)) for key in {case[:2] for case in cases}}
    for case in cases:
        for name, expected in alone[case[:2]].items():
            if not expected.is_floating_point():
                continue
            # Adam divides small flows by their own size: rounding grows.
            tolerance = 1e-5 if case.rule == "online_em" or name == "nats" else 1e-4
            gap = (found[f"{case.name}/{name}"] - expected).abs().max() / expected.abs().max()
            assert gap <= tolerance, (num_ranks, case, name, float(gap))


def test_units_and_samples_shared_in_each_way(tmp_path: Path) -> None:
    cases = [
        Case("hclt", "online_em", 2, 3, 3),
        Case("hmm", "online_em", 2, 1, 3),
        Case("quad_graph", "online_em", 4, 0, 1),
        Case("patches", "online_em", 2, 2, 1),
        Case("patches", "adam", 4, 0, 3),
        Case("hmm", "adam", 2, 0, 1),
    ]
    train(cases, 4, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("num_ranks", [1, 2, 3, 4])
def test_every_layout(num_ranks: int, tmp_path: Path) -> None:
    """Node axis x ZeRO x accumulation x structures x rules; Adam on logits needs whole rows."""
    axes = [size for size in range(1, num_ranks + 1) if num_ranks % size == 0]
    ways = [("online_em", stage) for stage in range(4)] + [("adam", 0)]
    cases = [
        Case(structure, rule, node, stage, accumulation)
        for structure, (rule, stage), node, accumulation in product(STRUCTURES, ways, axes, (1, 3))
    ]
    train(cases, num_ranks, tmp_path)
