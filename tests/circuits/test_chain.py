"""Queries of tied hidden Markov models against enumeration: H = 3, V = 4, T = 6, float64."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from distpc.circuits.chain import Chain
from distpc.circuits.circuit import Circuit
from distpc.errors import EvidenceError, StructureError
from distpc.structures.hmm import hmm

STATES, TOKENS, STEPS = 3, 4, 6
TEXTS = torch.tensor(list(itertools.product(range(TOKENS), repeat=STEPS)))


@pytest.fixture(scope="module")
def chain() -> Chain:
    return Chain.of(Circuit(hmm(STEPS, STATES), [TOKENS] * STEPS, seed=5))


@pytest.fixture(scope="module")
def joint(chain: Chain) -> Tensor:
    """(texts, paths) p(text, path) of all texts and all paths of states."""
    matrix = chain.transition.forth(torch.eye(STATES, dtype=torch.float64))
    paths = torch.tensor(list(itertools.product(range(STATES), repeat=STEPS)))
    prior = chain.start[paths[:, 0]]
    for t in range(1, STEPS):
        prior = prior * matrix[paths[:, t - 1], paths[:, t]]
    found = prior.expand(len(TEXTS), -1)
    for t in range(STEPS):
        found = found * chain.emission[TEXTS[:, t, None], paths[:, t]]
    return found


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-9)


def test_likelihoods_are_enumerations(chain: Chain, joint: Tensor) -> None:
    close(joint.sum(), torch.ones((), dtype=torch.float64))
    close(chain.read(TEXTS).log_prob.exp(), joint.sum(1))
    # A text may be read in parts, its state carried over.
    first = chain.read(TEXTS[:, :2])
    second = chain.read(TEXTS[:, 2:], first.states)
    close((first.log_prob + second.log_prob).exp(), joint.sum(1))


def test_missing_tokens_are_summed_out(chain: Chain, joint: Tensor) -> None:
    x = torch.tensor([[1, -1, 2, -1, -1, 3], [-1] * STEPS])
    kept = (TEXTS[:, [0, 2, 5]] == torch.tensor([1, 2, 3])).all(1)
    close(chain.read(x).log_prob.exp(), torch.stack([joint[kept].sum(), joint.sum()]))


def test_posterior_states_are_enumerations(chain: Chain, joint: Tensor) -> None:
    paths = torch.tensor(list(itertools.product(range(STATES), repeat=STEPS)))
    expected = torch.empty(len(TEXTS), STEPS, STATES, dtype=torch.float64)
    for t, k in itertools.product(range(STEPS), range(STATES)):
        expected[:, t, k] = joint[:, paths[:, t] == k].sum(1) / joint.sum(1)
    close(chain.posterior(TEXTS), expected)


def test_gaps_are_filled_from_both_sides(chain: Chain, joint: Tensor) -> None:
    num = 40_000
    x = torch.tensor([[1, -1, 2, 0, -1, 3]])
    found = chain.infill(x, num, seed=3)[0]
    assert found.shape == (num, STEPS) and (found[:, [0, 2, 3, 5]] == x[0, [0, 2, 3, 5]]).all()
    possible = (TEXTS[:, [0, 2, 3, 5]] == x[0, [0, 2, 3, 5]]).all(1)
    exact = joint[possible].sum(1) / joint[possible].sum()
    drawn = (found[:, None] == TEXTS[possible]).all(2).double().mean(0)
    # Five standard errors of a frequency.
    assert ((drawn - exact).abs() < 5 * (exact * (1 - exact) / num).sqrt()).all()
    assert torch.equal(chain.infill(x, 5, seed=3), chain.infill(x, 5, seed=3))


def test_monarch_chains_read_as_their_circuit() -> None:
    circuit = Circuit(hmm(5, 16, layer="monarch"), [7] * 5, seed=2)
    x = torch.randint(0, 7, (6, 5), generator=torch.Generator().manual_seed(1))
    chain = Chain.of(circuit)
    torch.testing.assert_close(chain.read(x).log_prob.float(), circuit.log_prob(x))
    posterior = circuit.posterior(x).double()
    torch.testing.assert_close(chain.posterior(x), posterior, rtol=1e-4, atol=1e-5)


def test_what_is_no_text_of_the_chain(chain: Chain) -> None:
    with pytest.raises(EvidenceError, match="outside the vocabulary") as caught:
        chain.read(torch.tensor([[0, 1], [2, TOKENS]]))
    assert caught.value.where == "text 1, token 1" and caught.value.found == str(TOKENS)
    with pytest.raises(EvidenceError, match="table of tokens"):
        chain.read(torch.zeros(2, 3))
    with pytest.raises(StructureError, match="one transition"):
        Chain.of(Circuit(hmm(4, 3, tied=False), [TOKENS] * 4))
    emission = chain.emission.clone()
    emission[2] = 0.0
    cut = Chain(chain.start, chain.transition, emission)
    assert cut.read(torch.tensor([[0, 2, 1]])).log_prob.isneginf().all()
    with pytest.raises(EvidenceError, match="no completions"):
        cut.infill(torch.tensor([[0, -1, 2]]))
