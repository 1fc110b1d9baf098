"""Memory that training takes on one rank, before any tensor exists.

Resident bytes come from `parallel.memory`, messages and flows from `circuits.footprint`; here they
meet in the phases of a step: the backward pass, and the reduction that follows it.
"""

from __future__ import annotations

from collections.abc import Sequence

from distpc.circuits.compiled import compile_graph
from distpc.circuits.footprint import Footprint, backward_peak, footprint, shared
from distpc.circuits.random_start import BLOCK_ENTRIES, KEPT_ENTRIES
from distpc.config.schema import RunConfig
from distpc.parallel.memory import (
    FLOAT_BYTES,
    Layout,
    bytes_per_rank,
    engine_bytes,
    fitting_bucket,
    share,
)
from distpc.structures.region_graph import RegionGraph

_BLOCKS = 4
"""Of random numbers at a time: as they are drawn, in float64, and normalised."""

_BUILDING_COPIES = 3
"""Copies of the largest parameter while random statistics are made and brought to scale."""


def state_copies(config: RunConfig) -> int:
    """Tensors of a parameter's size that a training rule keeps."""
    settings = config.finetune
    if config.integral.enabled:
        # What Adam keeps is of the size of the networks.
        return 0
    if settings.rule == "anemone":
        return int(settings.momentum > 0)
    return {"adam": 2, "growing_em": 1}.get(settings.rule, 0)


def planned_costs(
    config: RunConfig, graph: RegionGraph, num_categories: Sequence[int | None]
) -> Footprint:
    """The sizes of a config's circuit, as training will evaluate it."""
    again = config.parallel.recompute_messages
    bound = config.structure.max_fold_bytes
    schedule = compile_graph(graph, num_categories, bound, late_inputs=again)
    return footprint(graph, schedule, recompute=again)


def layout_of(
    costs: Footprint, node_axis: int, data_axis: int, zero_stage: int, *, offload: bool = False
) -> Layout:
    """A layout with the buckets that training takes on it."""
    own = shared(costs, node_axis)
    bucket = fitting_bucket(own.num_parameters, own.largest_bank)
    return Layout(node_axis, data_axis, zero_stage, bucket, offload)


def peak_bytes(
    costs: Footprint,
    layout: Layout,
    *,
    micro_batch: int,
    num_micro_batches: int = 1,
    state_copies: int = 0,
) -> dict[str, int]:
    """Most bytes that a rank holds at once in a step, by what they are for.

    Args:
        costs: the whole circuit's sizes.
        layout: of the ranks.
        micro_batch: samples that the rank puts through the circuit at once.
        num_micro_batches: passes in a step.
        state_copies: tensors of a parameter's size that the rule keeps.
    """
    own = shared(costs, layout.node_axis)
    sizes = bytes_per_rank(own.num_parameters, layout, state_copies=state_copies)
    flows_stay = layout.zero_stage < 2
    passing = backward_peak(
        own,
        micro_batch,
        # Weights read out, and the flow before it is added to what is there.
        bank_copies=2 if flows_stay else 0,
        keeps_flows=flows_stay,
        has_flows=num_micro_batches > 1,
    )
    during, after = engine_bytes(
        own.num_parameters, own.largest_bank, layout, accumulates=num_micro_batches > 1
    )
    if passing + during >= after:
        return {**sizes, "messages_and_flows": passing, "buffers": during}
    return {**sizes, "messages_and_flows": 0, "buffers": after}


def host_bytes(
    costs: Footprint,
    layout: Layout,
    *,
    keeps_statistics: bool = True,
    whole_circuit_bytes: float = 0.0,
) -> int:
    """Bytes of host memory that a rank takes to make its share of the circuit.

    Args:
        costs: the whole circuit's sizes.
        layout: of the ranks.
        keeps_statistics: whether the rule begins with statistics as they are; others bring the
            whole circuit to another scale first, on every rank.
        whole_circuit_bytes: up to which this rank puts a circuit together that ranks share, for
            figures; 0 for all but rank 0.
    """
    own = shared(costs, layout.node_axis)
    building = FLOAT_BYTES * (min(KEPT_ENTRIES, costs.num_parameters) + _BLOCKS * BLOCK_ENTRIES)
    if not keeps_statistics:
        entries = costs.num_parameters + _BUILDING_COPIES * costs.largest_bank
        return FLOAT_BYTES * entries + building
    whole = FLOAT_BYTES * costs.num_parameters
    is_shared = layout.zero_stage == 3 or layout.node_axis > 1
    shown = whole if is_shared and whole <= whole_circuit_bytes else 0
    stays, bank = own.num_parameters, 0
    if layout.zero_stage == 3:
        # A bank is whole for a moment, and stays in shards.
        stays, bank = share(stays, layout.data_axis), own.largest_bank
    return FLOAT_BYTES * stays + max(FLOAT_BYTES * bank + building, shown)
