"""Circuits and comparisons for tests of the fused step. As a program: all cases by the kernels
themselves, in Triton's interpreter, which has to be chosen before Triton is first imported."""

import copy

import torch

from distpc.circuits.circuit import Circuit
from distpc.circuits.kernels import launch
from distpc.circuits.kernels.step import FastStep
from distpc.structures.builder import GraphBuilder
from distpc.structures.hclt import hclt_graph
from distpc.structures.tree import Tree
from distpc.training.optimizer import CircuitOptimizer

STEP_SIZE = 0.3


def tree(num_units: int, num_categories: int = 5) -> Circuit:
    """Six variables; nodes with 0, 1, 2 and 3 sums below, and one stage of several of them."""
    edges = [(0, 1), (0, 2), (0, 3), (3, 4), (4, 5)]
    circuit = Circuit(hclt_graph(Tree.from_edges(6, edges), num_units), [num_categories] * 6)
    circuit.set_smoothing(0.1, 1.0, 1000)
    return circuit


def chain(num_units: int, num_categories: int, length: int = 3) -> Circuit:
    """A hidden Markov model with tied tables."""
    builder = GraphBuilder()
    state = -1
    for t in reversed(range(length)):
        factors = [builder.input(num_units, t, "emission")]
        if t < length - 1:
            factors.append(builder.sum(num_units, state, "transition"))
        state = builder.product(factors, t)
    circuit = Circuit(builder.finish(state, length), [num_categories] * length)
    circuit.set_smoothing(0.1, 1.0, 1000)
    return circuit


def samples(circuit: Circuit, batch: int, seed: int = 0) -> torch.Tensor:
    """Random samples, some values missing."""
    generator = torch.Generator().manual_seed(seed)
    limit = circuit.num_categories[0]
    x = torch.randint(0, limit, (batch, circuit.num_variables), generator=generator)
    x[0, 1] = x[-1, 0] = -1
    return x.to(circuit.device)


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    """|found - expected| / |expected|, of whole tensors."""
    return float((found - expected).norm() / expected.norm())


def check_steps(circuit: Circuit, fast: FastStep, tolerance: float, steps: int = 2) -> None:
    """Training steps of a copy by the ordinary engine and by the fused step agree."""
    ordinary = copy.deepcopy(circuit)
    optimizer = CircuitOptimizer(ordinary.parameter_groups(), step_size=STEP_SIZE)
    for seed in range(steps):
        x = samples(circuit, fast.batch_size, seed)
        optimizer.zero_grad()
        expected = ordinary(x)
        (-expected.sum() / len(x)).backward()
        optimizer.step()
        assert relative(fast.step(x, STEP_SIZE), expected.detach()) < tolerance
    for found, expected in zip(circuit.parameters(), ordinary.parameters(), strict=True):
        assert relative(found.detach(), expected.detach()) < 20 * tolerance
    x = samples(circuit, fast.batch_size, steps)
    with torch.no_grad():
        assert relative(fast.evaluate(x), ordinary(x)) < 10 * tolerance


CASES = {
    "tree": lambda: tree(8),
    "odd": lambda: tree(20),
    "chain": lambda: chain(16, 5),
    "large vocabulary": lambda: chain(20, 400),
    "two chunks": lambda: tree(16, 300),
}


def check_rounding_at_random(seeds: int = 40) -> None:
    """Statistics kept in bfloat16: each is one of the two numbers around the exact one, and their
    mean over many seeds is the exact one."""
    exact = tree(16)
    FastStep(exact, 8, dtype=torch.float32).step(samples(exact, 8), STEP_SIZE)
    circuit = tree(16)
    fast = FastStep(circuit, 8, dtype=torch.float32, statistics=torch.bfloat16)
    (tables,) = (t for t in fast.layout.tables.values() if t.shape == (16, 16))
    start = [parameter.detach().clone() for parameter in circuit.parameters()]
    found = []
    for seed in range(seeds):
        with torch.no_grad():
            for parameter, value in zip(circuit.parameters(), start, strict=True):
                parameter.copy_(value)
        fast.read()
        fast.layout.seed.fill_(seed)
        fast.step(samples(circuit, 8), STEP_SIZE)
        found.append(tables.weights.clone())
    expected = torch.stack([exact.bank_list[b].statistics[t] for b, t in tables.owners])
    expected = expected.detach() + tables.floor
    for weights in found:
        assert torch.equal(weights, weights.bfloat16().float())
        assert bool(((weights - expected).abs() <= expected * 2.0**-7).all())
    error = float((torch.stack(found).mean(0) - expected).norm() / expected.norm())
    assert error < 2.0**-8 / seeds**0.5, error
    assert not torch.equal(found[0], found[1])
    fast.write()
    again = torch.stack([circuit.bank_list[b].statistics[t] for b, t in tables.owners])
    torch.testing.assert_close(again.detach(), found[-1] - tables.floor, rtol=1e-6, atol=0)


def main() -> None:
    """Every case, by the kernels."""
    for name, make in CASES.items():
        circuit = make()
        fast = FastStep(circuit, 8, dtype=torch.float32)
        assert launch.uses_triton(circuit.device)
        check_steps(circuit, fast, 1e-6)
        print(name)
    circuit = tree(5)
    check_steps(circuit, FastStep(circuit, 7, dtype=torch.float32), 1e-6)
    check_rounding_at_random()


if __name__ == "__main__":
    main()
