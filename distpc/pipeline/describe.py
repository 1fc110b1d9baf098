"""What a run would do, and what it has done, as text."""

from __future__ import annotations

import json
import os
from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distpc.config import dump_config
from distpc.pipeline.sharing import where_finished
from distpc.pipeline.stages import OF_CIRCUIT

if TYPE_CHECKING:
    from distpc.config import RunConfig
    from distpc.config.schema import ParallelConfig
    from distpc.data.spec import DatasetSpec
    from distpc.pipeline.runner import Pipeline
    from distpc.structures.region_graph import RegionGraph

GIB = 2**30


def describe(pipeline: Pipeline, builds: Collection[str] | None = None) -> str:
    """The text of --dry-run: config, circuit, bytes per rank, stages and why they would run.

    Args:
        builds: names of the stages that are told of; the circuit where one of them makes it.
            Default: all.
    """
    builds = pipeline.built() if builds is None else builds
    from distpc.data.shards import source_spec

    config = pipeline.config
    spec = source_spec(config)
    data = f"data: {spec.name}, {spec.kind}, {spec.num_variables} variables"
    circuit = [] if set(OF_CIRCUIT).isdisjoint(builds) else _circuit(config, spec)
    lines = [dump_config(config).rstrip(), "", data, *circuit, "", "stages:"]
    for step in pipeline.steps():
        name = step.stage.name
        if name not in builds:
            continue
        verb = {"done": "skip", "not needed": "-", "interrupted": "continue"}.get(step.state, "run")
        reason = step.reason.splitlines()[0] if step.reason else step.state
        if step.state != "done" and (place := where_finished(config.artifacts, step)):
            verb, reason = "take", f"from {place}"
        lines.append(f"  {name:<10} {verb:<9} {reason}")
    lines.append(f"run folder: {pipeline.folder}")
    return "\n".join(lines)


def _circuit(config: RunConfig, spec: DatasetSpec) -> list[str]:
    from distpc.parallel.memory import share
    from distpc.parallel.mesh import check_node_axis, crowded
    from distpc.training.needs import layout_of, peak_bytes, planned_costs, state_copies
    from distpc.training.structure import sketch

    graph = sketch(config, spec)
    costs = planned_costs(config, graph, spec.num_categories)
    parallel, finetune = config.parallel, config.finetune
    check_node_axis(parallel.total_ranks, parallel.node_parallel)
    replicas = parallel.total_ranks // parallel.node_parallel
    layout = layout_of(
        costs,
        parallel.node_parallel,
        replicas,
        parallel.zero_stage,
        offload=parallel.offload,
    )
    local = share(finetune.batch_size, layout.data_axis)
    pieces = share(local, finetune.micro_batch_size)
    sizes = peak_bytes(
        costs,
        layout,
        micro_batch=share(local, pieces),
        num_micro_batches=pieces,
        state_copies=state_copies(config),
    )
    here = parallel.num_hosts == 1 and "RAY_ADDRESS" not in os.environ
    warning = crowded(parallel.num_ranks, parallel.threads_per_rank) if here else None
    return [
        f"circuit: {config.structure.kind}, {len(graph.regions)} regions, "
        f"{costs.num_parameters:,} parameters" + _networks(config, graph, spec),
        f"ranks: {parallel.total_ranks} (node axis x data axis: {layout.name}); bytes per rank: "
        + ", ".join(f"{name} {size:,}" for name, size in sizes.items() if size)
        + f", total {sum(sizes.values()):,}",
        *_machines(parallel),
        *([] if warning is None else [f"warning: {warning}"]),
    ]


def _machines(parallel: ParallelConfig) -> list[str]:
    """A line on several machines, which this process alone cannot start."""
    from distpc.parallel.mesh import launcher_name

    if parallel.num_hosts == 1:
        return []
    line = f"machines: {parallel.num_hosts} of {parallel.num_ranks} ranks"
    return [line if launcher_name() == "ray" else f"{line}, as planned; no launcher started this"]


def _networks(config: RunConfig, graph: RegionGraph, spec: DatasetSpec) -> str:
    """How many parameters the networks have that write the circuit's, if any do."""
    from distpc.training.integral import count_parameters

    if not config.integral.enabled:
        return ""
    return f", written by networks of {count_parameters(config, graph, spec):,}"


def summarize(report: dict[str, Any], folder: Path) -> str:
    """The closing lines of a run."""
    shown = ("_bpd", "_bpc", "_bpt", "_documents", "perplexity")
    figures = {key: value for key, value in report.items() if key.endswith(shown)}
    caveat = report["dataset"]["caveat"]
    beside = f"  {caveat}" if caveat else ""
    lines = [f"{key:<12} {value:.4f}{beside}" for key, value in sorted(figures.items()) if value]
    latents = report.get("latents")
    if latents:
        lines.append(f"latents      {json.dumps(latents)}")
    lines.append(f"report       {folder / 'report.json'}")
    lines.append(f"tensorboard  tensorboard --logdir {folder / 'tb'}")
    return "\n".join(lines)
