"""The planner's bytes against what processes take and send.

Ranks run in a network namespace of their own, whose interface counts their bytes alone. glibc keeps
small freed blocks for later, which would count as memory in use: it is told not to.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from distpc.circuits.compiled import compile_graph
from distpc.circuits.footprint import Footprint, footprint, shared
from distpc.parallel.memory import Layout, fitting_bucket, share
from distpc.parallel.traffic import traffic
from distpc.structures.hclt import hclt_graph
from distpc.structures.tree import Tree
from distpc.training.needs import host_bytes, peak_bytes

TARGETS = Path(__file__).parent / "plan_targets.py"


def namespaces() -> bool:
    """Whether this user may make network namespaces."""
    command = ["unshare", "-rn", "ip", "link", "set", "lo", "up"]
    try:
        return subprocess.run(command, capture_output=True, check=False).returncode == 0
    except FileNotFoundError:
        return False


def measure(
    cases: list[dict[str, Any]], num_ranks: int, folder: Path
) -> list[list[dict[str, float]]]:
    """For every case what each rank measured."""
    folder.mkdir()
    (folder / "payload.json").write_text(json.dumps({"cases": cases, "out": str(folder)}))
    command = [sys.executable, str(TARGETS), str(num_ranks), str(folder)]
    if namespaces():
        command = ["unshare", "-rn", "sh", "-c", 'ip link set lo up && exec "$@"', "sh", *command]
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
    environment["PYTHONPATH"] = os.pathsep.join([str(TARGETS.parent), *sys.path])
    subprocess.run(command, check=True, env=environment, timeout=900)
    files = [folder / f"rank-{rank}.json" for rank in range(num_ranks)]
    results = [json.loads(file.read_text()) for file in files]
    return [list(of_case) for of_case in zip(*results, strict=True)]


def sizes(case: dict[str, Any]) -> Footprint:
    graph = hclt_graph(Tree.balanced(case["num_variables"]), case["num_states"])
    categories = [case["num_categories"]] * case["num_variables"]
    again = case.get("recompute", False)
    schedule = compile_graph(graph, categories, case["max_fold_bytes"], late_inputs=again)
    return footprint(graph, schedule, recompute=again)


def compare(
    cases: list[dict[str, Any]], num_ranks: int, folder: Path
) -> list[list[dict[str, float]]]:
    """Memory of every rank within 15 %, bytes sent within 5 %; what was measured."""
    measured = measure(cases, num_ranks, folder)
    for case, ranks in zip(cases, measured, strict=True):
        costs = sizes(case)
        node_axis = case.get("node_axis", 1)
        data_axis = num_ranks // node_axis
        layout = Layout(node_axis, data_axis, case["zero_stage"], case["reduce_bucket"])
        local = share(case["batch"], data_axis)
        pieces = share(local, case["micro_batch"])
        planned = peak_bytes(
            costs,
            layout,
            micro_batch=share(local, pieces),
            num_micro_batches=pieces,
            state_copies=2 if case.get("rule") == "adam" else 0,
        )
        peak, found = sum(planned.values()), [rank["peak_bytes"] for rank in ranks]
        sent = traffic(
            shared(costs, node_axis),
            layout,
            local_batch=local,
            num_micro_batches=pieces,
            scatters=False,
        ).total
        counted = ranks[0]["sent_bytes"] / num_ranks
        print(
            f"{layout.name}, {pieces} x {share(local, pieces)}: "
            f"{4 * costs.num_parameters / 2**20:.0f} MiB of statistics; planned "
            f"{peak / 2**20:.0f} MiB, peaks {[round(value / 2**20) for value in found]}; sent "
            f"{sent / 2**20:.1f} MiB, counted {counted / 2**20:.1f}"
        )
        for value in found:
            assert abs(peak / value - 1) < 0.15, (case, planned, value)
        if num_ranks > 1 and namespaces():
            assert abs(sent / counted - 1) < 0.05, (case, sent, counted)
    return measured


def made(
    cases: list[dict[str, Any]], measured: list[list[dict[str, float]]], num_ranks: int
) -> None:
    """Host memory until every rank has its share of the circuit: no more than was planned."""
    for case, ranks in zip(cases, measured, strict=True):
        axis = case.get("node_axis", 1)
        layout = Layout(axis, num_ranks // axis, case["zero_stage"], case["reduce_bucket"])
        planned = host_bytes(sizes(case), layout)
        found, ready = ([rank[key] for rank in ranks] for key in ("laid_out_bytes", "ready_bytes"))
        print(
            f"{layout.name}: {planned / 2**20:.0f} MiB planned to make a share, "
            f"{[round(value / 2**20) for value in found]} taken, "
            f"{[round(value / 2**20) for value in ready]} with the engine"
        )
        assert max(found) < 1.15 * planned, (case, planned, found)


def test_two_ranks_take_and_send_what_was_planned(tmp_path: Path) -> None:
    shape = {"num_variables": 64, "num_states": 256, "num_categories": 16}
    shape |= {"max_fold_bytes": 2**21, "reduce_bucket": 1_000_000}
    cases = [{**shape, "zero_stage": stage, "batch": 256, "micro_batch": 64} for stage in range(4)]
    compare(cases, 2, tmp_path / "two")


@pytest.mark.slow
@pytest.mark.parametrize("num_ranks", [1, 2])
def test_replicas(num_ranks: int, tmp_path: Path) -> None:
    """10 million statistics: messages outweigh them in one case, not in the other."""
    shape = {"num_variables": 144, "num_states": 256, "num_categories": 16}
    shape |= {"max_fold_bytes": 2**22, "reduce_bucket": 2_000_000}
    cases = [
        {**shape, "zero_stage": stage, "batch": b, "micro_batch": m}
        for stage in range(4)
        for b, m in ((512, 512), (256, 64))
    ]
    compare(cases, num_ranks, tmp_path / "ranks")


@pytest.mark.slow
def test_adam_keeps_two_more_tensors(tmp_path: Path) -> None:
    shape = {"num_variables": 144, "num_states": 256, "num_categories": 16, "rule": "adam"}
    shape |= {"max_fold_bytes": 2**22, "reduce_bucket": 2_000_000}
    cases = [
        {**shape, "zero_stage": stage, "batch": b, "micro_batch": m}
        for stage in range(4)
        for b, m in ((512, 512), (256, 64))
    ]
    compare(cases, 2, tmp_path / "ranks")


@pytest.mark.slow
@pytest.mark.parametrize("num_ranks", [1, 2])
def test_messages_computed_again(num_ranks: int, tmp_path: Path) -> None:
    """Where messages outweigh statistics, by which layout soever."""
    shape = {"num_variables": 144, "num_states": 256, "num_categories": 16, "recompute": True}
    shape |= {"max_fold_bytes": 2**22, "reduce_bucket": 2_000_000, "batch": 512, "zero_stage": 0}
    cases = [{**shape, "micro_batch": 512}, {**shape, "micro_batch": 256, "zero_stage": 2}]
    if num_ranks > 1:
        cases.append({**shape, "micro_batch": 512, "node_axis": 2})
    compare(cases, num_ranks, tmp_path / "ranks")


@pytest.mark.slow
@pytest.mark.parametrize(("num_ranks", "stages"), [(2, [0]), (4, [0, 3])])
def test_ranks_that_share_rows(num_ranks: int, stages: list[int], tmp_path: Path) -> None:
    """The same circuit on node axes of 2 and 4, and on a mesh."""
    shape = {"num_variables": 144, "num_states": 256, "num_categories": 16}
    shape |= {"max_fold_bytes": 2**22, "reduce_bucket": 2_000_000}
    axes = [size for size in (2, 4) if size <= num_ranks]
    cases = [
        {**shape, "zero_stage": stage, "node_axis": axis, "batch": b, "micro_batch": m}
        for axis in axes
        for stage in (stages if axis < num_ranks else [0])
        for b, m in ((512, 512), (256, 64))
    ]
    compare(cases, num_ranks, tmp_path / "ranks")


@pytest.mark.slow
def test_shares_of_a_large_circuit(tmp_path: Path) -> None:
    """222 million parameters: what one of four ranks takes, of what one process takes alone."""
    shape = {"num_variables": 820, "num_states": 512, "num_categories": 16}
    shape |= {"max_fold_bytes": 2**22, "batch": 32, "micro_batch": 32, "zero_stage": 0}
    costs = sizes(shape)
    assert costs.num_parameters > 200_000_000
    shape["reduce_bucket"] = fitting_bucket(costs.num_parameters, costs.largest_bank)
    ((alone,),) = measure([{**shape, "plain": True}], 1, tmp_path / "alone")
    layouts = [{**shape, "node_axis": 4}, {**shape, "zero_stage": 3}]
    rows, zero = compare(layouts, 4, tmp_path / "shared")
    of_sums = max(rank["sums_bytes"] for rank in rows) / alone["sums_bytes"]
    peaks = [max(rank["peak_bytes"] for rank in ranks) for ranks in (rows, zero)]
    of_rows, of_zero = (peak / alone["peak_bytes"] for peak in peaks)
    made(layouts, [rows, zero], 4)
    of_making = [
        max(max(rank["ready_bytes"], rank["peak_bytes"]) for rank in ranks) / alone["peak_bytes"]
        for ranks in (rows, zero)
    ]
    print(
        "from nothing to the end of the first steps a rank takes at most "
        f"{of_making[0]:.3f} (node axis 4) and {of_making[1]:.3f} (ZeRO 3) of one process's peak"
    )
    print(
        f"alone {alone['peak_bytes'] / 2**20:.0f} MiB at its peak; a rank of node axis 4 holds "
        f"{of_sums:.3f} of its sums' statistics and flows, and {of_rows:.3f} of its peak; a rank "
        f"of four under ZeRO 3 {of_zero:.3f} of its peak"
    )
    assert of_sums <= 0.30
    assert of_zero <= 0.45
    # Making a share takes no more than a step with it.
    assert of_making[0] <= 0.40 and of_making[1] <= 0.45
