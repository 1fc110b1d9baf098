"""The planner: sizes, formulas, choices and refusals."""

import json
import os
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from distpc.circuits.circuit import Circuit
from distpc.circuits.compiled import compile_graph
from distpc.circuits.footprint import Footprint, footprint, shared
from distpc.cli import main
from distpc.config import load_config
from distpc.errors import ResourceError
from distpc.parallel.memory import Layout, bytes_per_rank
from distpc.parallel.traffic import traffic
from distpc.pipeline.plan import Cluster, Job, choose, options
from distpc.pipeline.plan_command import job_of
from distpc.structures.hmm import hmm
from distpc.structures.registry import STRUCTURES

CONFIGS = Path(__file__).parents[2] / "configs"
MIB, GIB = 2**20, 2**30


def sizes(length: int = 8, num_states: int = 64, num_categories: int = 16) -> Footprint:
    graph = hmm(length, num_states, tied=False)
    return footprint(graph, compile_graph(graph, [num_categories] * length, 2**16))


def plan(capsys: pytest.CaptureFixture[str], config: str, *more: str) -> tuple[int, str, str]:
    cluster = ["--nodes", "64", "--gpus-per-node", "8", "--gpu-memory-gib", "80"]
    status = main(["plan", str(CONFIGS / config), *cluster, *more])
    shown = capsys.readouterr()
    return status, shown.out, shown.err


@pytest.mark.parametrize("kind", sorted(STRUCTURES))
def test_sizes_are_those_of_the_circuit(kind: str) -> None:
    for arguments in STRUCTURES[kind].small.values():
        graph = STRUCTURES[kind].build(**arguments)
        categories = [graph.indicated.get(v, 3) for v in range(graph.num_variables)]
        circuit = Circuit(graph, categories)
        found = footprint(graph, circuit.schedule)
        assert found.num_parameters == circuit.num_parameters
        assert list(found.banks) == [bank.statistics.numel() for bank in circuit.bank_list]
        products = sum(
            region.num_units * graph.fan_in(index)
            for index, region in enumerate(graph.regions)
            if region.kind == "sum"
        )
        assert found.multiply_adds == products


def test_real_inputs_keep_moments() -> None:
    graph = hmm(3, 5, tied=False)
    circuit = Circuit(graph, [None] * 3)
    assert footprint(graph, circuit.schedule).num_parameters == circuit.num_parameters


def test_bytes_between_steps() -> None:
    parameters = 1000 * MIB // 4
    resident = {
        stage: sum(bytes_per_rank(parameters, Layout(1, 4, stage, MIB)).values()) // MIB
        for stage in range(4)
    }
    # Statistics; a share of them more; and three shares with a bucket.
    assert resident == {0: 1000, 1: 1250, 2: 1250, 3: 750 + 4}
    # What is sharded can lie with the host.
    on_device = {
        stage: sum(bytes_per_rank(parameters, Layout(1, 4, stage, MIB, True)).values()) // MIB
        for stage in range(4)
    }
    assert on_device == {0: 1000, 1: 1000, 2: 1000, 3: 4}
    learns = bytes_per_rank(parameters, Layout(1, 2, 0), state_copies=2)
    assert learns["statistics"] == 1000 * MIB and learns["optimizer_state"] == 2000 * MIB


@pytest.mark.parametrize(
    ("stage", "pieces", "payloads"),
    [(0, 1, 2), (0, 3, 2), (1, 3, 3), (2, 1, 3), (2, 3, 7), (3, 1, 3), (3, 3, 9)],
)
def test_bytes_sent_on_the_data_axis(stage: int, pieces: int, payloads: int) -> None:
    costs = sizes()
    sent = traffic(costs, Layout(1, 4, stage, 1), local_batch=12, num_micro_batches=pieces)
    whole = 4 * costs.num_parameters
    assert sent.messages == 0
    assert sent.parameters == pytest.approx(payloads * whole * 3 / 4, rel=1e-3)


def test_bytes_sent_on_the_node_axis() -> None:
    """Every sum's product is gathered, with its scales, and its flow scattered."""
    costs = shared(sizes(length=8, num_states=64), 4)
    sent = traffic(costs, Layout(4, 1, 0), local_batch=10, num_micro_batches=1)
    assert sent.parameters == 0
    # The root's flow needs no scattering; two entries say which samples are evaluated again.
    scales, root = 8 * 4 * 4, 64
    assert costs.exchanged == 2 * 7 * 64 + root + scales + 2
    assert sent.messages == 4 * costs.exchanged * 10 * 3 // 4


