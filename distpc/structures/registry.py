"""The structures that a run's config may name, and small ones of each.

A new structure is a module with its builder and a row here; the tests of truth
(tests/circuits/test_truth.py) then run on its small instances without being told.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from distpc.structures.chow_liu_circuit import chow_liu_circuit
from distpc.structures.factorised import factorised
from distpc.structures.hclt import hclt_graph
from distpc.structures.hmm import hmm
from distpc.structures.mixture import mixture
from distpc.structures.patches import HcltLeaf, patch_graph
from distpc.structures.poon_domingos import poon_domingos
from distpc.structures.quads import quad_graph, quad_tree
from distpc.structures.random_binary import random_binary
from distpc.structures.region_graph import RegionGraph
from distpc.structures.tree import Tree


@dataclass(frozen=True)
class Structure:
    """A way to make region graphs.

    Attributes:
        build: the builder.
        small: arguments of instances whose worlds can be enumerated, by a name.
        needs_image: whether variables are the pixels of an image.
    """

    build: Callable[..., RegionGraph]
    small: Mapping[str, Mapping[str, Any]]
    needs_image: bool = False


_TREE = Tree((1, -1, 1, 0))
_PATCHES = np.array([[0, 1], [3, 2]])


def _image(**more: Any) -> dict[str, Any]:
    return {"image_shape": (2, 2), "num_states": 2, **more}


def _random(**more: Any) -> dict[str, Any]:
    return {"num_variables": 4, "num_states": 2, "num_repetitions": 2, **more}


STRUCTURES: dict[str, Structure] = {
    "factorised": Structure(
        factorised,
        {"own": {"num_variables": 4}, "tied": {"num_variables": 4, "tied": True}},
    ),
    "chow_liu": Structure(
        chow_liu_circuit,
        {
            "mixed": {"tree": _TREE, "num_categories": [2, 3, 2, 2]},
            "one": {"tree": Tree((-1,)), "num_categories": [4]},
        },
    ),
    "hclt": Structure(
        hclt_graph,
        {
            "cp": {"tree": _TREE, "num_states": 3},
            "tied": {"tree": _TREE, "num_states": 3, "tied": True},
            "monarch": {"tree": _TREE, "num_states": 4, "layer": "monarch"},
        },
    ),
    "hmm": Structure(
        hmm,
        {
            "tied": {"length": 4, "num_states": 3},
            "own": {"length": 4, "num_states": 3, "tied": False},
            "monarch": {"length": 3, "num_states": 6, "layer": "monarch", "blocks": 2},
            "monarch-own": {"length": 3, "num_states": 4, "layer": "monarch", "tied": False},
        },
    ),
    "patches": Structure(
        patch_graph,
        {
            "product": {"variables": _PATCHES, "tree": Tree((-1, 0)), "num_clusters": 3},
            "hclt": {
                "variables": _PATCHES,
                "tree": Tree((-1, 0)),
                "num_clusters": 3,
                "leaf": HcltLeaf(Tree((-1, 0)), 2, 2),
            },
        },
    ),
    "quad_tree": Structure(
        quad_tree,
        {
            "halves": _image(image_shape=(2, 3)),
            "tied": _image(image_shape=(2, 3), num_input_units=3, tied=True),
            "quarters": _image(num_splits=4),
            "channels": _image(image_shape=(1, 2, 3)),
            "tucker": _image(layer="tucker", num_input_units=3),
            "tied-tucker": _image(layer="tucker", tied=True),
            "monarch": _image(num_states=4, layer="monarch"),
        },
        needs_image=True,
    ),
    "quad_graph": Structure(
        quad_graph,
        {
            "cp": _image(image_shape=(2, 3), num_states=3),
            "tied": _image(image_shape=(2, 3), num_states=3, tied=True),
            "tucker": _image(layer="tucker", num_input_units=3),
            "monarch": _image(num_states=4, layer="monarch", tied=True),
        },
        needs_image=True,
    ),
    "rat": Structure(
        random_binary,
        {
            "cp": _random(num_variables=5, num_states=3),
            "tied": _random(num_variables=5, num_states=3, tied=True),
            "shallow": _random(num_variables=5, max_depth=1, num_input_units=3),
            "tucker": _random(layer="tucker"),
            "monarch": _random(num_states=4, layer="monarch", num_repetitions=1),
        },
    ),
    "poon_domingos": Structure(
        poon_domingos,
        {
            "cp": _image(image_shape=(2, 3), delta=1),
            "tied": _image(delta=1, tied=True, num_input_units=3),
            "bounded": _image(image_shape=(2, 3), delta=1, max_products=1, max_depth=2),
            "coarse": _image(image_shape=(3, 2), delta=2),
            "tucker": _image(delta=1, layer="tucker"),
            "monarch": _image(num_states=4, delta=1, layer="monarch"),
        },
        needs_image=True,
    ),
    "mixture": Structure(
        mixture,
        {
            "of-three": {
                "graphs": [
                    hmm(4, 3),
                    hclt_graph(_TREE, 3),
                    quad_tree((2, 2), 3, num_splits=4, tied=True),
                ]
            }
        },
    ),
}
