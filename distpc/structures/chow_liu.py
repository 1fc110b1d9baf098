"""Chow-Liu trees: the maximum spanning tree of mutual information, and its distribution.

Chow and Liu, "Approximating discrete probability distributions with dependence trees", 1968.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from distpc.structures.mutual_information import mutual_information, pair_tables
from distpc.structures.tree import Tree


def maximum_spanning_tree(weights: np.ndarray) -> Tree:
    """The spanning tree of greatest total weight, rooted at its centre.

    Prim's algorithm on the dense matrix; equal weights go to the lowest node, so that the same
    matrix always gives the same tree.

    Args:
        weights: (V, V) symmetric and finite.
    """
    num_nodes = len(weights)
    if weights.shape != (num_nodes, num_nodes) or not np.isfinite(weights).all():
        raise ValueError("weights must be a finite square matrix")
    best = weights[0].astype(np.float64)
    best[0] = -np.inf
    nearest = np.zeros(num_nodes, dtype=np.int64)
    outside = np.ones(num_nodes, dtype=bool)
    outside[0] = False
    edges = []
    for _ in range(num_nodes - 1):
        node = int(best.argmax())
        edges.append((int(nearest[node]), node))
        outside[node] = False
        best[node] = -np.inf
        closer = outside & (weights[node] > best)
        best[closer] = weights[node][closer]
        nearest[closer] = node
    return Tree.from_edges(num_nodes, edges)


def chow_liu_tree(
    rows: np.ndarray, num_values: Sequence[int] | np.ndarray, *, pseudocount: float = 0.1
) -> Tree:
    """The Chow-Liu tree of discrete data.

    Args:
        rows: (N, V) integers, -1 = missing.
        num_values: (V,) number of values of each column.
        pseudocount: added to every cell of the pairwise tables.
    """
    return maximum_spanning_tree(mutual_information(rows, num_values, pseudocount=pseudocount))


@dataclass(frozen=True)
class ChowLiuModel:
    """A tree-shaped distribution of discrete variables: the plainest exact baseline.

    Attributes:
        tree: which variable depends on which.
        root_log_prob: (C_root,) log-probabilities of the root.
        conditional_log_probs: for every variable (C_parent, C) log-probabilities given its
            parent's value; for the root an empty array.
    """

    tree: Tree
    root_log_prob: np.ndarray
    conditional_log_probs: tuple[np.ndarray, ...]

    @classmethod
    def fit(
        cls, rows: np.ndarray, num_values: Sequence[int] | np.ndarray, *, pseudocount: float = 1.0
    ) -> ChowLiuModel:
        """Tree and tables from complete data, `pseudocount` in every cell of a pair's table.

        Args:
            rows: (N, V) integers without missing values, N >= 1.
            num_values: (V,) number of values of each column.
        """
        sizes = np.asarray(num_values, dtype=np.int64)
        tree = chow_liu_tree(rows, sizes, pseudocount=pseudocount)
        columns = np.ascontiguousarray(rows.T)
        conditionals = [np.empty((0, int(size))) for size in sizes]
        for parent, child in tree.edges().tolist():
            pair = slice(parent, parent + 1), slice(child, child + 1)
            table = pair_tables(columns, sizes, *pair) + pseudocount
            conditionals[child] = np.log(table / table.sum(axis=1, keepdims=True))
        size = int(sizes[tree.root])
        root = np.bincount(rows[:, tree.root], minlength=size) + pseudocount * size
        return cls(tree, np.log(root / root.sum()), tuple(conditionals))

    def log_prob(self, rows: np.ndarray) -> np.ndarray:
        """(N,) log-likelihoods in nats of complete rows (N, V)."""
        total = self.root_log_prob[rows[:, self.tree.root]].copy()
        for parent, child in self.tree.edges().tolist():
            total += self.conditional_log_probs[child][rows[:, parent], rows[:, child]]
        return total
