"""Hidden Markov models under a constraint: exact probabilities that it will be met.

For a state h of the next token and a state q of the constraint's automaton,

    W_0[q, h] = 1 if q accepts else 0
    W_n[q, h] = sum_v p(v | h) sum_h' p(h' | h) W_{n-1}[delta(q, v), h']

is the probability that n more tokens meet it (Zhang et al., "Adaptable logical control for large
language models", NeurIPS 2024). Everything else is a product with W.
A constraint that cannot be met in n tokens has the probability 0 exactly: sums of zeros.
Legend: B texts, Q states of the automaton, K states, C tokens, L classes of tokens.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from distpc.circuits.chain import Chain
from distpc.errors import ConstraintError
from distpc.inference.automaton import UNREACHABLE, Automaton


class ConstrainedChain:
    """A hidden Markov model and a constraint.

    Args:
        chain: the model.
        automaton: of the constraint.

    Raises:
        ConstraintError: they have other vocabularies.
    """

    def __init__(self, chain: Chain, automaton: Automaton) -> None:
        if len(automaton.classes) != chain.vocabulary:
            raise ConstraintError(
                "a constraint and a model have other vocabularies",
                found=f"{len(automaton.classes)} tokens in {automaton.name}",
                expected=f"{chain.vocabulary} of the model",
            )
        self.chain, self.automaton = chain, automaton
        device = chain.start.device
        self.classes = torch.from_numpy(automaton.classes).to(device)
        self.table = torch.from_numpy(automaton.table).to(device)
        num_classes = self.table.shape[1]
        self._members = [(self.classes == c).nonzero()[:, 0] for c in range(num_classes)]
        # (L, K): p(a token of the class | state).
        self._mass = torch.stack([chain.emission[tokens].sum(0) for tokens in self._members])
        accepting = torch.from_numpy(automaton.accepting).to(device)
        met = accepting[:, None].to(chain.start).expand(-1, chain.num_states)
        self._met = [met.contiguous()]
        self._behind: list[Tensor] = []
        self._fewest = automaton.fewest_tokens()

    def met(self, remaining: int) -> Tensor:
        """W_n (Q, K): p(the constraint is met in `remaining` tokens | states of both)."""
        while len(self._met) <= remaining:
            behind = self.behind(len(self._met) - 1)
            # (Q, L, K): what each class of tokens leads to.
            self._met.append((behind[self.table] * self._mass).sum(1))
        return self._met[remaining]

    def behind(self, remaining: int) -> Tensor:
        """(Q, K): as `met`, given the state of the token *before* the remaining ones."""
        while len(self._behind) <= remaining:
            self._behind.append(self.chain.transition.back(self.met(len(self._behind))))
        return self._behind[remaining]

    def log_prob(self, states: Tensor, at: Tensor, remaining: int) -> Tensor:
        """(B,) nats of p(constraint is met | prefix), -inf where it cannot be.

        Args:
            states: (B, K) p(state of the next token | prefix), see `Chain.read`.
            at: (B,) state of the automaton after the prefix, see `Automaton.run`.
            remaining: tokens that are still to come.
        """
        return (states * self.met(remaining)[at]).sum(-1).log()

    def joint(self, states: Tensor, at: Tensor, remaining: int) -> Tensor:
        """(B, C) p(next token, constraint is met | prefix); its sum is `log_prob`'s.

        Args:
            states, at, remaining: see `log_prob`; the next token is one of the remaining.

        Raises:
            ConstraintError: no token is left.
        """
        if remaining < 1:
            raise ConstraintError("no token is left to choose", found=f"{remaining} remaining")
        behind = self.behind(remaining - 1)
        found = states.new_zeros(len(states), self.chain.vocabulary)
        for number, tokens in enumerate(self._members):
            weights = states * behind[self.table[at, number]]
            found[:, tokens] = weights @ self.chain.emission[tokens].T
        return found

    def next_token(self, states: Tensor, at: Tensor, remaining: int) -> Tensor:
        """(B, C) p(next token | prefix, constraint is met).

        Raises:
            ConstraintError: the constraint has probability 0.
        """
        joint = self.joint(states, at, remaining)
        total = joint.sum(-1, keepdim=True)
        self.require(total[:, 0] > 0, at, remaining)
        return joint / total

    def log_ratio(self, states: Tensor, at: Tensor, remaining: int) -> Tensor:
        """(B, C) log p(constraint is met | prefix, token): what a language model's logits are
        raised by; -inf for tokens after which it cannot be."""
        joint = self.joint(states, at, remaining)
        alone = states @ self.chain.emission.T
        # Tokens that the chain itself thinks impossible say nothing about the constraint.
        return torch.where(joint > 0, joint.log() - alone.log(), -torch.inf)

    def advance(self, states: Tensor, at: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """States of both after one token (B,) of each text."""
        return self.chain.step(states, tokens)[1], self.table[at, self.classes[tokens]]

    def require(self, possible: Tensor, at: Tensor, remaining: int) -> None:
        """Say which text's constraint cannot be met.

        Raises:
            ConstraintError: naming the constraint and the tokens it would take.
        """
        if bool(possible.all()):
            return
        row = int((~possible).nonzero()[0])
        fewest = self._fewest[int(at[row])]
        needs = "can never be met" if fewest == UNREACHABLE else f"takes at least {fewest} tokens"
        raise ConstraintError(
            "a constraint cannot be met: its probability is exactly 0",
            where=f"{self.automaton.name}, text {row}",
            found=f"{remaining} tokens left",
            expected=f"it {needs}",
            fix="allow more tokens, or ask for less",
        )

    def begin(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Read prefixes (B, T) without missing tokens: nats, states of the chain, of the automaton.

        Raises:
            EvidenceError: a value that is no token.
        """
        reading = self.chain.read(x)
        at = [self.automaton.run(row) for row in np.asarray(x.cpu())]
        return reading.log_prob, reading.states, torch.tensor(at, device=self.table.device)

    @torch.no_grad()
    def sample(self, num: int, length: int, seed: int = 0) -> Tensor:
        """(num, length) texts drawn from the model given that they meet the constraint; exact.

        Raises:
            ConstraintError: it cannot be met in `length` tokens.
        """
        generator = torch.Generator(self.table.device).manual_seed(seed)
        states, at = self.chain.starts(num), self.table.new_zeros(num)
        drawn = []
        for remaining in range(length, 0, -1):
            weights = self.next_token(states, at, remaining)
            drawn.append(torch.multinomial(weights, 1, generator=generator)[:, 0])
            states, at = self.advance(states, at, drawn[-1])
        return torch.stack(drawn, 1)
