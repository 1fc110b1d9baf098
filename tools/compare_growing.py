#!/usr/bin/env python3
"""Progressive growing against the same leaves without it, on one budget: a table and a JSON file.

    python tools/compare_growing.py configs/cifar_growing.yaml data.source.path=train.tar.gz

All see the same samples, patches, tree over the patches and passes; leaf densities are equally
many. `progressive` is what the configuration says; `same_clusters` has the final number of heads
in every global cluster from the start, by k-means inside of it; `flat_kmeans` clusters all patches
at once into as many clusters, shared out in order among equally many bodies. The latter two are
plain LVD; the hidden states of their leaves are chosen so that they have at least as many
parameters as the grown circuit has left unpruned.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
import torch
from torch import Tensor

import distpc
from distpc.artifacts import read_json, write_json
from distpc.circuits.circuit import Circuit
from distpc.config import RunConfig, load_config
from distpc.data.index import ShardIndex
from distpc.data.patches import PatchGrid
from distpc.latents.local import cluster_points
from distpc.latents.nearest import assign_points
from distpc.pipeline.runner import Pipeline
from distpc.structures import Tree, chow_liu_tree
from distpc.structures.discretize import discretize
from distpc.structures.joined import joined_graph
from distpc.training.composition import compose
from distpc.training.growing import Grower, num_weights
from distpc.training.leaf import fit_heads
from distpc.training.refinement import head_likelihoods
from distpc.training.samples import take_rows
from distpc.training.soft_top import counted_top, fit_top
from distpc.training.start import start_near_data_

REPORT = "report.json"


@dataclass(frozen=True)
class Task:
    """Data and settings that all variants share; a seed."""

    config: RunConfig
    grid: PatchGrid
    categories: list[int]
    x: dict[str, Tensor]
    tree: Tree
    seed: int

    @property
    def patches(self) -> Tensor:
        """(P, D) of the training samples."""
        return self.x["train"][:, torch.from_numpy(self.grid.variables())].flatten(0, 1)

    @property
    def patch_categories(self) -> list[int]:
        """Of the D variables of a patch."""
        return self.categories[: self.grid.variables_per_patch]


def main() -> None:
    """Run all variants and seeds; what is in the JSON file already is kept."""
    options = parser().parse_intermixed_args()
    config = load_config(options.config, options.overrides)
    out = options.out or Path("runs") / f"{config.name}-compare"
    Pipeline(config, out / "data").run_until("index")
    facts = {"config": config.model_dump(mode="json"), "samples": options.samples}
    found = finished(out / REPORT, facts)
    for seed in options.seeds:
        task = prepare(config, out / "data", options.samples, seed)
        for name in ("progressive", "same_clusters", "flat_kmeans"):
            if f"{name}/{seed}" not in found:
                grown = found.get(f"progressive/{seed}", {"weights": 0})
                found[f"{name}/{seed}"] = run_variant(task, name, grown["weights"])
                write_json(out / REPORT, {**facts, "variants": variants_of(found)})
    for name, variant in variants_of(found).items():
        print(f"{name:<16} test bpd {variant['test_bpd']:.4f} spread {variant['spread']:.4f}")


def finished(path: Path, facts: dict[str, Any]) -> dict[str, Any]:
    """Runs that an earlier call of the same configuration left, by variant/seed."""
    known = read_json(path) if path.is_file() else {}
    if {name: known.get(name) for name in facts} != facts:
        return {}
    variants = known["variants"].items()
    return {f"{n}/{seed}": run for n, one in variants for seed, run in one["seeds"].items()}


def parser() -> argparse.ArgumentParser:
    """Options."""
    found = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    found.add_argument("config", type=Path)
    found.add_argument("overrides", nargs="*", metavar="section.field=value")
    found.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    found.add_argument("--samples", type=int, default=4000, help="training samples")
    found.add_argument("--out", type=Path)
    return found


def prepare(config: RunConfig, folder: Path, samples: int, seed: int) -> Task:
    """Read the splits and learn the tree over the patches."""
    index = ShardIndex.load(folder / "index")
    limits = {"train": samples, "valid": 2000, "test": 5000}
    x = {
        split: torch.from_numpy(np.concatenate(list(take_rows(index, split, limit)))).long()
        for split, limit in limits.items()
    }
    grid = PatchGrid.of(index.spec, config.data.patch_size_pixels)
    means = x["train"][:, torch.from_numpy(grid.variables())].double().mean(-1).numpy()
    rows, sizes = discretize(means, [None] * grid.num_patches, 16)
    categories = [count or 0 for count in index.spec.num_categories]
    return Task(config, grid, categories, x, chow_liu_tree(rows, sizes), seed)


def run_variant(task: Task, name: str, num_weights_wanted: int) -> dict[str, Any]:
    """Distil, fine-tune and measure one variant."""
    began = time.perf_counter()
    growing, seed = task.config.distill.growing, task.seed
    clusters = task.config.latents.num_clusters
    if name == "progressive":
        leaves = grown_leaves(task)
    else:
        heads = heads_of(task, name, clusters, growing.final_heads)
        leaves = plain_leaves(task, heads, clusters, growing.final_heads, num_weights_wanted)
    usage = torch.tensor([len(leaf.training_facts["patches"]) for leaf in leaves])
    shares = torch.cat(
        [n * leaf.weights_of(leaf.graph.root)[0] for n, leaf in zip(usage, leaves, strict=True)]
    )
    soft = torch.cat([head_likelihoods(leaf, task.patches, 1024) for leaf in leaves], dim=1)
    soft = soft.view(len(task.x["train"]), task.grid.num_patches, -1)
    top = counted_top(task.tree, [soft], shares / shares.sum(), task.config.distill, seed)
    fit_top(top, [soft], task.config.distill, seed)
    circuit = compose(task.grid.variables(), task.tree, leaves, top, task.categories, 2**26)
    distilled = bits(circuit, task.x["test"])
    settings = task.config.finetune
    history = distpc.fit(
        circuit, task.x["train"], valid=task.x["valid"], epochs=settings.num_epochs,
        batch_size=settings.batch_size, step_size=settings.step_size,
        final_step_size=settings.final_step_size, pseudocount=settings.pseudocount,
        leaf_pseudocount=settings.leaf_pseudocount, seed=seed, progress=False,
    )  # fmt: skip
    found = {
        "distilled_test_bpd": distilled,
        "test_bpd": bits(circuit, task.x["test"]),
        "train_bpd": history[-1]["train_bits"],
        "weights": num_weights(circuit),
        "leaf_densities": len(shares),
        "seconds": time.perf_counter() - began,
    }
    print(name, seed, {key: round(value, 4) for key, value in found.items()}, flush=True)
    return found


def grown_leaves(task: Task) -> list[Circuit]:
    """A grown circuit for each global cluster."""
    config, patches = task.config, task.patches
    features = patches.float() / 255
    clusters = config.latents.num_clusters
    owner = assign_points(features, global_centroids(task, clusters))[0]
    leaves = []
    for cluster in range(clusters):
        own = owner == cluster
        growth = Grower(
            patches[own], features[own], task.patch_categories,
            config.structure.leaf_num_states, config.distill.growing,
            config.distill.pseudocount, (task.seed, cluster),
        ).run()  # fmt: skip
        growth.circuit.training_facts["patches"] = growth.heads
        leaves.append(growth.circuit)
    return leaves


def global_centroids(task: Task, number: int) -> Tensor:
    """Centroids (number, D) of all training patches."""
    return cluster_points(task.patches.float() / 255, number, 15, [task.seed])


def heads_of(task: Task, name: str, clusters: int, heads: int) -> Tensor:
    """(P,) leaf density of each patch, body after body."""
    features = task.patches.float() / 255
    if name == "flat_kmeans":
        return assign_points(features, global_centroids(task, clusters * heads))[0]
    owner = assign_points(features, global_centroids(task, clusters))[0]
    found = torch.zeros(len(features), dtype=torch.int64)
    for cluster in range(clusters):
        own = owner == cluster
        centroids = cluster_points(features[own], heads, 15, [task.seed, cluster])
        found[own] = cluster * heads + assign_points(features[own], centroids)[0]
    return found


def plain_leaves(
    task: Task, heads: Tensor, clusters: int, per_body: int, wanted: int
) -> list[Circuit]:
    """A leaf HCLT for each body, all heads from the start, at least as large as wanted in all."""
    config, patches = task.config, task.patches
    growing, width = config.distill.growing, patches.shape[1]
    rounds = 1 + growing.final_heads - growing.first_heads
    values = clusters * per_body
    above = values * (1 + values * (task.grid.num_patches - 1))
    states = 1
    emission = sum(task.patch_categories)
    while clusters * states * (emission + states * (width - 1) + per_body) + above < wanted:
        states += 1
    leaves = []
    for body in range(clusters):
        own = heads // per_body == body
        rows, sizes = discretize(patches[own][:20_000].numpy(), task.patch_categories, 16)
        graph = joined_graph([chow_liu_tree(rows, sizes)], states, per_body)
        circuit = Circuit(graph, task.patch_categories, seed=task.seed + body)
        start_near_data_(circuit, [patches[own]])
        fit_heads(
            circuit, patches[own], heads[own] % per_body, epochs=rounds * growing.epochs,
            batch_size=growing.batch_size, step_size=growing.step_size,
            pseudocount=config.distill.pseudocount, seed=task.seed,
        )  # fmt: skip
        circuit.training_facts["patches"] = heads[own]
        leaves.append(circuit)
    return leaves


def bits(circuit: Circuit, x: Tensor) -> float:
    """Bits per dimension."""
    nats = circuit.log_prob(x, batch_size=250).double().mean()
    return float(nats / -np.log(2) / x.shape[1])


def variants_of(found: dict[str, Any]) -> dict[str, Any]:
    """By variant: mean and spread (largest less smallest) of the test bpd, and every seed's run."""
    variants: dict[str, dict[str, Any]] = {}
    for name in dict.fromkeys(key.split("/")[0] for key in found):
        runs = {key.split("/")[1]: run for key, run in found.items() if key.startswith(f"{name}/")}
        test = [run["test_bpd"] for run in runs.values()]
        variants[name] = {"test_bpd": mean(test), "spread": max(test) - min(test), "seeds": runs}
    return variants


if __name__ == "__main__":
    main()
