"""A patch circuit put together of leaf circuits and of the part above them, weight by weight.

Legend: Z patches, K heads of all leaf circuits together.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from distpc.circuits.circuit import Circuit
from distpc.circuits.sums import SumBank
from distpc.structures.composed import composed_graph
from distpc.structures.tree import Tree


@torch.no_grad()
def compose(
    variables: np.ndarray,
    tree: Tree,
    leaves: Sequence[Circuit],
    top: Circuit,
    num_categories: Sequence[int | None],
    max_fold_bytes: int,
) -> Circuit:
    """The circuit over all patches: `top` chooses the heads of `leaves`.

    Weights are those of the parts, smoothing included; statistics are on the scale of flows.

    Args:
        variables: (Z, D) of every patch.
        tree: over the patches, the one that `top` was made with.
        leaves: leaf circuits, see `composed_graph`.
        top: a circuit of `top_graph`, with K values of a latent.
        num_categories: of all variables.
        max_fold_bytes: see `Circuit`.
    """
    parts = composed_graph(variables, tree, [leaf.graph for leaf in leaves])
    circuit = Circuit(parts.graph, num_categories, max_fold_bytes=max_fold_bytes)
    copied: set[str | None] = set()
    for region, (number, source) in parts.sources.items():
        tie = parts.graph.regions[region].tie
        if tie is not None and tie not in copied:
            copied.add(tie)
            _copy_weights_(circuit, region, leaves[number], source)
    _copy_weights_(circuit, circuit.graph.root, top, top.graph.root)
    for region, source in zip(
        transitions_of(circuit, tree), transitions_of(top, tree), strict=True
    ):
        if region >= 0:
            _copy_weights_(circuit, region, top, source)
    circuit.rescale_to_uses_()
    return circuit


def transitions_of(circuit: Circuit, tree: Tree) -> list[int]:
    """For every patch the sum on the edge from its parent in `tree`; -1 for the root patch.

    The circuit's latents are the patches.
    """
    found = [-1] * tree.num_nodes
    owners = {r.latent: r for r in circuit.graph.regions if r.latent is not None}
    for patch, children in enumerate(tree.children):
        for child, region in zip(children, owners[patch].children[1:], strict=True):
            found[child] = region
    return found


def _copy_weights_(circuit: Circuit, region: int, other: Circuit, source: int) -> None:
    bank, table = circuit.bank_of(region)
    bank_of_other, table_of_other = other.bank_of(source)
    bank.statistics_of(table).copy_(other.weights_of(source))
    mask = bank_of_other.mask if isinstance(bank_of_other, SumBank) else None
    if mask is not None:
        assert isinstance(bank, SumBank)
        if bank.mask is None:
            bank.mask = torch.ones_like(bank.statistics, dtype=torch.bool)
        bank.mask[table] = mask[table_of_other]
