"""Hidden Markov models: a chain of latents, one a variable, rooted at the first."""

from __future__ import annotations

from distpc.structures.hclt import hclt_graph
from distpc.structures.layers import check_size
from distpc.structures.region_graph import RegionGraph
from distpc.structures.tree import Tree


def hmm(
    length: int,
    num_states: int,
    *,
    tied: bool = True,
    layer: str = "cp",
    blocks: int | None = None,
    family: str | None = None,
) -> RegionGraph:
    """The region graph of a hidden Markov model.

    Latent t carries the state of step t; the root unit mixes the states of step 0.

    Args:
        length: V, steps and variables.
        num_states: K.
        tied: whether all steps share one transition matrix and one emission (homogeneous), or
            have their own.
        layer: of the transition: cp for a dense matrix, or monarch.
        blocks: of a Monarch transition, a divisor of K; default: the nearest to sqrt(K).
        family: of the inputs.

    Raises:
        StructureError: naming the argument that does not fit.
    """
    length = check_size("length", length)
    chain = Tree(tuple(range(-1, length - 1)))
    return hclt_graph(chain, num_states, layer=layer, tied=tied, blocks=blocks, family=family)