def test_shared_rows_divide_everything_but_gathered_messages() -> None:
    costs = sizes()
    part = shared(costs, 4)
    assert part.num_parameters == pytest.approx(costs.num_parameters / 4, rel=0.01)
    assert part.multiply_adds == pytest.approx(costs.multiply_adds / 4, rel=0.01)
    # Of 7 sums their own units, of 8 what they gathered, the root and the values of 8 variables.
    assert part.kept == 4 * 7 * 16 + 4 * 8 * 64 + 4 + 8 * 8


def test_the_rule_of_thumb_between_the_axes() -> None:
    """DESIGN 2.5: sharing rows moves less than ZeRO 3 when batch x uses < about 1.5 K."""
    costs = sizes(length=8, num_states=64)
    for batch, shares in ((64, True), (160, False)):
        rows = traffic(shared(costs, 4), Layout(4, 1, 0), local_batch=batch, num_micro_batches=1)
        zero = traffic(costs, Layout(1, 4, 3, 1), local_batch=batch // 4, num_micro_batches=1)
        assert (rows.total < zero.total) == shares


def layouts(found: Sequence[Any]) -> set[tuple[int, int, int]]:
    return {(o.layout.node_axis, o.layout.data_axis, o.layout.zero_stage) for o in found}


def test_what_is_offered_and_taken() -> None:
    job = Job(sizes(), batch=64)
    cluster = Cluster(1, 4, 10 * GIB)
    found = options(job, cluster)
    stages = {(m, 4 // m, stage) for m in (1, 2) for stage in range(4)}
    assert layouts(found) == stages | {(4, 1, 0)}
    assert choose(found, cluster).layout.name == "1 x 4, ZeRO 0"
    whole_rows = options(Job(sizes(), batch=64, needs_whole_rows=True), cluster)
    assert layouts(whole_rows) == {(1, 4, 0), (2, 2, 0), (4, 1, 0)}


@pytest.mark.parametrize(("rule", "whole"), [("growing_em", False), ("anemone", True)])
def test_rules_that_work_on_shards_are_planned_with_them(rule: str, whole: bool) -> None:
    config = load_config(CONFIGS / "digits_hclt.yaml", [f"finetune.rule={rule}"])
    assert job_of(config).needs_whole_rows == whole


def test_messages_computed_again_take_time_instead_of_memory() -> None:
    graph = hmm(64, 128)
    plain, late = (
        footprint(graph, compile_graph(graph, [16] * 64, late_inputs=again), recompute=again)
        for again in (False, True)
    )
    cluster = Cluster(1, 4, 10 * GIB)
    kept, again = ({o.layout.name: o for o in options(Job(c, 512), cluster)} for c in (plain, late))
    # ZeRO 3 cannot do it.
    assert set(kept) - set(again) == {"1 x 4, ZeRO 3", "2 x 2, ZeRO 3"}
    for name, option in again.items():
        assert option.peak < kept[name].peak / 2
        assert option.compute_seconds == pytest.approx(kept[name].compute_seconds * 4 / 3)
    assert again["4 x 1, ZeRO 0"].sent > 1.3 * kept["4 x 1, ZeRO 0"].sent
    assert again["1 x 4, ZeRO 0"].sent == kept["1 x 4, ZeRO 0"].sent


def test_less_memory_means_smaller_pieces_then_more_shards_then_refusal() -> None:
    job = Job(sizes(length=32, num_states=2048), batch=8192)
    taken = []
    for memory in (4 * GIB, 1350 * MIB, 500 * MIB):
        cluster = Cluster(1, 4, memory)
        option = choose(options(job, cluster), cluster)
        assert option.peak <= memory
        taken.append((option.layout.node_axis, option.layout.zero_stage, option.micro_batch))
    assert taken == [(1, 0, 2048), (1, 1, 256), (4, 0, 512)]
    cluster = Cluster(1, 4, 100 * MIB)
    with pytest.raises(ResourceError) as refused:
        choose(options(job, cluster), cluster)
    assert "100 MiB usable" in str(refused.value) and "at least" in str(refused.value)


def test_a_matrix_beyond_a_device_takes_ranks_that_share_its_rows(
    capsys: pytest.CaptureFixture[str],
) -> None:
    status, shown, _ = plan(capsys, "plan/hmm_131072.yaml")
    assert status == 0 and "23,767,285,760 parameters" in shown
    assert "set        parallel.num_hosts=64 parallel.num_ranks=8 parallel.node_parallel=" in shown
    # Sizes cannot be trained on.
    assert "run  " not in shown
    assert "does not fit" in shown
    # A rank makes its share of the circuit, a sixteenth of 88.5 GiB, and holds no whole one.
    assert "host       5.7 GiB a rank to make its share of the circuit, 5.7 GiB rank 0" in shown
    _, shown, _ = plan(capsys, "plan/hmm_131072.yaml", "parallel.whole_circuit_gib=100")
    assert "94.1 GiB rank 0, which shows figures" in shown
    status, _, error = plan(capsys, "plan/hmm_131072.yaml", "finetune.rule=anemone")
    assert status == 2
    assert "no layout fits" in error and "76.0 GiB usable" in error and "at least" in error


@pytest.mark.parametrize(
    ("config", "parameters"),
    [
        ("plan/hmm_32768.yaml", 32768**2 + 32768 * 50257 + 32768),
        ("plan/imagenet64_patches.yaml", 255 * 4096**2 + 48 * 4096 * 256 + 4096),
    ],
)
def test_large_configs_as_json(
    config: str, parameters: int, capsys: pytest.CaptureFixture[str]
) -> None:
    status, shown, _ = plan(capsys, config, "--json")
    values = json.loads(shown)
    assert status == 0 and values["num_parameters"] == parameters
    assert values["chosen"]["fits"]
    best = min(v["step_seconds"] for v in values["layouts"] if v["fits"])
    assert values["chosen"]["step_seconds"] <= 1.2 * best
    for layout in values["layouts"]:
        parts = layout["bytes_per_rank"]
        assert parts["total"] == sum(size for name, size in parts.items() if name != "total")


def test_bad_requests(capsys: pytest.CaptureFixture[str]) -> None:
    status, _, error = plan(capsys, "digits.yaml", "finetune.batch_size=5")
    assert status == 2 and "no layout gives every replica a sample" in error
    assert "5 samples on 512 devices" in error and "plan for fewer nodes" in error
    for option in (["--nodes", "0"], ["--gpu-memory-gib", "nan"], ["--link-gbps", "-1"]):
        with pytest.raises(SystemExit) as ended:
            plan(capsys, "digits.yaml", *option)
        assert ended.value.code == 2
    assert main(["run", str(CONFIGS / "plan" / "hmm_32768.yaml")]) == 2
    assert "distpc plan" in capsys.readouterr().err


def test_dry_run_shows_the_same_arithmetic(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = str(CONFIGS / "digits.yaml")
    assert main(["run", config, "--out", str(tmp_path), "--dry-run"]) == 0
    shown = capsys.readouterr().out
    job = job_of(load_config(Path(config)))
    cluster = Cluster(1, 2, GIB)
    (option,) = [o for o in options(job, cluster) if o.layout.name == "1 x 2, ZeRO 0"]
    assert f"total {option.peak:,}" in shown
    assert np.isclose(option.memory["statistics"], 4 * job.costs.num_parameters)


def words_to_set(shown: str) -> list[str]:
    (line,) = [line for line in shown.splitlines() if line.startswith("set ")]
    return shlex.split(line)[1:]


def test_what_is_to_be_set_is_pasted_and_dry_run_without_a_launcher(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    spaced = "compare.seeds=[0, 1]"
    status, shown, _ = plan(capsys, "digits_hclt.yaml", spaced, "--nodes", "2")
    words = words_to_set(shown)
    assert status == 0 and spaced in words and "parallel.num_hosts=2" in words
    assert f"launch/torchrun.sh {CONFIGS / 'digits_hclt.yaml'} '{spaced}'" in shown
    run = ["run", str(CONFIGS / "digits_hclt.yaml"), *words, "--out", str(tmp_path / "run")]
    assert main([*run, "--dry-run"]) == 0
    dry = capsys.readouterr().out
    assert "ranks: 16 (node axis x data axis: 1 x 16, ZeRO 0)" in dry
    assert "machines: 2 of 8 ranks, as planned; no launcher started this" in dry
    # Nothing that this process alone could start.
    assert main(run) == 2
    refused = capsys.readouterr().err
    assert "parallel.num_hosts" in refused and "NNODES=2 NPROC=8" in refused
    assert not (tmp_path / "run").exists()


def test_a_teacher_with_smaller_batches_than_ranks_is_told_of(
    capsys: pytest.CaptureFixture[str],
) -> None:
    _, shown, _ = plan(capsys, "digits.yaml", "--nodes", "8")
    assert "teacher.mae.batch_size is 32: each of 64 ranks needs a sample" in shown
    _, shown, _ = plan(capsys, "digits.yaml", "--nodes", "4")
    assert "mae" not in shown


def test_fields_of_the_command_line_restrict_the_layouts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    few = ["--nodes", "2", "--gpus-per-node", "4"]
    status, shown, _ = plan(capsys, "digits_hclt.yaml", "parallel.zero_stage=2", *few)
    assert status == 0
    assert "considered only layouts with parallel.zero_stage=2" in shown
    assert "ZeRO 2  " in shown and not any(f"ZeRO {stage} " in shown for stage in (0, 1, 3))
    pinned = ["parallel.node_parallel=2", "finetune.micro_batch_size=5"]
    _, shown, _ = plan(capsys, "digits_hclt.yaml", *pinned, *few, "--json")
    values = json.loads(shown)
    assert {layout["node_axis"] for layout in values["layouts"]} == {2}
    assert {layout["micro_batch"] for layout in values["layouts"]} == {5}
    assert set(pinned) < set(values["set"]) and len(values["pinned"]) == 2
    _, shown, _ = plan(capsys, "digits_hclt.yaml", "parallel={zero_stage: 2}", *few)
    assert "considered only layouts with parallel.zero_stage=2" in shown
    # What the file says is only what a plan replaces.
    config = tmp_path / "sharded.yaml"
    text = (CONFIGS / "digits_hclt.yaml").read_text()
    config.write_text(f"{text}\nparallel: {{zero_stage: 2}}\n")
    assert yaml.safe_load(text).get("parallel") is None
    _, shown, _ = plan(capsys, str(config), *few)
    assert "considered only" not in shown and "ZeRO 0 " in shown
    for field, words in (
        ("parallel.node_parallel=3", "no layout of 8 ranks has parallel.node_parallel=3"),
        ("parallel.num_ranks=3", "two numbers of ranks"),
    ):
        status, _, error = plan(capsys, "digits_hclt.yaml", field, *few)
        assert status == 2 and words in error
    status, _, error = plan(
        capsys, "plan/hmm_131072.yaml", "parallel.node_parallel=1", "parallel.zero_stage=0"
    )
    assert status == 2
    assert "no layout with parallel.node_parallel=1 parallel.zero_stage=0 fits" in error


def test_what_is_offloaded_is_what_is_sharded() -> None:
    found = options(Job(sizes(), batch=64, offload=True), Cluster(1, 2, 10 * GIB))
    assert layouts(found) == {(1, 2, 1), (1, 2, 2), (1, 2, 3), (2, 1, 1)}


def test_ranks_that_share_cores_are_warned_of(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {0, 1})
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    warning = "32 ranks of 1 thread share 2 cores: they take turns"
    config = str(CONFIGS / "digits.yaml")
    run = ["run", config, "--out", str(tmp_path), "--dry-run"]
    assert main([*run, "parallel.num_ranks=32"]) == 0
    assert f"warning: {warning}" in capsys.readouterr().out
    assert main(run) == 0 and "warning" not in capsys.readouterr().out
    status, shown, _ = plan(capsys, "digits.yaml", "--nodes", "1", "--gpus-per-node", "32")
    assert status == 0 and f"warning    if this machine runs it: {warning}" in shown
    # Several machines are others.
    status, shown, _ = plan(capsys, "digits.yaml", "--nodes", "2", "--gpus-per-node", "32")
    assert status == 0 and "if this machine runs it" not in shown
