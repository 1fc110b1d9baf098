"""Collects regions and hands out their indices."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from distpc.structures.region_graph import Region, RegionGraph
from distpc.structures.tree import Tree


class GraphBuilder:
    """A growing list of regions; every method appends one and returns its index."""

    def __init__(self) -> None:
        self.regions: list[Region] = []

    def input(
        self, num_units: int, variable: int, tie: str | None = None, family: str | None = None
    ) -> int:
        """Distributions of one variable."""
        return self._add(Region("input", num_units, variable=variable, tie=tie, family=family))

    def product(self, children: Sequence[int], latent: int | None = None) -> int:
        """Unit-wise product of regions with equally many units."""
        units = self.regions[children[0]].num_units
        return self._add(Region("product", units, tuple(children), latent=latent))

    def sum(self, num_units: int, child: int, tie: str | None = None) -> int:
        """Mixtures of all units of one region."""
        return self._add(Region("sum", num_units, (child,), tie=tie))

    def kronecker(self, left: int, right: int) -> int:
        """All products of a unit of `left` and a unit of `right`."""
        units = self.regions[left].num_units * self.regions[right].num_units
        return self._add(Region("kronecker", units, (left, right)))

    def tucker(self, num_units: int, left: int, right: int, tie: str | None = None) -> int:
        """Mixtures of all products of a unit of `left` and a unit of `right`."""
        return self.sum(num_units, self.kronecker(left, right), tie)

    def monarch(self, num_units: int, child: int, blocks: int, tie: str | None = None) -> int:
        """A sum whose matrix is a product of two block-diagonal ones ("Monarch").

        With K child units, K' units and `blocks` = k blocks, the first factor mixes within k
        blocks of K / k consecutive units, the second across them: K * K' / k + k * K' weights
        instead of K * K' (2 K^1.5 for K' = K and k = sqrt(K)).

        Args:
            num_units: K', a multiple of K / blocks.
            child: the region that is mixed; its units are a multiple of `blocks`.
            blocks: k.
            tie: name of shared parameters.
        """
        units = self.regions[child].num_units
        per_block = units // blocks
        ties = (None, None) if tie is None else (f"{tie}/within", f"{tie}/across")
        within = self._add(Region("sum", units, (child,), tie=ties[0], blocks=blocks))
        return self._add(
            Region("sum", num_units, (within,), tie=ties[1], blocks=per_block, strided=True)
        )

    def mixing(self, children: Sequence[int], tie: str | None = None) -> int:
        """Unit k mixes unit k of every child; the children have one scope and equal units."""
        units = self.regions[children[0]].num_units
        both = self.concat(children)
        return self._add(Region("sum", units, (both,), tie=tie, blocks=units, strided=True))

    def concat(self, children: Sequence[int]) -> int:
        """The units of several regions side by side."""
        units = sum(self.regions[child].num_units for child in children)
        return self._add(Region("concat", units, tuple(children)))

    def hidden_tree(
        self,
        tree: Tree,
        emissions: Sequence[int],
        *,
        first_latent: int | None = 0,
        transition_ties: Sequence[str] | None = None,
        mix: Callable[[int, int, str | None], int] | None = None,
    ) -> int:
        """A hidden tree: every node's state emits, and chooses its children's states.

        Args:
            tree: over the latents.
            emissions: for each node the region whose unit k is its emission in state k.
            first_latent: node v's region carries latent `first_latent` + v; None: no latents.
            transition_ties: for each node the tie of the sum on the edge to its parent.
            mix: makes the region of that edge from (units, child, tie); default: a dense sum.

        Returns:
            the root node's region (K units, not mixed yet).
        """
        mix = self.sum if mix is None else mix
        states: dict[int, int] = {}
        for node in reversed(tree.top_down):
            units = self.regions[emissions[node]].num_units
            factors = [emissions[node]]
            for child in tree.children[node]:
                tie = None if transition_ties is None else transition_ties[child]
                factors.append(mix(units, states[child], tie))
            latent = None if first_latent is None else first_latent + node
            if latent is not None or len(factors) > 1:
                states[node] = self.product(factors, latent)
            else:
                states[node] = emissions[node]
        return states[tree.root]

    def finish(self, top: int, num_variables: int) -> RegionGraph:
        """Mix the units of region `top` under one root unit and check the graph."""
        self.sum(1, top)
        return RegionGraph(self.regions, num_variables)

    def _add(self, region: Region) -> int:
        self.regions.append(region)
        return len(self.regions) - 1
