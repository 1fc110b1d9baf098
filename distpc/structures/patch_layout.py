"""Which regions of a patch circuit are what, read back from its region graph."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from distpc.errors import StructureError
from distpc.structures.patches import HcltLeaf, group_ranges
from distpc.structures.region_graph import Region, RegionGraph
from distpc.structures.tree import Tree


@dataclass(frozen=True)
class PatchLayout:
    """The parts of a patch circuit's graph.

    Attributes:
        tree: over the Z patch latents.
        num_clusters: K, values of a patch latent.
        root: region that mixes the root latent's values, (1, K) statistics.
        transitions: for every patch the sum region on the edge from its parent, (K, K) statistics
            with the parent's value first; -1 for the root patch.
        emissions: for every patch the region whose unit k is p(patch | latent = k).
        variables: (Z, D) the variables of every patch.
        leaf: the shape of hidden Chow-Liu leaves; None for product leaves.
        tied: one region (the first) for every tie.
    """

    tree: Tree
    num_clusters: int
    root: int
    transitions: tuple[int, ...]
    emissions: tuple[int, ...]
    variables: np.ndarray
    leaf: HcltLeaf | None
    tied: dict[str, int]

    @property
    def num_patches(self) -> int:
        """Z."""
        return self.tree.num_nodes

    @property
    def variables_per_patch(self) -> int:
        """D."""
        return int(self.variables.shape[1])

    @cached_property
    def groups(self) -> list[range]:
        """Clusters of each group that shares a leaf body; one group a cluster has none."""
        return group_ranges(self.num_clusters, self.leaf.num_groups if self.leaf else 1)

    @classmethod
    def of(cls, graph: RegionGraph) -> PatchLayout:
        """The layout of a graph that `patch_graph` made.

        Raises:
            StructureError: the graph is of another kind.
        """
        regions = graph.regions
        owners = {
            region.latent: index
            for index, region in enumerate(regions)
            if region.latent is not None and not _is_inside(regions, region)
        }
        tied: dict[str, int] = {}
        for index, region in enumerate(regions):
            if region.tie is not None:
                tied.setdefault(region.tie, index)
        is_bank = any(tie.startswith("leaf/") for tie in tied)
        if not is_bank or sorted(owners) != list(range(len(owners))):
            raise StructureError(
                "a region graph is not a patch circuit",
                found=f"{len(owners)} latents, {len(tied)} ties",
                expected="a latent a patch over a leaf bank that all patches share",
            )
        parents, transitions = [-1] * len(owners), [-1] * len(owners)
        for patch, index in owners.items():
            for child in regions[index].children[1:]:
                below = regions[regions[child].children[0]].latent
                assert below is not None
                parents[below], transitions[below] = patch, child
        emissions = [regions[owners[patch]].children[0] for patch in range(len(owners))]
        variables = [_patch_variables(regions, emission) for emission in emissions]
        return cls(
            tree=Tree(tuple(parents)),
            num_clusters=regions[owners[0]].num_units,
            root=graph.root,
            transitions=tuple(transitions),
            emissions=tuple(emissions),
            variables=np.array(variables, dtype=np.int64),
            leaf=_leaf_shape(regions, emissions[0], variables[0]),
            tied=tied,
        )


def _patch_variables(regions: tuple[Region, ...], emission: int) -> list[int]:
    """The variables below a patch's emission in the order in which the patch has them: its leaves
    (those of the first group) lie in it."""
    found = [regions[index].variable for index in _below(regions, emission)]
    return list(dict.fromkeys(variable for variable in found if variable is not None))


def _is_inside(regions: tuple[Region, ...], region: Region) -> bool:
    """Whether a latent's region is one inside of a leaf: those have a variable of their own."""
    return any(regions[child].kind == "input" for child in region.children)


def _below(regions: tuple[Region, ...], top: int) -> list[int]:
    """Indices of `top` and everything below it, ascending."""
    found = {top}
    for index in range(top, -1, -1):
        if index in found:
            found.update(regions[index].children)
    return sorted(found)


def _number(region: Region) -> int:
    """The number at the end of a tie such as leaf/0/transition/3."""
    return int((region.tie or "").rsplit("/", 1)[1])


def _leaf_shape(
    regions: tuple[Region, ...], emission: int, variables: list[int]
) -> HcltLeaf | None:
    """Shape of the leaves, from the first patch's emission and its variables."""
    below = [(i, regions[i]) for i in _below(regions, emission)]
    if not any(region.kind == "sum" for _, region in below):
        return None
    num_groups = sum((region.tie or "").endswith("/heads") for _, region in below)
    body = [(i, r) for i, r in below if (r.tie or "leaf/0/").startswith("leaf/0/")]
    inputs = {i: r for i, r in body if r.kind == "input"}
    parents = [-1] * len(inputs)
    for _, region in body:
        own = [child for child in region.children if child in inputs]
        if region.kind == "product" and own:
            for child in region.children:
                if regions[child].kind == "sum":
                    # Of inputs, which have one.
                    variable = inputs[own[0]].variable or 0
                    parents[_number(regions[child])] = variables.index(variable)
    tables = tuple(_number(region) for _, region in sorted(inputs.items()))
    return HcltLeaf(
        Tree(tuple(parents)),
        next(iter(inputs.values())).num_units,
        num_groups,
        has_latents=any(region.latent is not None for _, region in body),
        emissions=None if tables == tuple(range(len(tables))) else tables,
    )
