"""The fused training step: kernels in Triton's interpreter against plain PyTorch, both against the
ordinary engine, and what is refused."""

import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import triton
from packaging.version import Version

import distpc
from distpc.circuits.circuit import Circuit
from distpc.circuits.kernels import launch
from distpc.circuits.kernels.plan import make_plan, why_not
from distpc.circuits.kernels.step import FastStep
from distpc.errors import ConfigError, TrainingError
from distpc.structures.builder import GraphBuilder
from tests.circuits.fused_steps import (
    CASES,
    STEP_SIZE,
    chain,
    check_steps,
    samples,
    tree,
)


@pytest.mark.parametrize("name", CASES)
def test_a_step_is_that_of_the_ordinary_engine(name):
    circuit = CASES[name]()
    fast = FastStep(circuit, 8, dtype=torch.float32)
    assert not launch.uses_triton(circuit.device)
    check_steps(circuit, fast, 1e-6)


@pytest.mark.parametrize("batch", [1, 7, 101])
@pytest.mark.parametrize("num_units", [3, 4])
def test_messages_of_odd_sizes_lie_side_by_side(num_units, batch):
    circuit = tree(num_units)
    check_steps(circuit, FastStep(circuit, batch, dtype=torch.float32), 1e-6)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", CASES)
def test_a_step_on_a_gpu_is_that_of_the_ordinary_engine(name, dtype):
    circuit = CASES[name]().cuda()
    tolerance = 1e-5 if dtype == torch.float32 else 1e-3
    check_steps(circuit, FastStep(circuit, 8, dtype=dtype), tolerance)


def test_statistics_in_bfloat16_want_a_gpu():
    with pytest.raises(ValueError, match="on CUDA alone"):
        FastStep(tree(8), 8, statistics=torch.bfloat16)


@pytest.mark.skipif(
    Version(np.__version__) >= Version("2.5") and Version(triton.__version__) < Version("3.7"),
    reason="the interpreter of Triton 3.6 fails with NumPy 2.5, which wants no arrays as scalars",
)
def test_the_kernels_do_what_plain_pytorch_does():
    done = subprocess.run(
        [sys.executable, "-m", "tests.circuits.fused_steps"],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.splitlines() == list(CASES)


def test_bfloat16_rounds_and_no_more():
    circuit = tree(24)
    check_steps(circuit, FastStep(circuit, 40, dtype=torch.bfloat16), 1e-3)


def test_weights_are_rounded_without_moving_mass():
    fast = FastStep(tree(24), 8, dtype=torch.bfloat16)
    for tables in fast.layout.tables.values():
        mass = tables.weights.float().sum(-1) * tables.inverse
        torch.testing.assert_close(mass, torch.ones_like(mass), rtol=1e-6, atol=0)


def test_flows_of_a_sample_add_up_to_one():
    circuit = tree(8)
    fast = FastStep(circuit, 8, dtype=torch.float32)
    fast.step(samples(circuit, 8), STEP_SIZE)
    for node in range(len(fast.layout.plan.nodes)):
        total = fast.layout.message(fast.layout.v, node).sum(-1)
        torch.testing.assert_close(total, torch.ones(8), rtol=1e-5, atol=0)


def test_an_impossible_sample_passes_no_flow():
    circuit = tree(8)
    fast = FastStep(circuit, 8, dtype=torch.float32)
    fast.layout.codes.copy_(samples(circuit, 8).t())
    fast._forward()
    root = fast.layout.message(fast.layout.y, fast._root)
    root[3] = 0.0
    fast.log_prob[3] = -math.inf
    fast._backward()
    assert bool((fast.layout.v.view(-1, 8, 8)[:, 3] == 0).all())
    assert bool(fast.layout.v.isfinite().all())


def test_a_stage_is_one_product():
    plan = make_plan(tree(8))
    assert [sum(g.tables * g.rows for g in stage) for stage in plan.stages] == [3, 2, 1]
    assert [len(stage) for stage in plan.stages] == [1, 1, 1]
    tied = make_plan(chain(16, 5))
    assert tied.spans[16, 16] == [(tied.stages[0][0].node, 2)]


def without_smoothing() -> Circuit:
    circuit = tree(8)
    circuit.set_smoothing(0.0, 1.0, 1000)
    return circuit


def without_leaf_smoothing() -> Circuit:
    circuit = tree(8)
    circuit.set_smoothing(0.1, 0.0, 1000)
    return circuit


def with_reals() -> Circuit:
    builder = GraphBuilder()
    leaves = [builder.input(4, 0), builder.input(4, 1)]
    circuit = Circuit(builder.finish(builder.product(leaves, 0), 2), [None, 3])
    circuit.set_smoothing(0.1, 1.0, 1000)
    return circuit


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (without_smoothing, "sums with too small a pseudocount"),
        (without_leaf_smoothing, "leaves with too small a pseudocount"),
        (with_reals, "inputs that are no categorical ones"),
    ],
)
def test_what_is_not_covered_is_refused(make, reason):
    circuit = make()
    assert reason in (why_not(circuit) or "")
    with pytest.raises(ValueError, match=reason):
        FastStep(circuit, 8)


def test_without_a_pseudocount_the_ordinary_engine_keeps_what_underflows():
    """What the fused step refuses: a likelihood that scaled values lose is found in logs."""
    circuit = without_smoothing()
    with torch.no_grad():
        for parameter in circuit.parameters():
            parameter[..., 0] = 1e-36
    assert why_not(circuit) is not None
    assert bool(circuit(samples(circuit, 8)).isfinite().all())


def data(count: int = 200) -> np.ndarray:
    generator = np.random.default_rng(0)
    return generator.integers(0, 3, (count, 1)) + generator.integers(0, 3, (count, 6))


def test_fit_by_the_fused_step_learns_what_the_ordinary_one_does():
    histories = []
    for fused in (False, True):
        circuit = tree(8)
        histories.append(
            distpc.fit(
                circuit,
                data(),
                epochs=3,
                batch_size=64,
                valid=data()[:70],
                fused=fused,
                progress=False,
            )
        )
    for ordinary, fused in zip(*histories, strict=True):
        assert ordinary.keys() == fused.keys()
        assert fused["train_bits"] == pytest.approx(ordinary["train_bits"], abs=1e-3)
        assert fused["valid_bits"] == pytest.approx(ordinary["valid_bits"], abs=1e-3)


def test_fit_says_what_the_fused_step_does_not_cover():
    with pytest.raises(ConfigError, match="the rule adam"):
        distpc.fit(tree(8), data(), rule="adam", fused=True, progress=False)
    with pytest.raises(ConfigError, match="pseudocount"):
        distpc.fit(tree(8), data(), pseudocount=0.0, fused=True, progress=False)


def test_fit_finds_likelihoods_that_are_no_numbers_at_the_end_of_the_epoch():
    circuit = tree(8)
    with torch.no_grad():
        next(circuit.parameters())[0, 0] = torch.nan
    with pytest.raises(TrainingError, match="not finite"):
        distpc.fit(circuit, data(), epochs=1, fused=True, progress=False)
