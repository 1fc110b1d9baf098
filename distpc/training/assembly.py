"""A circuit from the pieces of distillation, on the scale of expected flows per sample.

A row of counts is divided by samples, not by its uses, so that its sum is how often a sample uses
the row; a share of every row is replaced by a random row, which keeps later EM able to move.
Legend: N samples, Z patches, K clusters, C categories.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from distpc.circuits.circuit import Circuit
from distpc.config.distillation import DistillConfig
from distpc.structures.patch_layout import PatchLayout


@dataclass(frozen=True)
class Counts:
    """What the pieces found.

    Attributes:
        num_samples: N.
        usage: (Z, K) samples with each value of a patch's latent.
        transitions: (Z, K, K) samples with each pair of a patch's parent's value and its own.
        leaves: statistics by tie: counts (K, C) for product leaves; for groups of hidden Chow-Liu
            leaves expected flows per pooled patch.
        group_patches: patches in the data of each such group; empty for product leaves.
    """

    num_samples: int
    usage: Tensor
    transitions: Tensor
    leaves: Mapping[str, Tensor]
    group_patches: tuple[int, ...] = ()


@torch.no_grad()
def assemble_(circuit: Circuit, counts: Counts, settings: DistillConfig, seed: int) -> None:
    """Overwrite the statistics of a patch circuit with what the pieces found.

    States that no sample uses get random rows with the small weight that the transitions' random
    share will give them.

    Args:
        circuit: of the whole graph.
        counts: from the pieces.
        settings: shares of random rows, pseudocount.
        seed: of the random rows.
    """
    layout = PatchLayout.of(circuit.graph)
    generator = torch.Generator().manual_seed(seed)
    size, noise = layout.num_clusters, settings.transition_noise
    floor = max(1.0 / counts.num_samples, noise / size)
    root = counts.usage[layout.tree.root, None].double() / counts.num_samples
    circuit.statistics_of(layout.root).copy_(
        mix_rows(root, random_transitions(root, generator), noise, floor)
    )
    for patch, region in enumerate(layout.transitions):
        if region >= 0:
            rows = counts.transitions[patch].double() / counts.num_samples
            random = random_transitions(rows, generator)
            circuit.statistics_of(region).copy_(mix_rows(rows, random, noise, floor))
    leaf_floor = floor * layout.num_patches
    if layout.leaf is None:
        _assemble_products_(circuit, layout, counts, settings, leaf_floor, generator)
    else:
        _assemble_groups_(circuit, layout, counts, leaf_floor, generator)
    circuit.set_smoothing(settings.pseudocount, settings.pseudocount, counts.num_samples)


def mix_rows(rows: Tensor, random: Tensor, noise: float, floor: float) -> Tensor:
    """Replace the share `noise` of every row by a random one; a row keeps its sum.

    Args:
        rows: (n, m) >= 0.
        random: (n, m) rows that sum to one.
        floor: sum of the random row that replaces a row of zeros.
    """
    totals = rows.sum(-1, keepdim=True)
    mixed = (1.0 - noise) * rows + noise * totals * random
    return torch.where(totals > 0, mixed, floor * random)


def random_transitions(like: Tensor, generator: torch.Generator) -> Tensor:
    """Random rows as the measured prototype drew them: u^2 + 0.05, u uniform, normalised."""
    rows = torch.rand(like.shape, generator=generator, dtype=torch.float64).square() + 0.05
    return rows / rows.sum(-1, keepdim=True)


def random_emissions(histogram: Tensor, num_rows: int, generator: torch.Generator) -> Tensor:
    """(num_rows, C) rows around a histogram (C,): each entry times 0.2 .. 1.2, normalised."""
    shape = num_rows, len(histogram)
    rows = histogram * (torch.rand(shape, generator=generator, dtype=torch.float64) + 0.2)
    return rows / rows.sum(-1, keepdim=True)


def _assemble_products_(
    circuit: Circuit,
    layout: PatchLayout,
    counts: Counts,
    settings: DistillConfig,
    floor: float,
    generator: torch.Generator,
) -> None:
    for tie, region in layout.tied.items():
        table = counts.leaves[tie].double()
        # One value's worth over all categories, so that no category is impossible.
        histogram = table.sum(0) + 1.0 / table.shape[1]
        random = random_emissions(histogram, len(table), generator)
        rows = mix_rows(table / counts.num_samples, random, settings.emission_noise, floor)
        circuit.statistics_of(region).copy_(rows)


def _assemble_groups_(
    circuit: Circuit,
    layout: PatchLayout,
    counts: Counts,
    floor: float,
    generator: torch.Generator,
) -> None:
    """Flows per pooled patch become flows per sample."""
    usage = counts.usage.sum(0)
    for tie, region in layout.tied.items():
        group = int(tie.split("/")[1])
        clusters = layout.groups[group]
        scale = counts.group_patches[group] / counts.num_samples
        rows = counts.leaves[tie].double() * max(scale, floor * len(clusters))
        if tie.endswith("/heads"):
            # Online EM let the rows of unused heads fade to nothing.
            dead = (usage[clusters.start : clusters.stop] == 0)[:, None]
            rows = torch.where(dead, floor * random_transitions(rows, generator), rows)
        circuit.statistics_of(region).copy_(rows)
