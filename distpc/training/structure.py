"""Stage `structure`: dependence in the data (and latents) -> the circuit's region graph."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from distpc.artifacts.files import write_json
from distpc.artifacts.stage import StageContext
from distpc.config import RunConfig
from distpc.data.index import ShardIndex
from distpc.data.patches import PatchGrid
from distpc.data.spec import DatasetSpec
from distpc.errors import ConfigError
from distpc.structures.chow_liu import maximum_spanning_tree
from distpc.structures.discretize import discretize
from distpc.structures.hclt import hclt_graph
from distpc.structures.mutual_information import mutual_information
from distpc.structures.patches import HcltLeaf, patch_graph
from distpc.structures.region_graph import RegionGraph
from distpc.structures.size import depth, num_parameters
from distpc.structures.tree import Tree
from distpc.training.samples import LatentSource, take_rows

GRAPH = "region_graph.json"
TREES = "tree.json"

_MAX_POOLED_PATCHES = 200_000
"""Patches from which the tree inside a patch is learnt; all positions are pooled."""


def run(ctx: StageContext) -> None:
    """Learn the tree or trees, write region_graph.json and tree.json.

    Raises:
        ConfigError: the structure does not fit the data.
        LatentError: latents that do not belong to the data.
    """
    index = ShardIndex.load(ctx.input("index").path)
    check_fit(ctx.config, index.spec)
    trees: dict[str, Tree] = {}
    information: dict[str, float] = {}
    if ctx.config.structure.kind == "hclt":
        found = _pixel_information(ctx, index)
        trees["variables"], information["variables"] = _tree(found)
        graph = hclt_graph(trees["variables"], ctx.config.structure.num_states)
    else:
        grid = PatchGrid.of(index.spec, ctx.config.data.patch_size_pixels)
        trees["patches"], information["patches"] = _tree(_latent_information(ctx, grid))
        if ctx.config.structure.leaf == "hclt":
            trees["leaf"], information["leaf"] = _tree(_patch_information(ctx, index, grid))
        graph = _patch_circuit(ctx.config, grid, trees["patches"], trees.get("leaf"))
    write_json(
        ctx.out / TREES,
        {
            name: {"parents": tree.parents, "information_nats": information[name]}
            for name, tree in trees.items()
        },
    )
    write_json(ctx.out / GRAPH, graph.to_json())
    ctx.metadata.update(
        num_regions=len(graph.regions),
        num_parameters=num_parameters(graph, index.spec.num_categories),
        depth=depth(graph),
        tree_information_nats={name: round(value, 4) for name, value in information.items()},
    )


def sketch(config: RunConfig, spec: DatasetSpec) -> RegionGraph:
    """A region graph of the size that the run's will have, before any data are read.

    Trees are balanced instead of learnt: regions and parameters are as many, the depth is less.

    Raises:
        ConfigError: the structure does not fit the data.
    """
    check_fit(config, spec)
    if config.structure.kind == "hclt":
        return hclt_graph(Tree.balanced(spec.num_variables), config.structure.num_states)
    grid = PatchGrid.of(spec, config.data.patch_size_pixels)
    leaf = Tree.balanced(grid.variables_per_patch) if config.structure.leaf == "hclt" else None
    return _patch_circuit(config, grid, Tree.balanced(grid.num_patches), leaf)


def check_fit(config: RunConfig, spec: DatasetSpec) -> None:
    """Refuse a structure that the data or the other sections do not allow.

    Raises:
        ConfigError: naming the field.
    """
    structure, clusters = config.structure, config.latents.num_clusters
    if structure.kind == "patches" and not spec.is_discrete:
        raise ConfigError(
            "patch circuits need categorical values",
            where="structure.kind",
            found="real columns",
            fix="use structure.kind=hclt with teacher.kind=none",
        )
    if structure.leaf == "hclt" and structure.leaf_num_groups > clusters:
        raise ConfigError(
            "there are more groups of clusters than clusters",
            where="structure.leaf_num_groups",
            found=structure.leaf_num_groups,
            expected=f"1 .. {clusters} (latents.num_clusters)",
        )


def _patch_circuit(
    config: RunConfig, grid: PatchGrid, tree: Tree, leaf: Tree | None
) -> RegionGraph:
    shape = None
    if leaf is not None:
        settings = config.structure
        shape = HcltLeaf(leaf, settings.leaf_num_states, settings.leaf_num_groups)
    return patch_graph(grid.variables(), tree, config.latents.num_clusters, shape)


def _tree(information: np.ndarray) -> tuple[Tree, float]:
    """The Chow-Liu tree and the sum of its edges' mutual information in nats."""
    tree = maximum_spanning_tree(information)
    return tree, sum(float(information[parent, child]) for parent, child in tree.edges())


def _pixel_information(ctx: StageContext, index: ShardIndex) -> np.ndarray:
    """(V, V) mutual information of variables, ordered values in bins."""
    settings = ctx.config.structure
    rows = np.concatenate(list(take_rows(index, "train", settings.max_samples)))
    binned, sizes = discretize(rows, index.spec.num_categories, settings.num_bins)
    return mutual_information(binned, sizes, pseudocount=settings.pseudocount)


def _latent_information(ctx: StageContext, grid: PatchGrid) -> np.ndarray:
    """(Z, Z) mutual information of patch latents."""
    source = LatentSource.of(ctx, grid.num_patches)
    sizes = [source.num_clusters] * grid.num_patches
    batches = _first_latents(source, ctx.config.structure.max_samples)
    return mutual_information(batches, sizes, pseudocount=ctx.config.structure.pseudocount)


def _first_latents(source: LatentSource, max_samples: int) -> Iterator[np.ndarray]:
    left = max_samples
    for entry in source.shards():
        if left <= 0:
            return
        rows = source.latents(entry)[:left]
        left -= len(rows)
        yield rows


def _patch_information(ctx: StageContext, index: ShardIndex, grid: PatchGrid) -> np.ndarray:
    """(D, D) mutual information of a patch's variables, patches of all positions pooled."""
    settings = ctx.config.structure
    variables = grid.variables()
    needed = max(1, min(settings.max_samples, _MAX_POOLED_PATCHES // grid.num_patches))
    batches = [rows[:, variables].reshape(-1, variables.shape[1]) for rows in
               take_rows(index, "train", needed)]  # fmt: skip
    categories = [index.spec.num_categories[v] for v in variables[0].tolist()]
    binned, sizes = discretize(np.concatenate(batches), categories, settings.num_bins)
    return mutual_information(binned, sizes, pseudocount=settings.pseudocount)
