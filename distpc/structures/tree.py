"""Rooted trees over variables, patches or latents: what hidden tree circuits are built from."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from distpc.errors import StructureError


@dataclass(frozen=True)
class Tree:
    """A rooted tree over nodes 0 .. n - 1.

    Attributes:
        parents: parent of every node; -1 for the root.
    """

    parents: tuple[int, ...]

    def __post_init__(self) -> None:
        if sum(parent == -1 for parent in self.parents) != 1:
            raise self._broken("a tree has exactly one root (parent -1)")
        if any(not -1 <= parent < len(self.parents) for parent in self.parents):
            raise self._broken(f"parents are -1 .. {len(self.parents) - 1}")
        if len(self.top_down) != len(self.parents):
            raise self._broken("every node hangs below the root (no cycles)")

    @property
    def num_nodes(self) -> int:
        """Number of nodes."""
        return len(self.parents)

    @cached_property
    def root(self) -> int:
        """The node without a parent."""
        return self.parents.index(-1)

    @cached_property
    def children(self) -> tuple[tuple[int, ...], ...]:
        """Children of every node, ascending."""
        below: list[list[int]] = [[] for _ in self.parents]
        for node, parent in enumerate(self.parents):
            if parent >= 0:
                below[parent].append(node)
        return tuple(map(tuple, below))

    @cached_property
    def top_down(self) -> tuple[int, ...]:
        """All nodes, parents before children, level by level; reversed: children first."""
        order = [self.root]
        for node in order:
            order.extend(self.children[node])
        return tuple(order)

    @cached_property
    def depth(self) -> int:
        """Edges on the longest way from the root to a leaf."""
        depths = [0] * self.num_nodes
        for node in self.top_down[1:]:
            depths[node] = depths[self.parents[node]] + 1
        return max(depths)

    @classmethod
    def from_edges(cls, num_nodes: int, edges: Iterable[tuple[int, int]]) -> Tree:
        """Root an undirected tree at its centre, where the depth is least (depth is latency).

        Raises:
            StructureError: the edges are no tree over the nodes.
        """
        neighbours: list[list[int]] = [[] for _ in range(num_nodes)]
        count = 0
        for one, other in edges:
            neighbours[one].append(other)
            neighbours[other].append(one)
            count += 1
        if count != num_nodes - 1:
            raise StructureError(
                "edges do not make a tree", found=f"{count} edges", expected=num_nodes - 1
            )
        # The middle of a longest path: the node farthest from any node is one end of it.
        end = _walk(neighbours, 0)[0][-1]
        order, parents = _walk(neighbours, end)
        path = [order[-1]]
        while parents[path[-1]] >= 0:
            path.append(parents[path[-1]])
        middle = {path[len(path) // 2], path[(len(path) - 1) // 2]}
        return cls(tuple(_walk(neighbours, min(middle))[1]))

    @classmethod
    def balanced(cls, num_nodes: int) -> Tree:
        """The complete binary tree in heap order: a stand-in where no data exist yet."""
        return cls(tuple((node + 1) // 2 - 1 for node in range(num_nodes)))

    def edges(self) -> np.ndarray:
        """(n - 1, 2) pairs (parent, child) in top-down order."""
        pairs = [(self.parents[node], node) for node in self.top_down[1:]]
        return np.array(pairs, dtype=np.int64).reshape(-1, 2)

    def _broken(self, rule: str) -> StructureError:
        return StructureError("parents are no tree", found=self.parents, expected=rule)


def _walk(neighbours: list[list[int]], start: int) -> tuple[list[int], list[int]]:
    """Breadth-first order from `start`, and every node's parent on the way."""
    parents = [-1] * len(neighbours)
    order = [start]
    for node in order:
        for other in sorted(neighbours[node]):
            if other != parents[node]:
                if len(order) == len(neighbours):
                    raise StructureError("edges do not make a tree", found="a cycle")
                parents[other] = node
                order.append(other)
    if len(order) != len(neighbours):
        raise StructureError("edges do not make a tree", found="several components")
    return order, parents
