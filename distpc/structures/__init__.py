"""Region graphs and the ways to make them; `registry.STRUCTURES` lists those that runs may name."""

from distpc.structures.chow_liu import ChowLiuModel, chow_liu_tree
from distpc.structures.chow_liu_circuit import chow_liu_circuit, chow_liu_tables
from distpc.structures.factorised import factorised
from distpc.structures.hclt import hclt, hclt_graph
from distpc.structures.hmm import hmm
from distpc.structures.inputs import with_family
from distpc.structures.mixture import mixture
from distpc.structures.patch_layout import PatchLayout
from distpc.structures.patches import HcltLeaf, patch_graph
from distpc.structures.poon_domingos import poon_domingos
from distpc.structures.quads import quad_graph, quad_tree
from distpc.structures.random_binary import random_binary
from distpc.structures.region_graph import Region, RegionGraph
from distpc.structures.tree import Tree

__all__ = [
    "ChowLiuModel",
    "HcltLeaf",
    "PatchLayout",
    "Region",
    "RegionGraph",
    "Tree",
    "chow_liu_circuit",
    "chow_liu_tables",
    "chow_liu_tree",
    "factorised",
    "hclt",
    "hclt_graph",
    "hmm",
    "mixture",
    "patch_graph",
    "with_family",
    "poon_domingos",
    "quad_graph",
    "quad_tree",
    "random_binary",
]
