"""`distpc plan`: from a config and a cluster to a table of layouts and a choice."""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from distpc.config import RunConfig, load_config
from distpc.config.sources import SizesSource
from distpc.data.shards import colored, source_spec
from distpc.data.spec import DatasetSpec
from distpc.errors import ConfigError
from distpc.parallel.memory import Layout
from distpc.parallel.mesh import crowded
from distpc.parallel.progress import in_bytes
from distpc.pipeline.plan import (
    Cluster,
    Job,
    Option,
    Pinned,
    choose,
    in_words,
    options,
    reason,
)
from distpc.training.needs import host_bytes, planned_costs, state_copies
from distpc.training.rules import RULES, needs_whole_rows
from distpc.training.structure import sketch

_SHOWN = 12
"""Rows of the table."""


def plan_command(
    path: Path,
    overrides: Sequence[str],
    cluster: Cluster,
    *,
    as_json: bool = False,
) -> str:
    """What `distpc plan` prints.

    Args:
        path: of the run's config; its data need not exist where the source is `sizes`.
        overrides: `section.field=value` of the command line. Those of the layout restrict it,
            while what the config file says of the layout is what a plan is to replace.
        cluster: to plan for.
        as_json: print JSON instead of a table.

    Raises:
        ResourceError: no layout fits.
        ConfigError, DataError: of the config.
    """
    config = load_config(path, overrides)
    pinned = _pinned(config, overrides, cluster)
    job = job_of(config)
    found = options(job, cluster, pinned)
    chosen = choose(found, cluster, pinned)
    words = _words(overrides, cluster, chosen, pinned)
    if as_json:
        values = _values(config, job, cluster, found, chosen)
        return json.dumps({**values, "pinned": pinned.to_json(), "set": words}, indent=2)
    lines = _lines(config, job, cluster, found, chosen)
    if str(pinned):
        lines.insert(2, f"considered only layouts with {pinned}")
    lines.append(f"set        {shlex.join(words)}")
    # Sizes alone cannot be trained on.
    if not isinstance(config.data.source, SizesSource):
        lines += _start(path, words, cluster)
        lines += _teacher_warning(config, cluster)
    # Several machines cannot be this one.
    warning = crowded(cluster.gpus_per_host, config.parallel.threads_per_rank)
    if cluster.hosts == 1 and warning is not None:
        lines.append(f"warning    if this machine runs it: {warning}")
    return "\n".join(lines)


def _pinned(config: RunConfig, overrides: Sequence[str], cluster: Cluster) -> Pinned:
    """What the command line says of the layout.

    Raises:
        ConfigError: it names other ranks than the cluster has.
    """
    given = _given(overrides)
    parallel = config.parallel
    for field, found, expected, option in (
        ("num_hosts", parallel.num_hosts, cluster.hosts, "--nodes"),
        ("num_ranks", parallel.num_ranks, cluster.gpus_per_host, "--gpus-per-node"),
    ):
        if f"parallel.{field}" in given and found != expected:
            raise ConfigError(
                "the command line names two numbers of ranks",
                where=f"parallel.{field}",
                found=found,
                expected=f"{expected}, of {option}",
                fix="leave the field out: a plan is for the ranks of --nodes and --gpus-per-node",
            )
    values = parallel.node_parallel, parallel.zero_stage, config.finetune.micro_batch_size
    pairs = zip(Pinned.FIELDS.items(), values, strict=True)
    return Pinned(**{name: value for (name, field), value in pairs if field in given})


def _given(overrides: Sequence[str]) -> set[str]:
    """Names of the fields that the command line has, those in whole sections too."""
    given = set()
    for override in overrides:
        name, _, text = override.partition("=")
        given.add(name.strip())
        if isinstance(value := yaml.safe_load(text), dict):
            given |= {f"{name.strip()}.{key}" for key in value}
    return given


def _words(overrides: Sequence[str], cluster: Cluster, chosen: Option, pinned: Pinned) -> list[str]:
    """The command line's fields, and those of the layout: what a run is to be given."""
    layout = chosen.layout
    fields = {
        "parallel.num_hosts": cluster.hosts,
        "parallel.num_ranks": cluster.gpus_per_host,
        "parallel.node_parallel": layout.node_axis,
        "parallel.zero_stage": layout.zero_stage,
        "finetune.micro_batch_size": pinned.micro_batch or chosen.micro_batch,
    }
    others = [word for word in overrides if word.partition("=")[0].strip() not in fields]
    return [*others, *(f"{name}={value}" for name, value in fields.items())]


def _start(path: Path, words: Sequence[str], cluster: Cluster) -> list[str]:
    """A command that trains as planned."""
    arguments = shlex.join([str(path), *words])
    if cluster.hosts == 1:
        return [f"run        distpc run {arguments}"]
    return [
        f"run        NNODES={cluster.hosts} NPROC={cluster.gpus_per_host} RDZV=HOST:29400 "
        f"launch/torchrun.sh {arguments} --out FOLDER",
        "           on each machine; HOST is the first of them, and all see FOLDER",
    ]


def _teacher_warning(config: RunConfig, cluster: Cluster) -> list[str]:
    """What keeps the ranks from training the teacher, which the plan is not for."""
    training = config.teacher.training
    if training is None or training.batch_size >= cluster.num_ranks:
        return []
    return [
        f"warning    a run is refused while teacher.{config.teacher.kind}.batch_size is "
        f"{training.batch_size}: each of {cluster.num_ranks} ranks needs a sample; raise it"
    ]


