"""What came out of a comparison: one row a variant and size, over its seeds."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from statistics import mean
from typing import Any

from distpc.artifacts import Artifact, read_json
from distpc.circuits.io import load_model
from distpc.circuits.transforms import count_dead
from distpc.errors import TrainingError
from distpc.pipeline.comparison.variants import Run


def facts_of(run: Run, charged: int) -> dict[str, Any]:
    """Figures of one finished run.

    Args:
        run: finished.
        charged: visits that its distillation was charged.
    """
    report = read_json(run.folder / "report.json")
    training = Artifact.open(run.folder / "finetune").metadata
    unit = unit_of(report)
    circuit = load_model(run.folder / "model")
    dead, states = count_dead(circuit)
    curve = [[samples + charged, bits] for samples, bits in training["curve"]]
    # A likelihood of the teacher's own: exact of language models, of autoencoders a bound, the bits
    # of their codes included.
    own = (report["teacher"] or {}).get(f"valid_{unit}")
    return {
        **({} if own is None else {f"teacher_valid_{unit}": own}),
        f"test_{unit}": report[f"test_{unit}"],
        f"valid_{unit}": report[f"valid_{unit}"],
        "num_parameters": report["num_parameters"],
        "num_visits": curve[-1][0],
        "distillation_visits": charged,
        "dead_states": dead,
        "num_states": states,
        "training_seconds": report["stages"]["finetune"]["seconds"],
        "curve": curve,
    }


def unit_of(report: Mapping[str, Any]) -> str:
    """bpd, bpc or bpt."""
    return next(key.removeprefix("test_") for key in report if key.startswith("test_"))


def rows_of(runs: Sequence[Run], facts: Sequence[dict[str, Any]], batch: int) -> dict[str, Any]:
    """{row: figures}: of every variant and size, then of the best of each group.

    Figures are means over the seeds; `spread` is the largest minus the smallest.

    Args:
        runs: all of them.
        facts: of each, see `facts_of`.
        batch: samples by which budgets may differ: training goes by whole batches.

    Raises:
        TrainingError: variants of a size differ in parameters, or in visits by more than a batch.
    """
    unit = next(key.removeprefix("test_") for key in facts[0] if key.startswith("test_"))
    _check_equal(runs, facts, batch)
    gathered: dict[tuple[str, int | None], dict[int, dict[str, Any]]] = defaultdict(dict)
    for run, found in zip(runs, facts, strict=True):
        gathered[run.variant, run.size][run.seed] = found
    groups = {run.variant: run.group for run in runs}
    rows = {
        _name(variant, size): {**_summary(seeds, unit), "group": groups[variant], "size": size,
                               "variant": variant}
        for (variant, size), seeds in gathered.items()
    }  # fmt: skip
    for group in dict.fromkeys(name for name in groups.values() if name):
        for size in dict.fromkeys(run.size for run in runs):
            members = [r for r in rows.values() if (r["group"], r["size"]) == (group, size)]
            best = min(members, key=lambda row: float(row[f"valid_{unit}"]))
            rows[_name(f"{group} (best)", size)] = {
                **best, "group": None, "variant": f"{group} (best)", "chosen": best["variant"]
            }  # fmt: skip
    return rows


def table_text(rows: Mapping[str, Mapping[str, Any]], unit: str, caveat: str = "") -> str:
    """The rows as a Markdown table, the best first within each size.

    Args:
        rows: of `rows_of`.
        unit: of the figures.
        caveat: of the data, see `DatasetSpec`; it stands below the table.
    """
    titles = ["variant", f"test {unit}", "spread", f"valid {unit}", "parameters", "visits",
              "distilled on", "dead states", "training s"]  # fmt: skip
    own = f"teacher_valid_{unit}"
    has_own = any(own in row for row in rows.values())
    titles += [f"the teacher's own valid {unit}"] if has_own else []
    lines = [titles, ["---"] * len(titles)]
    order = sorted(rows.items(), key=lambda row: (row[1]["size"] or 0, row[1][f"test_{unit}"]))
    for name, row in order:
        chosen = f": {row['chosen']}" if "chosen" in row else ""
        lines.append([
            name + chosen, f"{row[f'test_{unit}']:.4f}", f"{row['spread']:.4f}",
            f"{row[f'valid_{unit}']:.4f}", f"{row['num_parameters']:,}", f"{row['num_visits']:,}",
            f"{row['distillation_visits']:,}", f"{row['dead_states']:g} of {row['num_states']}",
            f"{row['training_seconds']:.0f}",
            *([f"{row[own]:.4f}" if own in row else ""] if has_own else []),
        ])  # fmt: skip
    widths = [max(len(line[column]) for line in lines) for column in range(len(titles))]
    padded = [
        " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True))
        for line in lines
    ]
    below = [f"\nAll figures are {caveat}."] if caveat else []
    return "\n".join([*(f"| {line} |" for line in padded), *below]) + "\n"


def _name(variant: str, size: int | None) -> str:
    return variant if size is None else f"{variant}@{size}"


def _summary(seeds: Mapping[int, Mapping[str, Any]], unit: str) -> dict[str, Any]:
    found = list(seeds.values())
    test = [one[f"test_{unit}"] for one in found]
    means = {
        key: mean(one[key] for one in found)
        for key in (f"test_{unit}", f"valid_{unit}", "dead_states", "training_seconds")
    }
    same = {
        key: found[0][key]
        for key in ("num_parameters", "num_visits", "distillation_visits", "num_states")
    }
    own = f"teacher_valid_{unit}"
    if own in found[0]:
        means[own] = mean(one[own] for one in found)
    return {**means, "spread": max(test) - min(test), **same, "seeds": dict(seeds)}


def _check_equal(runs: Sequence[Run], facts: Sequence[dict[str, Any]], batch: int) -> None:
    first: dict[int | None, tuple[Run, dict[str, Any]]] = {}
    for run, found in zip(runs, facts, strict=True):
        other, expected = first.setdefault(run.size, (run, found))
        parameters = found["num_parameters"], expected["num_parameters"]
        visits = found["num_visits"], expected["num_visits"]
        if parameters[0] != parameters[1] or abs(visits[0] - visits[1]) > batch:
            raise TrainingError(
                "runs of a comparison differ in parameters or visits: there is nothing to compare",
                where=f"{run.name} and {other.name}",
                found=f"{parameters[0]:,} parameters, {visits[0]:,} visits",
                expected=f"{parameters[1]:,} parameters, {visits[1]:,} visits (within a batch)",
            )
