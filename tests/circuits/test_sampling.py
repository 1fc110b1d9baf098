"""Samples do not depend on how they are batched, and their random numbers are good ones."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import stats

from distpc.circuits import queries
from distpc.circuits.circuit import Circuit
from distpc.circuits.queries import sampling
from distpc.circuits.queries.randomness import normals, uniforms
from distpc.structures.builder import GraphBuilder

from .graphs import patches, random_evidence, small_circuit


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


def test_more_samples_begin_with_the_same_ones() -> None:
    circuit = Circuit(patches(6, 4, 8), [16] * 24, seed=0)
    many = circuit.sample(50, seed=3)
    assert torch.equal(circuit.sample(7, seed=3), many[:7])
    x, _ = random_evidence(circuit, 3, 1)
    given = circuit.sample(9, seed=3, x=x)
    assert torch.equal(circuit.sample(4, seed=3, x=x), given[:, :4])
    assert not torch.equal(given[:, 0], given[:, 1])
    same = circuit.sample(2, seed=3, x=x[:1].expand(2, -1))
    assert not torch.equal(same[0], same[1])


@pytest.mark.parametrize("name", ["tucker", "monarch", "grouped-patches", "shared-child"])
def test_samples_do_not_depend_on_batches(name: str, monkeypatch) -> None:
    circuit = small_circuit(name, noise=3.0)
    x, _ = random_evidence(circuit, 40, 1)
    free, given = circuit.sample(300, seed=5), circuit.sample(3, seed=5, x=x)
    for size in (1, 7):
        blocks = queries.sample_blocks(circuit, 3, 5, x, batch_size=size)
        assert torch.equal(torch.cat([block for _, block in blocks]), given)
    monkeypatch.setattr(sampling, "CHUNK_ENTRIES", 128)
    monkeypatch.setattr(sampling, "CHOICE_BYTES", 8000)
    assert torch.equal(circuit.sample(300, seed=5), free)
    assert torch.equal(circuit.sample(3, seed=5, x=x), given)


def test_samples_of_real_variables_follow_their_mixture() -> None:
    builder = GraphBuilder()
    state = builder.product([builder.input(2, 0), builder.input(2, 1)])
    circuit = Circuit(builder.finish(state, 2), [None, 2], seed=3, init_noise=3.0)
    samples = circuit.sample(20_000, seed=1)
    assert samples.dtype == torch.float32
    share = circuit.weights_of(circuit.graph.root, torch.float64)[0].numpy()
    real = next(i for i, r in enumerate(circuit.graph.regions) if r.variable == 0)
    mean, variance = circuit.weights_of(real, torch.float64).numpy().T

    def cdf(values: np.ndarray) -> np.ndarray:
        return stats.norm.cdf(values[:, None], mean, np.sqrt(variance)) @ share

    assert stats.kstest(samples[:, 0].numpy(), cdf).pvalue > 1e-4
    given = circuit.sample(3, x=torch.tensor([[0.25, torch.nan], [torch.nan, 1.0]]))
    assert (given[0, :, 0] == 0.25).all()
    assert (given[1, :, 1] == 1.0).all()
    assert len(given[1, :, 0].unique()) == 3


@pytest.mark.parametrize("samples", ["one row", "many rows"])
def test_random_numbers_are_uniform_and_independent(samples: str) -> None:
    names = torch.arange(50_000) * (1 if samples == "one row" else 2**32)
    draws = [uniforms(0, 0, names), uniforms(0, 2, names), uniforms(1, 0, names)]
    for draw in draws:
        assert float(draw.min()) >= 0
        assert float(draw.max()) < 1
        assert stats.kstest(draw.numpy(), "uniform").pvalue > 1e-4
        assert abs(stats.pearsonr(draw[1:].numpy(), draw[:-1].numpy())[0]) < 0.02
    for a, b in ((0, 1), (0, 2), (1, 2)):
        assert abs(stats.pearsonr(draws[a].numpy(), draws[b].numpy())[0]) < 0.02
    assert stats.kstest(normals(0, 4, names).numpy(), "norm").pvalue > 1e-4


def test_random_numbers_are_those_of_splitmix64() -> None:
    """Against Python's integers, which do not wrap."""
    bits, golden = 2**64 - 1, 0x9E3779B97F4A7C15

    def finalise(z: int) -> int:
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & bits
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & bits
        return z ^ (z >> 31)

    names = [0, 1, 5, 2**33 + 7, 2**62]
    for seed, stream in ((0, 0), (7, 12), (2**63 - 1, 3)):
        key = finalise((finalise(seed) + (stream + 1) * golden) & bits)
        expected = [(finalise((key + name * golden) & bits) >> 11) * 2.0**-53 for name in names]
        assert uniforms(seed, stream, torch.tensor(names)).tolist() == expected
