"""Stage `structure`: dependence in the data (and latents) -> the circuit's region graph."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from distpc.artifacts.files import write_json
from distpc.artifacts.stage import StageContext
from distpc.config import RunConfig
from distpc.data.index import ShardIndex
from distpc.data.patches import PatchGrid
from distpc.data.spec import DatasetSpec
from distpc.errors import ConfigError
from distpc.structures.chow_liu import maximum_spanning_tree
from distpc.structures.discretize import Bins, discretize
from distpc.structures.mutual_information import mutual_information
from distpc.structures.patches import HcltLeaf, patch_graph
from distpc.structures.region_graph import RegionGraph
from distpc.structures.registry import STRUCTURES
from distpc.structures.size import depth, num_parameters
from distpc.structures.tree import Tree
from distpc.training.samples import LatentSource, num_states, take_rows

GRAPH = "region_graph.json"
TREES = "tree.json"

LEARNT = ("hclt", "chow_liu")
"""Kinds with a tree over the variables that is learnt from the data."""

SAME_INPUTS = ("factorised", "hclt", "hmm")
"""Kinds whose variables, when tied, all share their inputs."""

_BIN_SAMPLES = 20_000
"""Samples from which bins of ordered values are found; all are counted."""

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
    check_codebook(ctx.config)
    if ctx.config.structure.kind != "patches":
        if ctx.config.structure.kind in LEARNT:
            found = _pixel_information(ctx, index)
            trees["variables"], information["variables"] = _tree(found)
        graph = _build(ctx.config, index.spec, trees.get("variables"))
    else:
        grid = PatchGrid.of(index.spec, ctx.config.data.patch_size_pixels)
        trees["patches"], information["patches"] = _tree(
            _latent_information(ctx, grid)
            if ctx.config.structure.tree_of == "latents"
            else _mean_information(ctx, index, grid)
        )
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
    if config.structure.kind != "patches":
        return _build(config, spec, Tree.balanced(spec.num_variables))
    grid = PatchGrid.of(spec, config.data.patch_size_pixels)
    leaf = Tree.balanced(grid.variables_per_patch) if config.structure.leaf == "hclt" else None
    return _patch_circuit(config, grid, Tree.balanced(grid.num_patches), leaf)


def check_codebook(config: RunConfig) -> None:
    """Refuse codebooks of single positions where latents have to mean the same at all of them.

    Raises:
        ConfigError: positions share what the latents choose among.
    """
    structure = config.structure
    is_shared = structure.kind == "patches" or (structure.tied and config.teacher.kind != "none")
    if is_shared and config.latents.codebook != "shared":
        raise ConfigError(
            "a circuit shares its leaves over positions, which codebooks of their own forbid",
            where="latents.codebook",
            found=f"{config.latents.codebook}, and structure.kind={structure.kind}",
            expected="shared",
            fix="set latents.codebook=shared"
            + (", or structure.tied=false" if structure.tied else "")
            + "; per_position is for latents that are used elsewhere: distpc run CONFIG --until "
            "assign",
        )


def check_fit(config: RunConfig, spec: DatasetSpec) -> None:
    """Refuse a structure that the data or the other sections do not allow.

    Raises:
        ConfigError: naming the field.
    """
    structure, clusters = config.structure, config.latents.num_clusters
    if structure.kind == "hmm" and config.finetune.initialization == "distilled":
        _check_chain(config, spec)
    if structure.kind == "hclt" and config.finetune.initialization == "distilled":
        _check_pixels(config, spec)
    if structure.kind == "patches" and not spec.is_discrete:
        raise ConfigError(
            "patch circuits need categorical values",
            where="structure.kind",
            found="real columns",
            fix="use structure.kind=hclt with teacher.kind=none",
        )
    if STRUCTURES[structure.kind].needs_image and spec.image_shape is None:
        raise ConfigError(
            "a structure of rectangles needs images",
            where="structure.kind",
            found=f"{structure.kind}, and {spec.kind} data",
            fix="use structure.kind=rat or hclt",
        )
    if structure.kind == "chow_liu" and not spec.is_discrete:
        raise ConfigError(
            "Chow-Liu trees need categorical values",
            where="structure.kind",
            found="real columns",
            fix="use structure.kind=hclt",
        )
    if structure.tied and structure.kind in SAME_INPUTS and len(set(spec.num_categories)) > 1:
        raise ConfigError(
            "tied variables need equally many categories",
            where="structure.tied",
            found=f"{sorted(map(str, set(spec.num_categories)))} categories",
            fix="set structure.tied=false",
        )
    if structure.leaf == "hclt" and structure.leaf_num_groups > clusters:
        raise ConfigError(
            "there are more groups of clusters than clusters",
            where="structure.leaf_num_groups",
            found=structure.leaf_num_groups,
            expected=f"1 .. {clusters} (latents.num_clusters)",
        )


def _check_chain(config: RunConfig, spec: DatasetSpec) -> None:
    """A distilled hidden Markov model reads text, and its states are the clusters."""
    if spec.kind != "text":
        raise ConfigError(
            "hidden Markov models are distilled from teachers of text",
            where="structure.kind",
            found=f"hmm, and {spec.kind} data",
            fix="set teacher.kind to none and finetune.initialization to random",
        )
    states = num_states(config.latents.num_clusters, spec)
    if config.structure.num_states != states:
        ending = "" if spec.end_token is None else ", and one for the token that ends documents"
        raise ConfigError(
            "a distilled hidden Markov model has a state a cluster",
            where="structure.num_states",
            found=config.structure.num_states,
            expected=f"{states}: latents.num_clusters{ending}",
            fix=f"set structure.num_states to {states}, or change latents.num_clusters",
        )


def _check_pixels(config: RunConfig, spec: DatasetSpec) -> None:
    """A distilled hidden Chow-Liu tree has a latent a variable, whose states are the clusters."""
    structure, size = config.structure, config.data.patch_size_pixels
    channels = 0 if spec.image_shape is None else spec.image_shape[2]
    if channels != 1 or not spec.is_discrete:
        raise ConfigError(
            "hidden Chow-Liu trees are distilled from teachers of grey images",
            where="structure.kind",
            found=f"hclt, and {spec.kind} data" + (f" of {channels} channels" if channels else ""),
            expected="images with one discrete value a pixel: a latent belongs to every variable",
            fix="set teacher.kind to none and finetune.initialization to random, or structure.kind "
            "to patches",
        )
    if size != 1:
        raise ConfigError(
            "a distilled hidden Chow-Liu tree has a latent a pixel, and teachers give one a patch",
            where="data.patch_size_pixels",
            found=size,
            expected=1,
            fix="set data.patch_size_pixels to 1, or structure.kind to patches",
        )
    if structure.num_states != config.latents.num_clusters:
        raise ConfigError(
            "a distilled hidden Chow-Liu tree has a state a cluster",
            where="structure.num_states",
            found=structure.num_states,
            expected=f"{config.latents.num_clusters}: latents.num_clusters",
            fix=f"set structure.num_states to {config.latents.num_clusters}, or change "
            "latents.num_clusters",
        )
    if structure.layer != "cp":
        raise ConfigError(
            "block-diagonal transitions have units of their own, which no latent supervises",
            where="structure.layer",
            found=structure.layer,
            expected="cp",
            fix="set structure.layer to cp, or teacher.kind to none and finetune.initialization "
            "to random",
        )


def _build(config: RunConfig, spec: DatasetSpec, tree: Tree | None) -> RegionGraph:
    """The graph of any kind but patches; `tree` over the variables, where the kind has one."""
    settings = config.structure
    kind = settings.kind
    arguments: dict[str, Any] = {"num_states": settings.num_states, "tied": settings.tied}
    if kind == "factorised":
        arguments = {"num_variables": spec.num_variables, "tied": settings.tied}
    elif kind == "chow_liu":
        arguments = {"tree": tree, "num_categories": spec.num_categories}
    else:
        arguments["layer"] = settings.layer
    if kind == "hclt":
        arguments["tree"] = tree
    elif kind == "hmm":
        arguments["length"] = spec.num_variables
    elif kind == "rat":
        arguments.update(
            num_variables=spec.num_variables,
            num_repetitions=settings.num_repetitions,
            max_depth=settings.max_depth,
            seed=config.seed,
        )
    elif kind == "quad_tree":
        arguments["num_splits"] = settings.num_splits
    elif kind == "poon_domingos":
        arguments.update(
            delta=settings.delta_pixels,
            max_products=settings.max_products,
            max_depth=settings.max_depth,
        )
    if STRUCTURES[kind].needs_image:
        arguments["image_shape"] = spec.image_shape
    if settings.num_input_units is not None:
        arguments["num_input_units"] = settings.num_input_units
    return STRUCTURES[kind].build(**arguments)


def _patch_circuit(
    config: RunConfig, grid: PatchGrid, tree: Tree, leaf: Tree | None
) -> RegionGraph:
    shape = None
    if leaf is not None:
        settings = config.structure
        channels = tuple(d % grid.channels for d in range(grid.variables_per_patch))
        shape = HcltLeaf(
            leaf,
            settings.leaf_num_states,
            settings.leaf_num_groups,
            has_latents=settings.leaf_latents,
            emissions=channels if settings.leaf_tied else None,
        )
    return patch_graph(grid.variables(), tree, config.latents.num_clusters, shape)


def _tree(information: np.ndarray) -> tuple[Tree, float]:
    """The Chow-Liu tree and the sum of its edges' mutual information in nats."""
    tree = maximum_spanning_tree(information)
    return tree, sum(float(information[parent, child]) for parent, child in tree.edges())


