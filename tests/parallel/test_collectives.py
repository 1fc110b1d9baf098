import json
from pathlib import Path

import torch

from distpc.parallel import collectives
from distpc.parallel.launch import run_ranks
from distpc.parallel.mesh import Mesh


def test_three_ranks_agree(tmp_path: Path) -> None:
    run_ranks(
        "parallel_targets:use_collectives",
        {"out": str(tmp_path), "text": "größer"},
        num_ranks=3,
        threads_per_rank=1,
        log_folder=tmp_path / "logs",
    )
    for rank in range(3):
        assert json.loads((tmp_path / f"{rank}.json").read_text()) == {
            "sum": [3.0, 3.0],
            "mean": [1.0, 1.0],
            "max": [2.0, 1.0],
            "own": [float(rank), 1.0],
            "broadcast": {"from": 0},
            "gather": ["rank 0", "rank 1", "rank 2"],
            "threads": 1,
            "payload": "größer",
        }


def test_one_process_needs_no_group() -> None:
    mesh = Mesh(0, 1, 0, torch.device("cpu"))
    # An engine that an earlier test used in this process keeps its group.
    had_one = torch.distributed.is_initialized()
    mine = torch.tensor([1.0, 2.0])
    for function in (collectives.sum_across, collectives.mean_across, collectives.max_across):
        result = function(mine, mesh)
        assert result.tolist() == [1.0, 2.0]
        assert result is not mine
    assert collectives.broadcast_object("a", mesh) == "a"
    assert collectives.gather_objects("a", mesh) == ["a"]
    collectives.barrier(mesh)
    assert torch.distributed.is_initialized() == had_one


def test_starting_and_finishing_twice_is_harmless() -> None:
    mesh = Mesh(0, 1, 0, torch.device("cpu"))
    collectives.start(mesh)
    collectives.start(mesh)
    assert torch.distributed.is_initialized()
    collectives.finish()
    collectives.finish()
    assert not torch.distributed.is_initialized()
