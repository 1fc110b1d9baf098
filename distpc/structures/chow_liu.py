"""Chow-Liu trees: the maximum spanning tree of mutual information, and its distribution.

Chow and Liu, "Approximating discrete probability distributions with dependence trees", 1968.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from distpc.errors import DataError, StructureError
from distpc.structures.mutual_information import MAX_BYTES, Rows, count_pairs, mutual_information
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
        raise StructureError(
            "a spanning tree needs a finite weight for every pair",
            where="weights",
            found=f"shape {weights.shape}, {int((~np.isfinite(weights)).sum())} entries not finite",
            expected="a finite square matrix",
        )
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
    rows: Rows,
    num_values: Sequence[int] | np.ndarray,
    *,
    pseudocount: float = 0.1,
    max_bytes: int = MAX_BYTES,
) -> Tree:
    """The Chow-Liu tree of discrete data, rooted at its centre.

    Args:
        rows: (N, V) integers, -1 = missing; or batches of them that can be iterated again, such
            as shards (values of many levels through `discretize.Bins.stream`).
        num_values: (V,) number of values of each column.
        pseudocount: added to every cell of the pairwise tables.
        max_bytes: of count tables in memory.

    Raises:
        DataError: rows or values that do not fit, see `mutual_information`.
    """
    return maximum_spanning_tree(
        mutual_information(rows, num_values, pseudocount=pseudocount, max_bytes=max_bytes)
    )


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
        cls,
        rows: Rows,
        num_values: Sequence[int] | np.ndarray,
        *,
        pseudocount: float = 1.0,
        max_bytes: int = MAX_BYTES,
    ) -> ChowLiuModel:
        """Tree and tables by counting, `pseudocount` in every cell of a pair's table.

        The root's distribution gets as much as a pair with a variable of as many values leaves
        it: with pseudocount 1, P(a, b) = (count + 1) / (N + 4) and P(a) = (count + 2) / (N + 4)
        for binary variables.

        Args:
            rows: (N, V) integers, N >= 1; or batches that can be iterated again. A sample that
                misses a value does not count for the tables of that variable.
            num_values: (V,) number of values of each column.
            pseudocount: added to every cell.
            max_bytes: of count tables in memory.

        Raises:
            DataError: rows or values that do not fit, or no rows.
        """
        sizes = np.asarray(num_values, dtype=np.int64)
        tree = chow_liu_tree(rows, sizes, pseudocount=pseudocount, max_bytes=max_bytes)
        pairs = [(parent, child) for parent, child in tree.edges().tolist()]
        *tables, own = count_pairs(rows, sizes, [*pairs, (tree.root, tree.root)])
        if not own.any():
            raise DataError("a distribution is fitted to rows", where="rows", found="none")
        conditionals = [np.empty((0, int(size))) for size in sizes]
        for (_, child), counts in zip(pairs, tables, strict=True):
            conditionals[child] = _log_normalised(counts + pseudocount)
        root = _log_normalised(own.diagonal() + pseudocount * sizes[tree.root])
        return cls(tree, root, tuple(conditionals))

    def log_prob(self, rows: np.ndarray) -> np.ndarray:
        """(N,) log-likelihoods in nats of complete rows (N, V)."""
        total = self.root_log_prob[rows[:, self.tree.root]].copy()
        for parent, child in self.tree.edges().tolist():
            total += self.conditional_log_probs[child][rows[:, parent], rows[:, child]]
        return total


def _log_normalised(counts: np.ndarray) -> np.ndarray:
    """Logs of rows that sum to one; uniform where nothing was counted."""
    totals = counts.sum(axis=-1, keepdims=True)
    uniform = np.full_like(counts, 1.0 / counts.shape[-1], dtype=np.float64)
    with np.errstate(divide="ignore"):
        return np.log(np.divide(counts, totals, out=uniform, where=totals > 0))
