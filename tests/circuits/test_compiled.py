"""The schedule: folds, bounds, and messages that are dealt without being copied."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from distpc.circuits.circuit import Circuit
from distpc.circuits.compiled import compile_graph
from distpc.circuits.packing import pack_tables
from distpc.circuits.schedule import InputPlan, ProductPlan, SumPlan
from distpc.errors import StructureError
from distpc.structures.region_graph import Region, RegionGraph

from .graphs import (
    chain,
    flows_of,
    grouped_patches,
    hclt,
    hub,
    patches,
    random_evidence,
    tree_parents,
)


@pytest.mark.parametrize("seed", range(5))
def test_a_tree_has_one_product_and_one_sum_step_per_level(seed: int) -> None:
    parents = tree_parents(40, seed)
    depth = [0] * 40
    for node in range(1, 40):
        depth[node] = depth[parents[node]] + 1
    schedule = compile_graph(patches(40, 2, 4, seed=seed), [3] * 80)
    kinds = [type(step) for step in schedule.steps]
    levels = max(depth) + 1
    assert kinds == [InputPlan] + [ProductPlan, SumPlan] * levels


@pytest.mark.parametrize("graph", [patches(40, 2, 4, seed=2), hclt(tree_parents(40, 3), 4)])
def test_messages_are_dealt_without_a_permutation(graph: RegionGraph) -> None:
    """Emissions are read by many levels: each takes a slice of one split."""
    schedule = compile_graph(graph, [3] * graph.num_variables)
    assert len(schedule.fanouts[0].sizes) > 3
    for fanout in schedule.fanouts[:-1]:
        assert fanout.order is None
    for step in schedule.steps:
        assert all(request.order is None for request in step.requests)


def test_tied_regions_share_one_table() -> None:
    schedule = compile_graph(grouped_patches(3), [2, 3, 2] * 3)
    tied = [len(owners) for bank in schedule.banks for owners in bank.owners]
    assert sorted(tied) == [1] * 3 + [3] * 12
    schedule = compile_graph(chain(50, 3, tied=True), [4] * 50)
    assert sorted(len(o) for bank in schedule.banks for o in bank.owners) == [1, 49, 50]


def test_folds_are_bounded() -> None:
    graph = hub(20, num_units=4)
    whole = compile_graph(graph, [8] * 21)
    assert [len(bank.owners) for bank in whole.banks] == [1, 20, 21]
    small = compile_graph(graph, [8] * 21, max_fold_bytes=4 * 4 * 8 * 5)
    for bank in small.banks:
        assert sum(bank.sizes) * bank.num_units * 4 <= 4 * 4 * 8 * 5
    products = [step for step in small.steps if isinstance(step, ProductPlan)]
    assert products[-1].num_log_rows == 1
    assert len(products[-1].requests[0].pieces) > 2


def test_small_folds_compute_the_same() -> None:
    for graph, sizes in ((hub(20, 4), [8] * 21), (patches(12, 2, 4, tied=False), [5] * 24)):
        whole = Circuit(graph, sizes, seed=1)
        small = Circuit(graph, sizes, max_fold_bytes=600)
        for index, region in enumerate(graph.regions):
            if region.kind in ("input", "sum"):
                small.statistics_of(index).copy_(whole.statistics_of(index))
        x, _ = random_evidence(whole, 30, 0)
        torch.testing.assert_close(small(x), whole(x), rtol=1e-6, atol=1e-5)
        small(x).sum().backward()
        whole(x).sum().backward()
        weighted = [i for i, r in enumerate(graph.regions) if r.kind in ("input", "sum")]
        for index in weighted:
            torch.testing.assert_close(
                flows_of(small, index), flows_of(whole, index), rtol=1e-4, atol=1e-5
            )


def test_rows_that_share_tables_share_a_bank() -> None:
    rows = [["a", "b"], ["c"], ["b", "d"], ["e"], ["f"]]
    bank_of_row, banks = pack_tables(rows, lambda t: t == "f", lambda t: 1, max_bytes=3)
    assert banks == [["a", "b", "d"], ["c", "e"], ["f"]]
    assert bank_of_row == [0, 1, 0, 1, 2]


def test_broken_ties_and_loose_regions_are_refused() -> None:
    leaves = [Region("input", 2, variable=v, tie="t") for v in range(2)]
    graph = RegionGraph([*leaves, Region("product", 2, (0, 1)), Region("sum", 1, (2,))], 2)
    with pytest.raises(StructureError, match="tied regions differ") as caught:
        compile_graph(graph, [2, 3])
    assert "'t'" in str(caught.value)
    loose = RegionGraph([leaves[0], Region("input", 1, variable=0)], 1)
    with pytest.raises(StructureError, match="not below the root"):
        compile_graph(loose, [2])


@pytest.mark.parametrize("tie", ["5", ""])
def test_a_tie_is_no_number_of_a_region(tie: str) -> None:
    regions = list(chain(4).regions)
    sums = [i for i, r in enumerate(regions) if r.kind == "sum" and r.num_units == 2]
    assert 5 in sums
    for index in sums[::2]:
        regions[index] = replace(regions[index], tie=tie)
    circuit = Circuit(RegionGraph(regions, 4), [2] * 4)
    worlds = torch.cartesian_prod(*[torch.arange(2)] * 4)
    assert circuit(worlds).exp().sum().item() == pytest.approx(1.0, abs=1e-5)
    assert circuit.bank_of(sums[0]) == circuit.bank_of(sums[2]) != circuit.bank_of(5)
