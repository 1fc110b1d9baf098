"""A tied hidden Markov model read out of its circuit: exact queries over texts of any length.

Messages are normalised at every step, with their logs kept aside. In float64, the default, nothing
a text can do underflows that a sum would have kept.
Legend: B batch, T tokens of a text, K states, C tokens of the vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from distpc.circuits.blocks import Blocks
from distpc.circuits.circuit import Circuit
from distpc.data.spec import MISSING
from distpc.errors import EvidenceError, StructureError
from distpc.structures.chain_layout import ChainLayout


@dataclass(frozen=True)
class Transition:
    """p(next state | state) as one dense matrix, or as two block-diagonal ones (Monarch).

    Attributes:
        factors: weights (1, K', fan-in) and their blocks, in the order in which messages pass from
            the next state to the state.
    """

    factors: tuple[tuple[Tensor, Blocks], ...]

    def back(self, values: Tensor) -> Tensor:
        """sum_j p(j | i) values[..., j], (..., K) -> (..., K)."""
        flat = values.reshape(1, -1, values.shape[-1])
        for theta, blocks in self.factors:
            grouped = torch.bmm(blocks.split_units(flat, 1), blocks.split_rows(theta).mT)
            flat = blocks.join_units(grouped, (1, flat.shape[1], theta.shape[1]))
        return flat.view(*values.shape[:-1], -1)

    def forth(self, states: Tensor) -> Tensor:
        """sum_i states[..., i] p(j | i), (..., K) -> (..., K)."""
        flat = states.reshape(1, -1, states.shape[-1])
        for theta, blocks in reversed(self.factors):
            units = theta.shape[2] * blocks.count
            grouped = torch.bmm(blocks.split_units(flat, 1), blocks.split_rows(theta))
            flat = blocks.join_units(grouped, (1, flat.shape[1], units))
        return flat.view(*states.shape[:-1], -1)


@dataclass(frozen=True)
class Reading:
    """What a text says.

    Attributes:
        log_prob: (B,) float64 nats of the texts.
        states: (B, K) p(state of the token after them | text); of an impossible text: zeros.
    """

    log_prob: Tensor
    states: Tensor


@dataclass(frozen=True)
class Chain:
    """A tied hidden Markov model.

    Attributes:
        start: (K,) p(state of the first token).
        transition: p(next state | state).
        emission: (C, K) p(token | state); a column sums to one.
    """

    start: Tensor
    transition: Transition
    emission: Tensor

    @classmethod
    def of(cls, circuit: Circuit, dtype: torch.dtype = torch.float64) -> Chain:
        """The chain of a circuit, its tensors on the circuit's device.

        Raises:
            StructureError: the circuit is no hidden Markov model with tied steps.
        """
        layout = ChainLayout.of(circuit.graph)
        if not layout.is_tied or not layout.transitions:
            raise StructureError(
                "texts of any length need one transition for all steps",
                where="structure.tied",
                found="a hidden Markov model whose steps have their own parameters",
                fix="train one with structure.tied=true",
            )
        factors = []
        for region in layout.transitions[0]:
            shape = circuit.graph.regions[region]
            weights = circuit.weights_of(region, dtype)[None]
            factors.append((weights, Blocks(shape.blocks, shape.strided)))
        start = circuit.weights_of(layout.start, dtype)[0]
        emission = circuit.weights_of(layout.emissions[0], dtype).T.contiguous()
        return cls(start, Transition(tuple(factors)), emission)

    @property
    def num_states(self) -> int:
        """K."""
        return len(self.start)

    @property
    def vocabulary(self) -> int:
        """C."""
        return len(self.emission)

    def tokens(self, x: Tensor) -> Tensor:
        """x (B, T) as int64 on the chain's device.

        Raises:
            EvidenceError: another shape or type, or a value that is no token.
        """
        if x.dim() != 2 or x.is_floating_point():
            raise EvidenceError(
                "texts are given as a table of tokens",
                found=f"{x.dtype} of shape {tuple(x.shape)}",
                expected="integers of shape (texts, tokens), -1 where missing",
            )
        x = x.to(self.start.device, torch.int64)
        wrong = ((x < MISSING) | (x >= self.vocabulary)).nonzero()
        if len(wrong):
            row, column = wrong[0].tolist()
            raise EvidenceError(
                "a token is outside the vocabulary",
                where=f"text {row}, token {column}",
                found=int(x[row, column]),
                expected=f"0 .. {self.vocabulary - 1}, or -1 where missing",
            )
        return x

    def emitted(self, tokens: Tensor) -> Tensor:
        """(..., K) p(token | state) of tokens (...); 1 where missing."""
        rows = self.emission[tokens.clamp_min(0)]
        return torch.where((tokens < 0)[..., None], 1.0, rows)

    def starts(self, batch: int) -> Tensor:
        """(B, K) states of first tokens."""
        return self.start.expand(batch, -1)

    def step(self, states: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Take in one token of each text.

        Args:
            states: (B, K) p(its state | what came before).
            tokens: (B,), -1 where missing.

        Returns:
            (B,) its probability, and (B, K) p(state of the token after it | all).
        """
        seen = states * self.emitted(tokens)
        total = seen.sum(-1)
        seen = seen / torch.where(total > 0, total, 1.0)[:, None]
        return total, self.transition.forth(seen)

    def read(self, x: Tensor, states: Tensor | None = None) -> Reading:
        """Likelihoods of texts; a text may go on where another reading stopped.

        Args:
            x: (B, T) tokens, -1 where missing.
            states: (B, K) of an earlier reading; default: of the beginning.
        """
        x = self.tokens(x)
        states = self.starts(len(x)) if states is None else states
        log_prob = torch.zeros(len(x), dtype=torch.float64, device=x.device)
        for tokens in x.unbind(1):
            total, states = self.step(states, tokens)
            log_prob += total.double().log()
        return Reading(log_prob, states)

    def posterior(self, x: Tensor) -> Tensor:
        """p(state of token t | whole text), (B, T, K); zeros for an impossible text."""
        x = self.tokens(x)
        before, states = [], self.starts(len(x))
        for tokens in x.unbind(1):
            before.append(states)
            _, states = self.step(states, tokens)
        found = torch.empty(*x.shape, self.num_states, dtype=states.dtype, device=x.device)
        message = torch.ones_like(states)
        for t in range(x.shape[1] - 1, -1, -1):
            message = message * self.emitted(x[:, t])
            found[:, t] = _normalised(before[t] * message)
            message = self.transition.back(_normalised(message))
        return found

    def infill(self, x: Tensor, num: int = 1, seed: int = 0) -> Tensor:
        """Draw what is missing of texts (B, T) from both sides at once: (B, num, T), exact.

        Raises:
            EvidenceError: a text that is impossible has no completion.
        """
        x = self.tokens(x)
        message = torch.ones(len(x), self.num_states, dtype=self.start.dtype, device=x.device)
        behind = []
        for t in range(x.shape[1] - 1, -1, -1):
            behind.append(_normalised(message * self.emitted(x[:, t])))
            message = self.transition.back(behind[-1])
        generator = torch.Generator(x.device).manual_seed(seed)
        x = x.repeat_interleave(num, 0)
        states = self.starts(len(x))
        drawn = []
        for t, message in enumerate(reversed(behind)):
            weights = states * message.repeat_interleave(num, 0)
            impossible = (weights.sum(-1) <= 0).nonzero()
            if len(impossible):
                raise EvidenceError(
                    "an impossible text has no completions",
                    where=f"text {int(impossible[0]) // num}",
                )
            state = torch.multinomial(weights, 1, generator=generator)[:, 0]
            token = torch.multinomial(self.emission.T[state], 1, generator=generator)[:, 0]
            drawn.append(torch.where(x[:, t] < 0, token, x[:, t]))
            hit = torch.nn.functional.one_hot(state, self.num_states).to(states)
            states = self.transition.forth(hit)
        return torch.stack(drawn, 1).view(-1, num, x.shape[1])


def _normalised(values: Tensor) -> Tensor:
    total = values.sum(-1, keepdim=True)
    return values / torch.where(total > 0, total, 1.0)
