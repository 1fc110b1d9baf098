"""Large vocabularies: only what is looked up is read out; a step holds S and its flow."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from distpc.circuits.circuit import Circuit
from distpc.circuits.exact import log_prob_exact
from distpc.structures.builder import GraphBuilder
from distpc.structures.region_graph import RegionGraph

from .graphs import exact_flows, flows_of, patches


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


def hmm(length: int, num_units: int, vocabulary: int) -> Circuit:
    """A tied hidden Markov model over tokens."""
    builder = GraphBuilder()
    state = None
    for t in reversed(range(length)):
        factors = [builder.input(num_units, t, "emission")]
        if state is not None:
            factors.append(builder.sum(num_units, state, "transition"))
        state = builder.product(factors)
    assert state is not None
    return Circuit(builder.finish(state, length), [vocabulary] * length, seed=1)


def step(circuit: Circuit, x: Tensor) -> None:
    circuit.zero_grad()
    (-circuit(x).mean()).backward()


class BigTensors(TorchDispatchMode):
    """Counts operations that make, or read all of, a tensor of at least `size` entries."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size, self.made, self.swept = size, [], []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        inputs = [a for a in args if isinstance(a, Tensor) and a.numel() >= self.size]
        known = {a.untyped_storage().data_ptr() for a in inputs}
        results = [r for r in (out if isinstance(out, tuple) else (out,)) if isinstance(r, Tensor)]
        made = [
            r
            for r in results
            if r.numel() >= self.size and r.untyped_storage().data_ptr() not in known
        ]
        name = func.overloadpacket.__name__
        is_view = bool(results) and results[0].untyped_storage().data_ptr() in known
        self.made += [name for _ in made]
        if inputs and name != "embedding" and not is_view:
            self.swept.append(name)
        return out


@pytest.mark.parametrize("in_logs", [False, True])
def test_a_step_reads_the_table_once_and_makes_its_flow(in_logs: bool, monkeypatch) -> None:
    if in_logs:
        monkeypatch.setattr("distpc.circuits.layers.WEAK", 2.0)
        monkeypatch.setattr("distpc.circuits.steps.WEAK", 2.0)
    circuit = hmm(8, 16, 5000)
    circuit.set_smoothing(0.1, 1.0, 100)
    x = torch.randint(0, 5000, (20, 8), generator=torch.Generator().manual_seed(0))
    circuit.zero_grad()
    with BigTensors(5000 * 16) as big:
        (-circuit(x).mean()).backward()
    passes = 1 + in_logs
    # Two passes make two flows, which autograd adds up.
    assert big.swept.count("sum") == passes
    assert set(big.swept) <= {"sum", "add", "add_", "detach"}
    assert len([name for name in big.made if name != "add"]) == passes


@pytest.mark.parametrize("in_logs", [False, True])
@pytest.mark.parametrize("pseudocount", [0.0, 1.0])
def test_rows_that_are_looked_up_are_those_of_the_whole_table(
    in_logs: bool, pseudocount: float, monkeypatch
) -> None:
    if in_logs:
        monkeypatch.setattr("distpc.circuits.layers.WEAK", 2.0)
        monkeypatch.setattr("distpc.circuits.steps.WEAK", 2.0)
    # Tables of several sizes, bags, and a bank with a unit that was never used.
    own = Circuit(patches(3, 3, 4, tied=False), [40, 90, 50] * 3, seed=0, init_noise=3.0)
    tied = hmm(5, 3, 300)
    for circuit in (own, tied):
        circuit.set_smoothing(pseudocount, pseudocount, 100)
        circuit.statistics_of(0)[0] = 0.0
        generator = torch.Generator().manual_seed(1)
        sizes = torch.tensor(circuit.num_categories)
        x = (torch.rand(6, len(sizes), generator=generator) * sizes).long()
        x[0] = -1
        x[1, ::2] = -1
        log_prob = circuit(x)
        torch.testing.assert_close(
            log_prob.double(), log_prob_exact(circuit, x), rtol=1e-6, atol=1e-5
        )
        # So often that the whole table is read.
        torch.testing.assert_close(circuit(x.repeat(20, 1))[:6], log_prob)
        log_prob.sum().backward()
        for region, flow in exact_flows(circuit, torch.sum, x).items():
            found = flows_of(circuit, region).double()
            torch.testing.assert_close(found, flow, rtol=1e-4, atol=1e-5)


def test_latents_are_masked_in_looked_up_rows() -> None:
    builder = GraphBuilder()
    state = builder.product([builder.input(3, 0), builder.input(3, 1)], latent=0)
    graph: RegionGraph = builder.finish(state, 2)
    circuit = Circuit(graph, [500, 300], seed=2)
    x = torch.tensor([[17, 299], [-1, 4], [499, -1]])
    latents = torch.tensor([[2], [0], [-1]])
    torch.testing.assert_close(
        circuit(x, latents).double(), log_prob_exact(circuit, x, latents=latents)
    )


MEASURE = """
import resource, torch
from tests.circuits.test_vocabularies import hmm, step
from distpc.training.optimizer import CircuitOptimizer
torch.set_num_threads(1)
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
x = torch.randint(0, 1000, (32, 32))
small = hmm(32, 256, 3000)
CircuitOptimizer(small.parameter_groups())
step(small, x)
before = peak()
circuit = hmm(32, 256, 50_000)
optimizer = CircuitOptimizer(circuit.parameter_groups())
for _ in range(3):
    step(circuit, 50 * x)
    optimizer.step()
print(peak() - before)
"""


@pytest.mark.slow
def test_fifty_thousand_tokens_take_the_statistics_and_their_flow() -> None:
    """Peak resident memory of training, V = 50,000 and K = 256, in MiB."""
    run = subprocess.run(
        [sys.executable, "-c", MEASURE], capture_output=True, text=True, check=True
    )
    table = 50_000 * 256 * 4 / 2**20
    assert float(run.stdout) < 2.25 * table