@dataclass(frozen=True)
class _Batches:
    """Batches that are read anew every time they are walked."""

    read: Callable[[], Iterator[np.ndarray]]

    def __iter__(self) -> Iterator[np.ndarray]:
        return self.read()


def _pixel_information(ctx: StageContext, index: ShardIndex) -> np.ndarray:
    """(V, V) mutual information of variables, ordered values in bins, batch by batch."""
    settings = ctx.config.structure
    first = take_rows(index, "train", min(settings.max_samples, _BIN_SAMPLES))
    bins = Bins.of(np.concatenate(list(first)), index.spec.num_categories, settings.num_bins)
    batches = _Batches(lambda: take_rows(index, "train", settings.max_samples))
    return mutual_information(
        bins.stream(batches), bins.num_values, pseudocount=settings.pseudocount
    )


def _latent_information(ctx: StageContext, grid: PatchGrid) -> np.ndarray:
    """(Z, Z) mutual information of patch latents."""
    settings = ctx.config.structure
    source = LatentSource.of(ctx, grid.num_patches)
    sizes = [source.num_clusters] * grid.num_patches
    batches = _Batches(lambda: _first_latents(source, settings.max_samples))
    return mutual_information(batches, sizes, pseudocount=settings.pseudocount)


def _mean_information(ctx: StageContext, index: ShardIndex, grid: PatchGrid) -> np.ndarray:
    """(Z, Z) mutual information of the patches' mean values, in bins."""
    settings = ctx.config.structure
    variables = grid.variables()

    def means(max_samples: int) -> Iterator[np.ndarray]:
        for rows in take_rows(index, "train", max_samples):
            # Missing values, -1, only shift a mean that is binned anyway.
            yield rows[:, variables].mean(axis=2, dtype=np.float64)

    first = np.concatenate(list(means(min(settings.max_samples, _BIN_SAMPLES))))
    bins = Bins.of(first, [None] * grid.num_patches, settings.num_bins)
    batches = _Batches(lambda: means(settings.max_samples))
    return mutual_information(
        bins.stream(batches), bins.num_values, pseudocount=settings.pseudocount
    )


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
