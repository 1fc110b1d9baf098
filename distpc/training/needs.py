"""Memory that training takes on one rank, before any tensor exists.

Resident bytes come from `parallel.memory`, messages and flows from `circuits.footprint`; here they
meet in the phases of a step: the backward pass, and the reduction that follows it.
"""

from __future__ import annotations

from collections.abc import Sequence

from distpc.circuits.compiled import compile_graph
from distpc.circuits.footprint import Footprint, backward_peak, footprint, shared
from distpc.config.schema import RunConfig
from distpc.parallel.memory import (
    FLOAT_BYTES,
    Layout,
    bytes_per_rank,
    engine_bytes,
    fitting_bucket,
)
from distpc.structures.region_graph import RegionGraph

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


def host_bytes(costs: Footprint, layout: Layout) -> int:
    """Bytes of host memory that one rank takes to build the circuit before it is laid out.

    Every rank makes the whole circuit; where ranks share parameters afterwards, rank 0 keeps a
    second one for figures.
    """
    copies = 2 if layout.zero_stage == 3 or layout.node_axis > 1 else 1
    return FLOAT_BYTES * (copies * costs.num_parameters + _BUILDING_COPIES * costs.largest_bank)
