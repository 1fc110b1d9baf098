"""Constraints on texts against enumeration, and a language model that has to meet them."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

from distpc.circuits.chain import Chain
from distpc.circuits.circuit import Circuit
from distpc.data.tokenizers import Characters
from distpc.errors import ConstraintError
from distpc.inference.automaton import UNREACHABLE, Automaton
from distpc.inference.constraints import ConstrainedChain
from distpc.inference.guidance import Guidance, logits_processor, word_constraint
from distpc.inference.keywords import keywords
from distpc.structures.hmm import hmm

STATES, TOKENS, STEPS = 3, 4, 6
TEXTS = np.array(list(itertools.product(range(TOKENS), repeat=STEPS)))
WAYS = [
    [[[0, 1]]],
    [[[0, 1]], [[2], [3, 3]]],
    [[[1, 1, 2]], [[1, 2]], [[2, 1]]],
    [[[0, 0, 0, 0, 1]]],
]


def holds(text: Sequence[int], ways: Sequence[Sequence[Sequence[int]]], end: int | None) -> bool:
    """Whether every keyword appears before the end, found by looking."""
    text = list(text)
    text = text[: text.index(end)] if end in text else text
    return all(
        any(text[i : i + len(s)] == s for s in map(list, found) for i in range(len(text)))
        for found in ways
    )


@pytest.fixture(scope="module")
def chain() -> Chain:
    return Chain.of(Circuit(hmm(STEPS, STATES), [TOKENS] * STEPS, seed=5))


@pytest.mark.parametrize("ways", WAYS)
@pytest.mark.parametrize("end", [None, 3])
def test_probabilities_are_enumerations(
    chain: Chain, ways: list[list[list[int]]], end: int | None
) -> None:
    ways = [[s for s in found if end not in s] for found in ways]
    automaton = keywords(ways, TOKENS, end_token=end)
    met = np.array([holds(text, ways, end) for text in TEXTS.tolist()])
    assert np.array_equal(met, [automaton.accepting[automaton.run(text)] for text in TEXTS])
    p = chain.read(torch.from_numpy(TEXTS)).log_prob.exp().numpy()
    constrained = ConstrainedChain(chain, automaton)
    prefixes = [[], [0], [2, 0], [1, 1], [1, 2, 1], [0, 0, 0, 0]]
    for prefix in prefixes:
        size = len(prefix)
        begins = (TEXTS[:, :size] == prefix).all(1)
        text = torch.tensor([prefix], dtype=torch.int64).view(1, -1)
        _, states, at = constrained.begin(text)
        exact = p[begins & met].sum() / p[begins].sum()
        found = constrained.log_prob(states, at, STEPS - size).exp()
        np.testing.assert_allclose(found.numpy(), [exact], rtol=0, atol=1e-9)
        each = [p[begins & met & (TEXTS[:, size] == v)].sum() for v in range(TOKENS)]
        if exact == 0:
            assert float(found) == 0.0
            with pytest.raises(ConstraintError, match="exactly 0"):
                constrained.next_token(states, at, STEPS - size)
            continue
        following = constrained.next_token(states, at, STEPS - size)[0].numpy()
        np.testing.assert_allclose(following, each / p[begins & met].sum(), rtol=0, atol=1e-9)
        alone = np.array([p[begins & (TEXTS[:, size] == v)].sum() for v in range(TOKENS)])
        ratio = constrained.log_ratio(states, at, STEPS - size).exp()[0].numpy()
        np.testing.assert_allclose(ratio, each / alone, rtol=0, atol=1e-9)


def test_samples_meet_the_constraint_with_their_frequencies(chain: Chain) -> None:
    ways = WAYS[1]
    constrained = ConstrainedChain(chain, keywords(ways, TOKENS))
    drawn = constrained.sample(4000, 4, seed=1).numpy()
    assert all(holds(text, ways, None) for text in drawn.tolist())
    texts = np.array(list(itertools.product(range(TOKENS), repeat=4)))
    met = np.array([holds(text, ways, None) for text in texts.tolist()])
    p = np.where(met, chain.read(torch.from_numpy(texts)).log_prob.exp().numpy(), 0.0)
    p /= p.sum()
    cells = (drawn @ TOKENS ** np.arange(4)[::-1])[:, None] == np.arange(len(texts))
    assert (np.abs(cells.mean(0) - p) < 5 * np.sqrt(p / 4000) + 1e-9).all()


def test_constraints_that_cannot_be_met_say_so(chain: Chain) -> None:
    automaton = keywords([[[0, 1]], [[2, 2]]], TOKENS, names=["ab", "cc"])
    constrained = ConstrainedChain(chain, automaton)
    states, at = chain.starts(2), torch.tensor([0, automaton.run([0])])
    assert constrained.log_prob(states, at, 3)[0] == -torch.inf
    assert constrained.log_prob(states, at, 3)[1] > -torch.inf
    with pytest.raises(ConstraintError, match="cannot be met") as caught:
        constrained.next_token(states, at, 3)
    assert caught.value.found == "3 tokens left" and "at least 4" in str(caught.value.expected)
    assert "'ab', 'cc'" in str(caught.value.where)
    with pytest.raises(ConstraintError, match="no token is left"):
        constrained.joint(states, at, 0)
    ended = keywords([[[0, 1]]], TOKENS, end_token=3)
    assert ended.fewest_tokens()[ended.run([0, 3, 0, 1])] == UNREACHABLE
    with pytest.raises(ConstraintError, match="other vocabularies"):
        ConstrainedChain(chain, keywords([[[0]]], TOKENS + 1))


@pytest.mark.parametrize("ways", [[], [[]], [[[]]], [[[TOKENS]]], [[[-1]]], [[[3]]]])
def test_keywords_that_are_none(ways: list[list[list[int]]]) -> None:
    with pytest.raises(ConstraintError):
        keywords(ways, TOKENS, end_token=3)


def test_automata_from_tables() -> None:
    table = np.array([[1, 0, 0, 0], [1, 0, 0, 1]])
    automaton = Automaton.of_table(table, np.array([False, True]))
    assert automaton.table.shape[1] == 3 and automaton.run([1, 0, 3]) == 1
    with pytest.raises(ConstraintError, match="outside the vocabulary"):
        automaton.run([4])
    for wrong in (table + 1, table[:, :0], table[0]):
        with pytest.raises(ConstraintError, match="does not describe"):
            Automaton.of_table(wrong, np.array([False, True]))


def test_a_language_model_meets_the_constraint(tmp_path: Path) -> None:
    """A real transformer, untrained, generates: 40 of 40 texts hold both words."""
    transformers = pytest.importorskip("transformers")
    tokenizer = Characters("abcdefghij .")
    size = tokenizer.size + 1
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=size + 3, n_positions=32, n_embd=16, n_layer=1, n_head=2,
        bos_token_id=size - 1, eos_token_id=size - 1, pad_token_id=size - 1,
    )  # fmt: skip
    model = transformers.GPT2LMHeadModel(config).eval()
    circuit = Circuit(hmm(8, 6), [size] * 8, seed=1)
    automaton = word_constraint(["bad", "fig"], tokenizer, size, end_token=size - 1)
    prompt = torch.tensor([[size - 1, 0, 1]]).expand(40, -1)
    guidance = Guidance(Chain.of(circuit), automaton, prompt.shape[1], 12, skip=1)
    made = model.generate(
        prompt, max_new_tokens=12, do_sample=True,
        logits_processor=transformers.LogitsProcessorList([logits_processor(guidance)]),
    )  # fmt: skip
    for row in made[:, 3:].tolist():
        text = tokenizer.decode([t for t in row if t < size - 1])
        assert "bad" in text and "fig" in text
    tight = Guidance(Chain.of(circuit), automaton, prompt.shape[1], 5)
    with pytest.raises(ConstraintError, match="at least 6"):
        tight(prompt, torch.zeros(40, size + 3))
    with pytest.raises(ConstraintError, match="empty"):
        word_constraint([" "], tokenizer, size, None)


def test_guidance_follows_reordered_texts() -> None:
    chain = Chain.of(Circuit(hmm(6, 4), [5] * 6, seed=2))
    automaton = keywords([[[1, 2]]], 5)
    texts = torch.tensor([[0, 1], [3, 4], [1, 1]])
    guidance = Guidance(chain, automaton, 0, 5)
    guidance(texts, torch.zeros(3, 5))
    longer = torch.cat([texts[[2, 0, 0]], torch.tensor([[2], [0], [2]])], 1)
    fresh = Guidance(chain, automaton, 0, 5)
    torch.testing.assert_close(
        guidance(longer, torch.zeros(3, 5)), fresh(longer, torch.zeros(3, 5))
    )
