"""Which regions of a hidden Markov model are what, read back from its region graph."""

from __future__ import annotations

from dataclasses import dataclass

from distpc.errors import StructureError
from distpc.structures.region_graph import RegionGraph


@dataclass(frozen=True)
class ChainLayout:
    """The parts of the graph of `hmm`.

    Attributes:
        num_states: K, values of every latent.
        start: region that mixes the states of step 0, (1, K) statistics.
        transitions: for each step but the last the sum regions between the state of the step and
            that of the next, in the order in which messages pass them (from the next step to this
            one): one dense matrix, or the two of a Monarch matrix.
        emissions: for each step the input region, unit k being p(token | state k).
        is_tied: whether all steps share both.
    """

    num_states: int
    start: int
    transitions: tuple[tuple[int, ...], ...]
    emissions: tuple[int, ...]
    is_tied: bool

    @property
    def length(self) -> int:
        """V, steps."""
        return len(self.emissions)

    @classmethod
    def of(cls, graph: RegionGraph) -> ChainLayout:
        """The layout of a graph that `hmm` made.

        Raises:
            StructureError: the graph is of another kind.
        """
        found = cls.find(graph)
        if found is None:
            raise StructureError(
                "a region graph is no hidden Markov model",
                found=f"{len(graph.regions)} regions, {graph.num_latents} latents",
                expected="a chain of latents, one a variable (structures.hmm)",
            )
        return found

    @classmethod
    def find(cls, graph: RegionGraph) -> ChainLayout | None:
        """The layout of a graph that `hmm` made; None for any other."""
        regions = graph.regions
        top = regions[graph.root]
        step: int | None = top.children[0] if top.kind == "sum" else None
        transitions: list[tuple[int, ...]] = []
        emissions: list[int] = []
        units = 0 if step is None else regions[step].num_units
        while step is not None:
            region, number = regions[step], len(emissions)
            children = region.children
            if region.kind != "product" or region.latent != number or region.num_units != units:
                return None
            emission = regions[children[0]]
            if emission.kind != "input" or emission.variable != number or len(children) > 2:
                return None
            emissions.append(children[0])
            if len(children) == 1:
                break
            between, step = [], children[1]
            while regions[step].kind == "sum":
                between.append(step)
                step = regions[step].children[0]
            if not between:
                return None
            transitions.append(tuple(reversed(between)))
        if len(emissions) != graph.num_variables:
            return None
        ties = {regions[index].tie for index in emissions}
        steps = {tuple(regions[index].tie for index in between) for between in transitions}
        is_tied = len(ties) == 1 and None not in ties and len(steps) <= 1
        is_tied = is_tied and not any(None in names for names in steps)
        return cls(units, graph.root, tuple(transitions), tuple(emissions), is_tied)
