"""One group of hidden Chow-Liu leaves: online EM on patches whose head is observed.

Legend: B batch, P pooled patches, D variables of a patch, K clusters.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from distpc.artifacts.stage import StageContext
from distpc.circuits.circuit import Circuit
from distpc.config.distillation import DistillConfig
from distpc.parallel.stopwatch import count
from distpc.structures.patch_layout import PatchLayout
from distpc.structures.patches import group_graph
from distpc.training.optimizer import CircuitOptimizer
from distpc.training.samples import LatentSource
from distpc.training.schedule import LinearSchedule
from distpc.training.start import start_near_data_

_FINAL_STEP_SIZE = 0.02
_INIT_NOISE = 1.0
"""Spread of the random parameters that a leaf starts from: entries of a row differ up to e^2-fold.
Its own, because fine-tuning's is no part of what a distilled circuit depends on."""
_MAX_POOL_BYTES = 2**30
_MARGINAL_BATCH = 65_536


def train_group(
    ctx: StageContext, layout: PatchLayout, source: LatentSource, group: int
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Fit one group's body and heads to all patches of its clusters.

    Returns:
        the statistics by tie, per pooled patch, and `patches` (1,), how many patches there are;
        notes with the nats of log p(patch, head) a patch in every epoch.
    """
    assert layout.leaf is not None
    clusters = layout.groups[group]
    patches, heads, total = _pool(layout, source, clusters, [ctx.config.seed, group])
    spec = source.index.spec
    circuit = Circuit(
        group_graph(layout.leaf, group, len(clusters)),
        [spec.num_categories[variable] for variable in layout.variables[0].tolist()],
        seed=ctx.config.seed + group,
        init_noise=_INIT_NOISE,
    )
    if ctx.config.parallel.gpus_per_worker > 0:
        circuit.to("cuda")
    curve: list[float] = []
    if len(patches):
        curve = fit_leaf(circuit, patches, heads, ctx.config.distill, ctx.config.seed)
    own = {region.tie: index for index, region in enumerate(circuit.graph.regions) if region.tie}
    tensors = {tie: circuit.statistics_of(i).cpu().contiguous() for tie, i in own.items()}
    tensors["patches"] = torch.tensor([total])
    return tensors, {"curve": " ".join(f"{nats:.4f}" for nats in curve), "pooled": len(patches)}


def fit_leaf(
    circuit: Circuit, patches: Tensor, heads: Tensor, settings: DistillConfig, seed: int
) -> list[float]:
    """Online EM on log p(patch, head).

    Args:
        circuit: over D variables with one latent, the head.
        patches: (P, D) integers, -1 = missing.
        heads: (P,) values of the latent.
        settings: epochs, batch and step size, smoothing.
        seed: of the order.

    Returns:
        for every epoch the mean nats of the batches just before they were learnt from.
    """
    start_near_data_(circuit, patches.split(_MARGINAL_BATCH))
    return fit_heads(
        circuit,
        patches,
        heads,
        epochs=settings.leaf_epochs,
        batch_size=settings.leaf_batch_size,
        step_size=settings.leaf_step_size,
        pseudocount=settings.pseudocount,
        seed=seed,
    )


def fit_heads(
    circuit: Circuit,
    patches: Tensor,
    heads: Tensor,
    *,
    epochs: int,
    batch_size: int,
    step_size: float,
    pseudocount: float,
    seed: int,
) -> list[float]:
    """Online EM on log p(patch, head), from the parameters that the circuit has.

    Args:
        circuit, patches, heads, seed: as of `fit_leaf`.
        epochs: passes over the patches.
        batch_size: patches in a batch.
        step_size: the first one; it falls linearly.
        pseudocount: patches' worth of smoothing a row.

    Returns:
        for every epoch the mean nats of the batches just before they were learnt from.
    """
    circuit.set_smoothing(pseudocount, pseudocount, len(patches))
    optimizer = CircuitOptimizer(circuit.parameter_groups(), step_size=step_size)
    schedule = LinearSchedule(step_size, min(_FINAL_STEP_SIZE, step_size), epochs * len(patches))
    generator = torch.Generator().manual_seed(seed)
    num_batches = math.ceil(len(patches) / batch_size)
    consumed, curve = 0, []
    for _ in range(epochs):
        nats = 0.0
        for rows in torch.randperm(len(patches), generator=generator).tensor_split(num_batches):
            optimizer.zero_grad(set_to_none=True)
            optimizer.set_step_size(schedule(consumed))
            log_prob = circuit(patches[rows].long(), latents=heads[rows, None].long())
            (-log_prob.sum() / len(rows)).backward()
            optimizer.step()
            consumed += len(rows)
            count(patches=len(rows))
            nats += float(log_prob.detach().double().sum())
        curve.append(nats / len(patches))
    return curve


def _pool(
    layout: PatchLayout, source: LatentSource, clusters: range, seed: list[int]
) -> tuple[Tensor, Tensor, int]:
    """Patches of all positions whose latent is in `clusters`.

    Returns:
        (P, D) int16 patches, (P,) int16 heads (latents counted from the first cluster), and how
        many patches there are in the data: more than P if they would not fit into memory.
    """
    rng = np.random.default_rng(seed)
    shards = source.shards()
    masks = {e.name: _is_in(source.latents(e), clusters) for e in shards}
    total = sum(int(mask.sum()) for mask in masks.values())
    room = _MAX_POOL_BYTES // (2 * layout.variables_per_patch)
    pools = [np.empty((0, layout.variables_per_patch), np.int16)]
    chosen = [np.empty(0, np.int16)]
    for entry in shards:
        keep = masks[entry.name]
        if total > room:
            keep = keep & (rng.random(keep.shape) < room / total)
        if keep.any():
            x, latents = source.read(entry)
            pools.append(x[:, layout.variables][keep].astype(np.int16))
            chosen.append((latents[keep] - clusters.start).astype(np.int16))
    return torch.from_numpy(np.concatenate(pools)), torch.from_numpy(np.concatenate(chosen)), total


def _is_in(latents: np.ndarray, clusters: range) -> np.ndarray:
    return (latents >= clusters.start) & (latents < clusters.stop)
