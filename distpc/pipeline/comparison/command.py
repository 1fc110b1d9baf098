"""`distpc compare`: plan the runs, make them, write the table, report.json and the plots."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from distpc.artifacts import Artifact, RunLock, read_json, write_bytes, write_json
from distpc.config import RunConfig
from distpc.errors import ConfigError
from distpc.inference.report import versions
from distpc.parallel.cluster import Cluster
from distpc.parallel.mesh import is_rank, launcher_name
from distpc.pipeline.comparison.budget import with_budget
from distpc.pipeline.comparison.plot import check_plotting, draw_curves, draw_sizes
from distpc.pipeline.comparison.schedule import Scheduler, is_finished
from distpc.pipeline.comparison.table import facts_of, rows_of, table_text, unit_of
from distpc.pipeline.comparison.variants import Run, plan_runs

SHARED = ("teacher", "features", "structure")
"""Stages of which several runs need the same one, beside the data's."""


def compare(config: RunConfig, folder: Path) -> dict[str, Any]:
    """Train every variant on the same budget and report.

    Writes `report.json`, `table.md`, `curves.png` and, for several sizes, `sizes.png` into
    `folder`, beside the runs themselves under `runs/`.

    Args:
        config: with the section `compare`.
        folder: of the comparison.

    Returns:
        What report.json holds.

    Raises:
        ConfigError: variants that differ in circuit, data or budget.
        TrainingError: runs failed; the finished ones are kept for the next call.
    """
    if is_rank():
        raise ConfigError(
            "a comparison starts its own ranks",
            where="distpc compare",
            found=f"started by {launcher_name()}",
            fix="start it alone; with RAY_ADDRESS set its runs spread over that Ray cluster",
        )
    check_plotting()
    folder = folder.absolute()
    runs = plan_runs(config, folder)
    with RunLock(folder), Cluster.session():
        scheduler = Scheduler(folder, config.compare.num_parallel)
        for stage in ("shards", "index"):
            scheduler.share(runs, stage)
        index = runs[0].folder / "index"
        planned = [with_budget(run, index, config.compare.num_visits) for run in runs]
        runs = [run for run, _ in planned]
        for stage in SHARED:
            scheduler.share(runs, stage)
        scheduler.finish(runs)
        facts = [facts_of(run, charged) for run, charged in planned]
        return _report(config, folder, runs, facts)


def describe_runs(config: RunConfig, folder: Path) -> str:
    """The text of --dry-run: every run, and whether it is done.

    Raises:
        ConfigError: variants that differ in circuit, data or budget.
    """
    runs = plan_runs(config, folder.absolute())
    index, lines = runs[0].folder / "index", []
    # Without an index of the samples nothing is done.
    has_index = Artifact.find(index) is not None
    for run in runs:
        done = has_index and is_finished(with_budget(run, index, config.compare.num_visits)[0])
        state = "done" if done else "to run"
        lines.append(f"  {state:<7} {run.name:<40} {run.folder}")
    return "\n".join([f"{len(runs)} runs:", *lines])


def _report(
    config: RunConfig, folder: Path, runs: list[Run], facts: list[dict[str, Any]]
) -> dict[str, Any]:
    batch = max(run.config.finetune.batch_size for run in runs)
    rows = rows_of(runs, facts, batch)
    first = read_json(runs[0].folder / "report.json")
    unit = unit_of(first)
    report = {
        "config": config.model_dump(mode="json"),
        "dataset": first["dataset"],
        "seeds": config.compare.seeds,
        "variants": rows,
        "versions": versions(),
    }
    caveat = first["dataset"]["caveat"]
    write_bytes(folder / "table.md", table_text(rows, unit, caveat).encode())
    draw_curves(rows, unit, folder / "curves.png", caveat)
    if config.compare.sizes:
        draw_sizes(rows, unit, folder / "sizes.png", caveat)
    write_json(folder / "report.json", report)
    return report
