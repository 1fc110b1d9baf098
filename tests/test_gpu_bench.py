"""The benchmarks of a GPU where there is none: what they count, keep and stop."""

import json
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent.parent / "tools"))

from circuit_bench.cases import Case, image_tree
from circuit_bench.gpu_bench import GpuCase, relative_error
from circuit_bench.gpu_clock import TooSlow, at_most, is_out_of_memory
from circuit_bench.gpu_table import Table
from circuit_bench.kernels import kernels_of
from circuit_bench.race import Racer, geometric, race, seconds_to, tutorial
from circuit_bench.traffic import step_bytes, step_flops

from distpc.circuits.kernels.step import FastStep

CEILINGS = {"bf16_tflops": 1.0, "fp32_tflops": 1.0, "bf16_bmm_tflops": 1.0, "copy_gbs": 10.0}
LIMITS = {"case": 60.0, "peer": 20.0, "timing": 1.0}


def test_a_case_takes_what_it_leaves_open() -> None:
    case = Case.parse("hmm:32:1024", 512, "bfloat16", 33_279)
    assert (case.batch, case.dtype, case.num_categories) == (512, "bfloat16", 33_279)
    assert Case.parse("hclt:16:8:4:float32", 512, "bfloat16").batch == 4
    assert Case.parse("hmm:32:1024").num_categories == 10_000


@pytest.mark.parametrize(("variables", "is_image"), [(784, True), (768, True), (800, False)])
def test_trees_of_grey_and_coloured_images(variables: int, is_image: bool) -> None:
    if is_image:
        assert image_tree(variables).num_nodes == variables
    else:
        with pytest.raises(ValueError, match="no square image"):
            image_tree(variables)


def test_counts_of_a_step() -> None:
    case = Case("hclt", 4, 8, 2, "bfloat16")
    assert step_flops(case) == pytest.approx(6 * 2 * 64 * 3)
    # 12 a parameter, 3 sums of 6 messages, 4 leaves that look up floats and read a flow.
    assert step_bytes(case, 1000) == 12_000 + 3 * 6 * 16 * 2 + 4 * (2 * 8 * 4 + 16 * 2)


def test_limits_nest() -> None:
    with pytest.raises(TooSlow), at_most(0.3):
        with at_most(60.0):
            pass
        time.sleep(5)
    begun = time.perf_counter()
    with pytest.raises(TooSlow), at_most(60.0), at_most(0.1):
        time.sleep(5)
    assert time.perf_counter() - begun < 4


def test_what_does_not_fit_is_told_from_what_fails() -> None:
    with pytest.raises((RuntimeError, MemoryError)) as caught:
        torch.empty(2**45)
    assert is_out_of_memory(caught.value)
    assert not is_out_of_memory(RuntimeError("shapes differ"))


def test_rows_are_kept_and_replaced(tmp_path: Path) -> None:
    table = Table(tmp_path / "table.json")
    table.begin({"device": "some", "ceilings": CEILINGS})
    for case in (Case("hclt", 16, 8, 4), Case("hmm", 4, 8, 4, vocabulary=20)):
        GpuCase(case, "cpu", CEILINGS, LIMITS, rounds=3).run(table.add, with_peer=False)
    rows = json.loads((tmp_path / "table.json").read_text())["cases"]
    assert [row["structure"] for row in rows] == ["hclt", "hmm"]
    assert all(row["step_ms"] > 0 and row["fraction_of_gemm"] >= 0 for row in rows)
    again = Table(tmp_path / "table.json")
    again.add({**rows[0], "step_ms": 1.0})
    assert again.row_of(Case("hclt", 16, 8, 4))["step_ms"] == 1.0
    assert again.row_of(Case("hclt", 16, 8, 5)) is None
    assert len(again.content["cases"]) == 2
    # A process that has read the file before others wrote to it loses nothing of theirs.
    table.add({**rows[1], "batch": 8})
    assert [row["batch"] for row in table.content["cases"]] == [4, 4, 8]
    assert table.row_of(Case("hclt", 16, 8, 4))["step_ms"] == 1.0


def test_a_side_that_fails_leaves_its_reason() -> None:
    case = GpuCase(Case("hclt", 16, 8, 4), "cpu", CEILINGS, {**LIMITS, "case": 0.001})
    case.run(lambda row: None, with_peer=False)
    assert "given up" in case.row["note"] and "step_ms" not in case.row


def test_nan_never_agrees() -> None:
    ones = torch.ones(3)
    assert relative_error(torch.tensor([1.0, 1.0, 1.01]), ones) == pytest.approx(0.01, rel=1e-3)
    assert relative_error(torch.tensor([1.0, float("nan"), 1.0]), ones) == float("inf")


def test_a_race_improves_and_times_are_read_off_its_curve() -> None:
    rng = np.random.default_rng(0)
    data = torch.from_numpy(rng.integers(0, 2, (64, 3)).astype(np.uint8))
    taken: list[float] = []
    racer = Racer(
        "it",
        lambda x, step_size: taken.append(step_size),
        lambda x: torch.full((len(x),), -3.0 / (1 + len(taken))),
        geometric(0.3, 0.01),
    )
    found = race(racer, data, data[:32], 16, 0.05, 3)
    bits = [b for _, b in found["curve"]]
    assert bits == sorted(bits, reverse=True) and found["steps"] == len(taken)
    assert taken[0] == pytest.approx(0.3) and min(taken) >= 0.0099
    assert seconds_to([(0.0, 3.0), (2.0, 1.0)], 2.0) == 1.0
    assert seconds_to([(0.0, 3.0), (2.0, 1.0)], 0.5) is None
    assert tutorial(0.0) == 0.9 and tutorial(100 / 350) == pytest.approx(0.1)
    assert tutorial(1.0) == pytest.approx(0.05)


def test_kernels_together_do_the_operations_of_a_step() -> None:
    case = Case("hclt", 16, 8, 4, "float32")
    fast = FastStep(case.circuit(), case.batch, dtype=torch.float32)
    (x,) = case.batches(1, "cpu")
    fast.step(x, 0.1)
    kernels = list(kernels_of(fast))
    root = 6 * case.batch * case.num_states
    assert sum(kernel.flops for kernel in kernels) == step_flops(case) + root
    assert all(kernel.bytes > 0 for kernel in kernels)
    with torch.no_grad():
        for kernel in kernels:
            kernel.run()
    assert fast.evaluate(x).isfinite().all()
