"""How time grows with variables, states and batch: three panels from a table of cases."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import Any

AXES = {"num_variables": "variables", "num_states": "states K", "batch": "batch"}


def draw(cases: list[dict[str, Any]], path: Path) -> None:
    """Write a picture of step times, both axes logarithmic; a line where two cases or more differ
    in one quantity alone."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, len(AXES), figsize=(13, 4), layout="constrained")
    for axis, panel in zip(AXES, panels, strict=True):
        for label, points in _lines(cases, axis).items():
            panel.loglog(*zip(*sorted(points), strict=True), "o-", label=label)
        panel.set_xlabel(AXES[axis])
        panel.set_ylabel("training step, ms")
        panel.grid(alpha=0.3, which="both")
        if panel.lines:
            panel.legend(fontsize=7)
    figure.savefig(path, dpi=120)


def _lines(cases: list[dict[str, Any]], axis: str) -> dict[str, list[tuple[float, float]]]:
    lines: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for case in cases:
        rest = [f"{AXES[key]} {case[key]}" for key in AXES if key != axis]
        label = ", ".join([case["structure"], *rest, case["dtype"]])
        lines[label].append((case[axis], case["step_ms"]))
        if case["peer_step_ms"] is not None:
            lines[f"{case['peer']}: {label}"].append((case[axis], case["peer_step_ms"]))
    return {label: points for label, points in lines.items() if len(points) > 1}
