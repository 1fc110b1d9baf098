"""Stage `distill`: data and latents together -> a circuit to fine-tune.

The pieces that share nothing run as Ray tasks, longest first; putting them together takes no
training. Finished pieces of an interrupted attempt are kept.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from distpc.artifacts.stage import StageContext
from distpc.circuits.circuit import Circuit
from distpc.circuits.io import save_model
from distpc.structures.patch_layout import PatchLayout
from distpc.training.assembly import Counts, assemble_
from distpc.training.chain import distil_chain
from distpc.training.counted import distil_tree
from distpc.training.figures import Figures, tally
from distpc.training.pieces import WORKER, Piece, load_graph, make_pieces, plan_pieces
from distpc.training.progressive import distil_progressive
from distpc.training.samples import LatentSource, take_rows
from distpc.training.supervised import distil_supervised

EVALUATION_SAMPLES = 2000
"""Samples of a split on which the distilled circuit is measured."""
_EVALUATION_BATCH = 250


def run(ctx: StageContext) -> None:
    """Make all pieces, assemble the circuit and write it to model/.

    Raises:
        LatentError: latents of other samples, another grid or other clusters than the structure.
        DataError: shards that changed since they were indexed.
        ResourceError: the cluster is too small, or keeps losing workers.
    """
    if ctx.config.structure.kind == "hmm":
        circuit, facts, source = distil_chain(ctx)
    elif ctx.config.structure.kind == "hclt":
        circuit, facts, source = distil_tree(ctx)
    else:
        circuit, facts, source = _distil_patches(ctx)
    # Heads that were grown are no clusters: their values are not the latents of the data.
    clusters = ctx.config.distill.kind == "plain"
    facts |= {"num_parameters": circuit.num_parameters, **measure(circuit, source, clusters)}
    save_model(
        circuit,
        ctx.out / "model",
        dataset=source.index.spec.to_json(),
        training={"stage": "distill", "num_samples": facts["num_samples"]},
    )
    ctx.metadata.update(facts)


def _distil_patches(ctx: StageContext) -> tuple[Circuit, dict[str, Any], LatentSource]:
    """A patch circuit, notes for the stage's metadata, and the source of the latents."""
    graph = load_graph(ctx)
    layout = PatchLayout.of(graph)
    source = LatentSource.of(ctx, layout.num_patches)
    source.check_values({layout.num_clusters}, ctx.input("structure").path)
    if ctx.config.distill.kind == "progressive":
        return distil_progressive(ctx, layout, source)
    if layout.leaf is not None and layout.leaf.has_latents:
        return distil_supervised(ctx, graph, layout, source)
    pieces = plan_pieces(ctx, layout, source)
    missing, workers = make_pieces(ctx, WORKER, pieces)
    counts, notes = collect(ctx, layout, pieces)
    spec = source.index.spec
    circuit = Circuit(
        graph,
        spec.num_categories,
        seed=ctx.config.seed,
        max_fold_bytes=ctx.config.structure.max_fold_bytes,
    )
    assemble_(circuit, counts, ctx.config.distill, ctx.config.seed)
    facts = {
        "num_samples": counts.num_samples,
        "states_never_used": int((counts.usage.sum(0) == 0).sum()),
        "pieces": notes,
        "kept_pieces": len(pieces) - len(missing),
        "workers": workers,
    }
    return circuit, facts, source


def collect(
    ctx: StageContext, layout: PatchLayout, pieces: list[Piece]
) -> tuple[Counts, dict[str, Any]]:
    """Read all finished pieces: their sums, and notes on each."""
    notes: dict[str, Any] = {}
    leaves: dict[str, torch.Tensor] = {}
    patches = [0] * (layout.leaf.num_groups if layout.leaf else 0)
    top: dict[str, torch.Tensor] = {}
    for piece in pieces:
        tensors, noted = piece.load(ctx)
        notes[piece.name] = {"seconds": float(noted["seconds"])}
        if piece.kind == "top":
            top = tensors
        elif piece.kind == "counts":
            for tie, table in tensors.items():
                leaves[tie] = leaves[tie] + table if tie in leaves else table
        else:
            patches[piece.group] = int(tensors.pop("patches"))
            leaves.update(tensors)
            curve = [float(nats) for nats in noted["curve"].split()]
            notes[piece.name].update(
                patches=patches[piece.group], pooled=int(noted["pooled"]), nats_by_epoch=curve
            )
    counts = Counts(
        int(top["num_samples"]), top["usage"], top["transitions"], leaves, tuple(patches)
    )
    return counts, notes


def measure(circuit: Circuit, source: LatentSource, with_latents: bool = True) -> dict[str, Any]:
    """Bits per dimension of data, on the first samples of a split; of training data also with
    latents, where those are the circuit's."""
    joint, alone = torch.zeros(5, dtype=torch.float64), torch.zeros(5, dtype=torch.float64)
    left, counted = EVALUATION_SAMPLES, source.index.spec.counted
    for entry in source.shards():
        if left <= 0:
            break
        x, latents = (torch.from_numpy(rows[:left]) for rows in source.read(entry))
        left -= len(x)
        if with_latents:
            log_prob = circuit.log_prob(x, latents=latents, batch_size=_EVALUATION_BATCH)
            joint += tally(log_prob, x, counted)
        alone += tally(circuit.log_prob(x, batch_size=_EVALUATION_BATCH), x, counted)
    valid = torch.zeros(5, dtype=torch.float64)
    for rows in take_rows(source.index, "valid", EVALUATION_SAMPLES):
        x = torch.from_numpy(np.ascontiguousarray(rows))
        valid += tally(circuit.log_prob(x, batch_size=_EVALUATION_BATCH), x, counted)
    sums = {"train": alone, "valid": valid}
    if with_latents:
        sums["train_with_latents"] = joint
    figures = {name: Figures.of(total) for name, total in sums.items()}
    return {
        **{
            f"{name}_{source.index.spec.unit}": round(found.bits, 5)
            for name, found in figures.items()
        },
        **{f"{name}_impossible": found.impossible for name, found in figures.items()},
        "train_samples_measured": figures["train"].samples,
        "valid_samples_measured": figures["valid"].samples,
    }
