"""Circuits whose units ranks share, against the same trainings in one process."""

import json
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from node_runs import STRUCTURES, Case, train_alone
from torch import Tensor

from distpc.artifacts.tensors import read_tensors
from distpc.errors import ArtifactError, ConfigError
from distpc.parallel.launch import run_ranks
from distpc.parallel.mesh import Mesh
from distpc.training.checkpoint import Checkpoints

ROOT, HIDDEN = "banks.sum_0000.statistics", "banks.sum_0001.statistics"


def launch(num_ranks: int, folder: Path, **work: Any) -> dict[str, Tensor]:
    """All of the work in one launch."""
    run_ranks(
        "node_runs:run_all",
        {"out": str(folder), **work},
        num_ranks=num_ranks,
        threads_per_rank=1,
        log_folder=folder / "logs",
    )
    found, _ = read_tensors(folder / "found.safetensors", holds="results", error=ArtifactError)
    return found


def compare(cases: list[Case], found: dict[str, Tensor]) -> None:
    """Likelihoods and parameters after ten steps with those of one process."""
    alone = {key: train_alone(Case(*key)) for key in {case[:2] for case in cases}}
    worst: dict[str, float] = {}
    missed = []
    for case in cases:
        for name, expected in alone[case[:2]].items():
            tolerance = 1e-5 if case.rule == "online_em" or name == "nats" else 1e-4
            gap = (found[f"{case.name}/{name}"] - expected).abs().max() / expected.abs().max()
            worst[case.rule] = max(worst.get(case.rule, 0.0), float(gap))
            if not gap <= tolerance:
                missed.append((case.name, name, float(gap)))
    assert not missed, missed
    print(f"{len(cases)} cases, largest relative gaps: {worst}")


def test_meshes_of_four_ranks(tmp_path: Path) -> None:
    """Units and samples shared, checkpoints moved to another mesh, replicas that differ."""
    cases = [Case("hclt", "online_em", 2, 3, 3), Case("quad_graph", "online_em", 4, 0, 1)]
    cases += [Case("hclt", "online_em", 2, 2, 3, True), Case("hmm", "online_em", 4, 0, 3, True)]
    cases += [Case("patches", "adam", 2, 3, 3), Case("hmm", "adam", 1, 1, 3)]
    moves = [
        (Case("patches", "adam", 2, 0), Case("patches", "adam", 4, 0, 3)),
        (Case("quad_graph", "adam", 2, 2), Case("quad_graph", "adam", 1, 3, 3)),
        (Case("hmm", "online_em", 4, 0), Case("hmm", "online_em", 2, 2, 3)),
    ]
    spoils = [(Case("hclt", "online_em", 2, 0), name) for name in (ROOT, HIDDEN)]
    spoils += [(Case("hclt", "online_em", 2, 3), ROOT), (Case("hclt", "online_em", 2, 3), HIDDEN)]
    found = launch(4, tmp_path, cases=cases, moves=moves, spoils=spoils)
    compare(cases, found)
    for number, (first, _) in enumerate(moves):
        nats = train_alone(first)["nats"]
        torch.testing.assert_close(found[f"move-{number}"], nats, rtol=1e-5, atol=0.0)
        same_checkpoints(tmp_path / f"move-{number}")
    told = [json.loads((tmp_path / f"told-{rank}.json").read_text()) for rank in range(4)]
    assert told == [told[0]] * 4
    expected = [
        f"step 7, parameter '{ROOT}', row [0, 0], ranks 0 and 3",
        f"step 7, parameter '{HIDDEN}', row [0, 6], ranks 1 and 3",
        f"step 7, parameter '{ROOT}', row [0, 0], ranks 2 and 3",
        "nothing",
    ]
    assert all(text in message for text, message in zip(expected, told[0], strict=True)), told[0]


def same_checkpoints(folder: Path) -> None:
    """What was saved in one layout and, once loaded, in another, bit by bit."""
    first, second = (Checkpoints(folder / name, {}).newest() for name in ("first", "second"))
    assert first is not None and second is not None and first.splits != second.splits
    for ours, theirs in (
        (first.statistics(), second.statistics()),
        (first.rule_state(), second.rule_state()),
    ):
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())


def test_ranks_that_fill_no_mesh_are_refused() -> None:
    mesh = Mesh(0, 6, 0, torch.device("cpu"))
    assert mesh.with_node_axis(3).data_parallel == 2
    with pytest.raises(ConfigError) as refused:
        mesh.with_node_axis(4)
    assert refused.value.found == "6 ranks in groups of 4"
    assert refused.value.expected == "a divisor of 6: 1, 2, 3, 6"
    assert refused.value.fix is not None and "start 4 or 8 ranks" in refused.value.fix


@pytest.mark.slow
@pytest.mark.parametrize("num_ranks", [1, 2, 3, 4])
def test_every_layout(num_ranks: int, tmp_path: Path) -> None:
    """Node axis x ZeRO x accumulation x structures x rules."""
    axes = [size for size in range(1, num_ranks + 1) if num_ranks % size == 0]
    cases = [
        Case(*case) for case in product(STRUCTURES, ("online_em", "adam"), axes, range(4), (1, 3))
    ]
    cases += [
        Case(structure, "online_em", node, stage, 3, True)
        for structure, node, stage in product(STRUCTURES, axes, (0, 1, 2))
    ]
    compare(cases, launch(num_ranks, tmp_path, cases=cases))
