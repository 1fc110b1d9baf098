"""Where the time of steps goes, as ranks measure and tell it."""

import json
from pathlib import Path

import pytest
import torch

from distpc.parallel.launch import run_ranks
from distpc.parallel.mesh import Mesh
from distpc.parallel.meter import Meter, by_member, covered


def test_time_in_which_something_is_under_way() -> None:
    assert covered([]) == 0.0
    assert covered([(5.0, 6.0), (0.0, 2.0), (1.0, 3.0), (1.5, 1.7)]) == pytest.approx(4.0)


def test_what_is_measured_when() -> None:
    mesh = Mesh(0, 1, 0, torch.device("cpu"))
    often, never = Meter(mesh, 1.0, 10), Meter(mesh, 1.0, 0)
    assert [step for step in range(1, 31) if often.is_due(step)] == [2, 10, 20, 30]
    assert not any(never.is_due(step) for step in range(1, 31))


def test_operations_are_counted_once_where_nobody_knows_them() -> None:
    meter = Meter(Mesh(0, 1, 0, torch.device("cpu")), None, 1)
    weight, x = torch.ones(8, 16, requires_grad=True), torch.ones(5, 8)

    def update() -> str:
        (x @ weight).sum().backward()
        return "done"

    assert meter.run(1, 5, 0.5, update) == "done"
    # Forwards and to the weight's gradient; x has none.
    assert meter.flops_per_sample == 2 * 2 * 8 * 16
    assert meter.measured_step == 0 and not meter.figures
    assert meter.run(2, 5, 0.75, update) == "done"
    (figures,) = meter.figures
    assert meter.measured_step == 2 and figures["data_seconds"] == 0.25
    assert figures["tflops"] == pytest.approx(512 * figures["samples_per_second"] / 1e12)
    assert 0 < figures["device_peak_fraction"] < 1


def test_many_ranks_are_summed_up() -> None:
    few = by_member([{"tflops": 1.0}, {"tflops": 3.0}], "ranks")
    assert few == {
        "ranks/tflops/least": 1.0,
        "ranks/tflops/largest": 3.0,
        "ranks/tflops/0": 1.0,
        "ranks/tflops/1": 3.0,
    }
    late = by_member([{}, {"tflops": 3.0}], "workers")
    assert set(late) == {f"workers/tflops/{name}" for name in ("least", "largest", "1")}
    many = by_member([{"tflops": float(rank)} for rank in range(512)], "ranks")
    assert many == {"ranks/tflops/least": 0.0, "ranks/tflops/largest": 511.0}


def test_ranks_tell_each_other(tmp_path: Path) -> None:
    """One rank computes longer, and the other waits for it inside a collective."""
    out = tmp_path / "figures"
    run_ranks(
        "parallel_targets:measure_steps",
        {"out": str(out)},
        num_ranks=2,
        threads_per_rank=1,
        log_folder=tmp_path / "logs",
    )
    told = [json.loads(out.with_suffix(f".{rank}").read_text()) for rank in range(2)]
    assert told[0] == told[1]
    busy, waiting = told[0]
    for figures in told[0]:
        parts = ("compute_seconds", "communication_seconds", "data_seconds")
        assert figures["step_seconds"] == pytest.approx(sum(figures[name] for name in parts))
        assert figures["data_seconds"] == 0.25
        assert figures["tflops"] == pytest.approx(2e6 * figures["samples_per_second"] / 1e12)
        assert figures["device_peak_fraction"] > 0
        assert figures["peak_memory_bytes"] > 2**20
    assert busy["samples_per_second"] == pytest.approx(3 / busy["step_seconds"])
    assert busy["compute_seconds"] >= 0.3
    assert waiting["communication_seconds"] >= 0.2