def job_of(config: RunConfig) -> Job:
    """What a config trains, from its structure's sizes alone.

    Raises:
        ConfigError, DataError: the structure does not fit the data, or the data are missing.
    """
    spec = planned_spec(config)
    graph = sketch(config, spec)
    return Job(
        costs=planned_costs(config, graph, spec.num_categories),
        batch=config.finetune.batch_size,
        state_copies=state_copies(config),
        needs_whole_rows=needs_whole_rows(config.finetune.rule, spec.num_categories),
        needs_whole_circuit=config.finetune.rule == "anemone",
        offload=config.parallel.offload,
    )


def planned_spec(config: RunConfig) -> DatasetSpec:
    """The shape of a config's samples; a source of kind sizes states it without any data."""
    source = config.data.source
    if not isinstance(source, SizesSource):
        return source_spec(config)
    count = source.num_variables
    shape = source.image_shape
    if shape is not None:
        count = shape[0] * shape[1] * shape[2]
    spec = DatasetSpec(
        name=config.name,
        kind="array" if shape is None else "image",
        num_variables=count,
        num_categories=(source.num_categories,) * count,
        image_shape=shape,
    )
    return colored(spec, config.data.color)


def _lines(
    config: RunConfig, job: Job, cluster: Cluster, found: list[Option], chosen: Option
) -> list[str]:
    layout = chosen.layout
    lines = [
        f"circuit    {config.structure.kind}, {job.costs.num_parameters:,} parameters "
        f"({in_bytes(4 * job.costs.num_parameters)}), "
        f"{_tera(_operations(job))} TFLOP a step "
        f"of {job.batch:,} samples",
        f"cluster    {cluster.hosts} x {cluster.gpus_per_host} devices, "
        f"{in_bytes(cluster.memory_bytes)} usable each, {cluster.device_tflops:g} TFLOP/s, "
        f"links {cluster.link_gbps:g} Gb/s ({cluster.host_link_gbps:g} within a host)",
        "",
        *_table(found, chosen),
        "",
        f"take       {layout.name} (node axis x data axis), micro-batch {chosen.micro_batch}",
        f"why        {reason(chosen, found)}",
        f"memory     {in_bytes(chosen.peak)} a rank at its peak: {in_words(chosen.memory)}",
    ]
    first, other = (_host_bytes(config, job, layout, shows=shows) for shows in (True, False))
    machine = first + (cluster.gpus_per_host - 1) * other
    lines.append(
        f"host       {in_bytes(other)} a rank to make its share of the circuit, "
        f"{in_bytes(first)} rank 0, which shows figures; {in_bytes(machine)} its machine"
    )
    return lines


def _host_bytes(config: RunConfig, job: Job, layout: Layout, *, shows: bool) -> int:
    """Of a rank that shows figures of the whole circuit, or of any other."""
    return host_bytes(
        job.costs,
        layout,
        keeps_statistics=RULES[config.finetune.rule].keeps_statistics,
        whole_circuit_bytes=config.parallel.whole_circuit_gib * 2**30 * shows,
    )


def _table(found: list[Option], chosen: Option) -> list[str]:
    head = ("layout", "micro", "a rank", "sent", "links", "compute", "step", "")
    rows = [head]
    # Replicas alone in any case, and the best of the others.
    shown = [option for option in found if option.layout.node_axis == 1]
    shown += [option for option in found if option.layout.node_axis > 1][: _SHOWN - len(shown)]
    for option in sorted(shown, key=found.index):
        notes = ["taken"] if option is chosen else []
        if not option.fits:
            notes.append("does not fit")
        rows.append(
            (
                option.layout.name,
                f"{option.micro_batch:,}",
                in_bytes(option.peak),
                in_bytes(option.sent),
                _time(option.link_seconds),
                _time(option.compute_seconds),
                _time(option.seconds),
                ", ".join(notes),
            )
        )
    widths = [max(len(row[column]) for row in rows) for column in range(len(head))]
    lines = []
    for row in rows:
        cells = [row[0].ljust(widths[0])]
        cells += [cell.rjust(width) for cell, width in zip(row[1:-1], widths[1:-1], strict=True)]
        lines.append("  ".join([*cells, row[-1]]).rstrip())
    left_out = len(found) - (len(rows) - 1)
    return lines if not left_out else [*lines, f"({left_out} more: --json)"]


def _operations(job: Job) -> int:
    """Of a step, messages that are computed twice (recompute_messages) included."""
    return 2 * job.costs.num_passes * job.costs.multiply_adds * job.batch


def _tera(amount: float) -> str:
    tera = amount / 1e12
    return f"{tera:,.0f}" if tera >= 10 else f"{tera:.2g}"


def _time(seconds: float) -> str:
    if seconds >= 1:
        return f"{seconds:,.2f} s"
    return f"{seconds * 1e3:.3g} ms" if seconds >= 1e-3 else f"{seconds * 1e6:.3g} us"


def _values(
    config: RunConfig, job: Job, cluster: Cluster, found: list[Option], chosen: Option
) -> dict[str, Any]:
    return {
        "config": config.name,
        "num_parameters": job.costs.num_parameters,
        "batch": job.batch,
        "host_bytes_per_rank": _host_bytes(config, job, chosen.layout, shows=False),
        "host_bytes_of_rank_0": _host_bytes(config, job, chosen.layout, shows=True),
        "flop_per_step": _operations(job),
        "cluster": {
            "nodes": cluster.hosts,
            "gpus_per_node": cluster.gpus_per_host,
            "usable_bytes": cluster.memory_bytes,
            "link_gbps": cluster.link_gbps,
            "node_link_gbps": cluster.host_link_gbps,
            "latency_us": cluster.latency_us,
            "device_tflops": cluster.device_tflops,
        },
        "chosen": chosen.to_json(),
        "why": reason(chosen, found),
        "layouts": [option.to_json() for option in found],
    }
