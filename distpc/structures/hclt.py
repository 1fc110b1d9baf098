"""Hidden Chow-Liu trees (HCLT): a latent of K states a variable, linked like the variables.

Liu and Van den Broeck, "Tractable regularization of probabilistic circuits", NeurIPS 2021.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from distpc.errors import DataError
from distpc.structures.builder import GraphBuilder
from distpc.structures.chow_liu import chow_liu_tree
from distpc.structures.discretize import MISSING, discretize
from distpc.structures.layers import check_layer, check_size, mix
from distpc.structures.region_graph import RegionGraph
from distpc.structures.tree import Tree


def hclt_graph(
    tree: Tree,
    num_states: int,
    *,
    layer: str = "cp",
    tied: bool = False,
    blocks: int | None = None,
    family: str | None = None,
) -> RegionGraph:
    """The region graph of an HCLT.

    Variable v has an input region, and a product region with latent v over it and over one sum
    (transition matrix) for each child in the tree; the root mixes the root latent's states.

    Args:
        tree: over the V variables.
        num_states: K, states of every latent.
        layer: of the transitions: cp for dense matrices, or monarch.
        tied: whether all variables share one emission, and all edges one transition matrix.
        blocks: of Monarch transitions, a divisor of K; default: the nearest to sqrt(K).
        family: of the inputs.

    Raises:
        StructureError: naming the argument that does not fit.
    """
    num_states = check_size("num_states", num_states)
    check_layer(layer, ("cp", "monarch"))
    builder = GraphBuilder()
    tie = "emission" if tied else None
    emissions = [builder.input(num_states, v, tie, family) for v in range(tree.num_nodes)]
    top = builder.hidden_tree(
        tree,
        emissions,
        transition_ties=["transition"] * tree.num_nodes if tied else None,
        mix=lambda units, child, name: mix(builder, layer, units, child, name, blocks),
    )
    return builder.finish(top, tree.num_nodes)


def hclt(
    data: np.ndarray,
    num_states: int,
    *,
    num_categories: Sequence[int | None] | None = None,
    num_bins: int = 16,
    max_samples: int = 20000,
    pseudocount: float = 0.1,
    seed: int = 0,
) -> RegionGraph:
    """An HCLT whose tree is the Chow-Liu tree of `data`.

    Args:
        data: (N, V) integers with -1 = missing, or floats with NaN = missing.
        num_states: K, states of every latent.
        num_categories: (V,) categories of each variable, None for real ones; default: one more
            than the largest value of integer data, all real for floats.
        num_bins: bins that variables with more values are put into when pairs are counted.
        max_samples: rows that are counted; a seeded choice where there are more.
        pseudocount: added to every cell of the pairwise tables.
        seed: of that choice.
    """
    data = np.asarray(data)
    if data.ndim != 2 or not data.size:
        raise DataError(
            "a structure is learnt from a table of samples",
            where="data",
            found=f"shape {data.shape}",
            expected="(samples, variables), at least one of each",
        )
    if num_categories is None:
        if np.issubdtype(data.dtype, np.floating):
            num_categories = [None] * data.shape[1]
        else:
            num_categories = (data.max(axis=0).clip(min=MISSING + 1) + 1).tolist()
    if len(data) > max_samples:
        chosen = np.random.default_rng(seed).choice(len(data), max_samples, replace=False)
        data = data[np.sort(chosen)]
    rows, num_values = discretize(data, num_categories, num_bins)
    return hclt_graph(chow_liu_tree(rows, num_values, pseudocount=pseudocount), num_states)
