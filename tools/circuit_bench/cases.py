"""What is measured: structures, data, and the arithmetic that a training step cannot avoid."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from scipy.sparse import coo_array
from scipy.sparse.csgraph import minimum_spanning_tree
from torch import Tensor

from distpc.circuits.circuit import Circuit
from distpc.structures.builder import GraphBuilder
from distpc.structures.hclt import hclt_graph
from distpc.structures.region_graph import RegionGraph
from distpc.structures.tree import Tree

NUM_CATEGORIES = {"hclt": 256, "hmm": 10_000}
"""Values of a pixel; words of a vocabulary, where a case does not say how many."""


@dataclass(frozen=True)
class Case:
    """One row of the table.

    Attributes:
        structure: hclt (one variable a pixel) or hmm (tied; one variable a position).
        num_variables: V.
        num_states: K.
        batch: B.
        dtype: of the matrix products inside sums, float32 or bfloat16.
        vocabulary: words of an hmm.
    """

    structure: str
    num_variables: int
    num_states: int
    batch: int = 256
    dtype: str = "float32"
    vocabulary: int = NUM_CATEGORIES["hmm"]

    @classmethod
    def parse(
        cls,
        text: str,
        batch: int | None = None,
        dtype: str | None = None,
        vocabulary: int | None = None,
    ) -> Case:
        """From STRUCTURE:VARIABLES:STATES[:BATCH[:DTYPE]]; the rest for what that leaves open."""
        structure, *numbers = text.split(":")
        if numbers and not numbers[-1].isdigit():
            dtype = numbers.pop()
        if structure not in NUM_CATEGORIES or not 2 <= len(numbers) <= 3:
            raise ValueError(f"'{text}' is no case: STRUCTURE:VARIABLES:STATES[:BATCH[:DTYPE]]")
        variables, states, *named = map(int, numbers)
        size = named[0] if named else batch or 256
        words = vocabulary or NUM_CATEGORIES["hmm"]
        return cls(structure, variables, states, size, dtype or "float32", words)

    def __str__(self) -> str:
        numbers = (self.num_variables, self.num_states, self.batch)
        return ":".join(map(str, (self.structure, *numbers, self.dtype)))

    @property
    def num_categories(self) -> int:
        """C of every variable."""
        return self.vocabulary if self.structure == "hmm" else NUM_CATEGORIES[self.structure]

    def graph(self) -> RegionGraph:
        """The structure."""
        if self.structure == "hclt":
            return hclt_graph(image_tree(self.num_variables), self.num_states)
        return hmm_graph(self.num_variables, self.num_states)

    def circuit(self, seed: int = 0, device: str = "cpu") -> Circuit:
        """Our circuit, with random parameters that are drawn on the device."""
        categories = [self.num_categories] * self.num_variables
        circuit = Circuit(self.graph(), categories, seed=seed, device=device)
        circuit.set_smoothing(0.1, 0.1, 50_000)
        return circuit

    def outline(self) -> Circuit:
        """Our circuit without its parameters: what compiling a peer looks at."""
        return outline(self.graph(), self.num_categories)

    def batches(self, count: int, device: str, seed: int = 1) -> list[Tensor]:
        """Random samples: what they are does not change the work."""
        generator = torch.Generator().manual_seed(seed)
        shape = (self.batch, self.num_variables)
        return [
            torch.randint(0, self.num_categories, shape, generator=generator).to(device)
            for _ in range(count)
        ]

    def gflop(self) -> float:
        """6 x batch x K x K for each dense block, and nothing else."""
        blocks = self.num_variables - 1
        return 6e-9 * self.batch * self.num_states**2 * blocks


def outline(graph: RegionGraph, num_categories: int) -> Circuit:
    """A circuit without its parameters."""
    return _Outline(graph, [num_categories] * graph.num_variables)


class _Outline(Circuit):
    """Parameters are reserved, which takes no memory, and never written."""

    def _init(self, seed: int, noise: float, device: torch.device) -> None:
        pass


def image_tree(num_variables: int, seed: int = 0) -> Tree:
    """A stand-in for an image's Chow-Liu tree: a random spanning tree of the grid of pixels.

    Rooted at its centre. Pixels next to each other share the most information, so that the
    Chow-Liu tree of images runs almost wholly along the grid; of three colours it runs between
    the colours of a pixel too.

    Args:
        num_variables: side x side (grey) or side x side x 3 (colour).
        seed: of the tree.
    """
    shapes = [(round((num_variables / colours) ** 0.5), colours) for colours in (1, 3)]
    fitting = [(side, side, c) for side, c in shapes if side * side * c == num_variables]
    if not fitting:
        raise ValueError(f"{num_variables} variables are no square image, grey or of three colours")
    index = np.arange(num_variables).reshape(fitting[0])
    pairs = [(index[:, :-1], index[:, 1:]), (index[:-1], index[1:])]
    pairs += [(index[..., :-1], index[..., 1:])] if fitting[0][2] > 1 else []
    ends = [np.concatenate([pair[end].ravel() for pair in pairs]) for end in (0, 1)]
    ends = [end.astype(np.int32) for end in ends]
    weights = np.random.default_rng(seed).uniform(1.0, 2.0, len(ends[0]))
    joined = coo_array((weights, tuple(ends)), [num_variables] * 2).tocsr()
    rows, columns = minimum_spanning_tree(joined).nonzero()
    return Tree.from_edges(num_variables, zip(rows.tolist(), columns.tolist(), strict=True))


def hmm_graph(length: int, num_states: int) -> RegionGraph:
    """A hidden Markov model with one transition matrix and one emission table."""
    builder = GraphBuilder()
    state = -1
    for t in reversed(range(length)):
        factors = [builder.input(num_states, t, "emission")]
        if t < length - 1:
            factors.append(builder.sum(num_states, state, "transition"))
        state = builder.product(factors, t)
    return builder.finish(state, length)
