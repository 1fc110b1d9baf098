"""Region graphs and the ways to make them: hidden Chow-Liu trees and patch circuits."""

from distpc.structures.chow_liu import ChowLiuModel, chow_liu_tree
from distpc.structures.hclt import hclt, hclt_graph
from distpc.structures.inputs import with_family
from distpc.structures.patch_layout import PatchLayout
from distpc.structures.patches import HcltLeaf, patch_graph
from distpc.structures.region_graph import Region, RegionGraph
from distpc.structures.tree import Tree

__all__ = [
    "ChowLiuModel",
    "HcltLeaf",
    "PatchLayout",
    "Region",
    "RegionGraph",
    "Tree",
    "chow_liu_tree",
    "hclt",
    "hclt_graph",
    "patch_graph",
    "with_family",
]
