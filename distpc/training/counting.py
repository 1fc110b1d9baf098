"""Counts of a circuit all of whose latents are known: then every parameter is a relative frequency.

A sample with known latents uses one unit of a region or none, so that a sum's statistics are counts
of pairs of units, and an input's are counts of a unit and a value. That holds for any graph in
which a latent says which unit below each sum is used, whatever it is made of.
Legend: N samples, V variables, Z latents.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from distpc.circuits.circuit import Circuit
from distpc.config.distillation import DistillConfig
from distpc.errors import StructureError
from distpc.structures.region_graph import RegionGraph
from distpc.training.assembly import mix_rows, random_emissions, random_transitions

UNUSED = -1
"""In place of a unit, where a sample does not use the region."""


def table_names(graph: RegionGraph) -> dict[int, str]:
    """Of every region with parameters the name of its table; tied regions share one."""
    return {
        index: region.tie or f"region/{index}"
        for index, region in enumerate(graph.regions)
        if region.kind in ("sum", "input")
    }


def used_units(graph: RegionGraph, latents: np.ndarray) -> list[np.ndarray]:
    """For each region (N,) the unit that each sample uses, or UNUSED.

    Args:
        graph: below each of whose sums a latent chooses the unit.
        latents: (N, Z) values, all known.

    Raises:
        StructureError: a sum below which no latent says which unit is used, or a block-diagonal
            one; naming the region.
    """
    regions = graph.regions
    units = [np.full(len(latents), UNUSED, dtype=np.int64) for _ in regions]
    units[graph.root][:] = 0
    for index in range(graph.root, -1, -1):
        region, own = regions[index], units[index]
        is_used = own != UNUSED
        if region.kind in ("product", "sum"):
            for child in region.children:
                below = regions[child].latent
                if below is not None:
                    units[child][is_used] = latents[is_used, below]
                elif region.kind == "product":
                    units[child][is_used] = own[is_used]
                else:
                    raise _unknown(graph, index, f"region {child} below it has no latent")
            if region.blocks > 1:
                raise _unknown(graph, index, f"{region.blocks} blocks")
        elif region.kind == "concat":
            start = 0
            for child in region.children:
                stop = start + regions[child].num_units
                inside = (own >= start) & (own < stop)
                units[child][inside] = own[inside] - start
                start = stop
        elif region.kind == "kronecker":
            raise _unknown(graph, index, "a Kronecker product")
    return units


def count_tables(
    graph: RegionGraph,
    num_categories: Sequence[int | None],
    x: np.ndarray,
    latents: np.ndarray,
    names: Collection[str] | None = None,
) -> dict[str, Tensor]:
    """Counts (K', K) of each table of sums and (K, C) of each table of inputs, int64, by name.

    Args:
        graph: of the circuit.
        num_categories: C of every variable.
        x: (N, V) values, -1 where missing.
        latents: (N, Z) values, all known.
        names: of the tables to count; default: all.

    Raises:
        StructureError: see `used_units`.
    """
    units = used_units(graph, latents)
    cells: dict[str, list[np.ndarray]] = defaultdict(list)
    shapes: dict[str, tuple[int, int]] = {}
    for index, name in table_names(graph).items():
        if names is not None and name not in names:
            continue
        region, own = graph.regions[index], units[index]
        if region.kind == "sum":
            columns, width = units[region.children[0]], graph.fan_in(index)
        else:
            assert region.variable is not None
            columns, width = x[:, region.variable], num_categories[region.variable] or 0
        known = (own != UNUSED) & (columns >= 0)
        cells[name].append(own[known] * width + columns[known])
        shapes[name] = region.num_units, width
    return {
        name: torch.from_numpy(
            np.bincount(np.concatenate(found), minlength=np.prod(shapes[name])).reshape(
                shapes[name]
            )
        )
        for name, found in cells.items()
    }


@torch.no_grad()
def assemble_counted_(
    circuit: Circuit,
    tables: Mapping[str, Tensor],
    num_samples: int,
    settings: DistillConfig,
    seed: int,
) -> None:
    """Overwrite a circuit's statistics with counts, on the scale of flows per sample.

    A share of every row is random, as in `assembly`; rows of units that no sample uses are random
    with the small weight that the random share of the sums above will give them.

    Args:
        circuit: whose graph was counted.
        tables: of `count_tables`, of all samples.
        num_samples: N.
        settings: shares of random rows, pseudocount.
        seed: of the random rows.
    """
    generator = torch.Generator().manual_seed(seed)
    done: set[str] = set()
    for index, name in table_names(circuit.graph).items():
        if name in done:
            continue
        done.add(name)
        if not circuit.statistics_of(index).numel():
            # Indicators have nothing to learn.
            continue
        counts = tables[name].double()
        is_sum = circuit.graph.regions[index].kind == "sum"
        noise = settings.transition_noise if is_sum else settings.emission_noise
        if is_sum:
            random = random_transitions(counts, generator)
        else:
            # One value's worth over all categories, so that no category is impossible.
            random = random_emissions(counts.sum(0) + 1.0 / counts.shape[1], len(counts), generator)
        uses = float(counts.sum()) / num_samples
        floor = uses * max(1.0 / num_samples, settings.transition_noise / len(counts))
        rows = mix_rows(counts / num_samples, random, noise, floor)
        circuit.statistics_of(index).copy_(rows)
    circuit.set_smoothing(settings.pseudocount, settings.pseudocount, num_samples)


def _unknown(graph: RegionGraph, index: int, found: str) -> StructureError:
    return StructureError(
        "a circuit cannot be counted: its latents do not say which unit is used",
        where=f"region {index} ({graph.regions[index].kind})",
        found=found,
        expected="dense sums over products or concatenations that carry a latent",
    )
