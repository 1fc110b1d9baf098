"""Pictures of a comparison: bits over visits, and bits over size."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from pathlib import Path
from statistics import mean
from typing import Any

from distpc.errors import ResourceError


def check_plotting() -> None:
    """Refuse to start what could not be drawn in the end.

    Raises:
        ResourceError: matplotlib is not installed.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise ResourceError(
            "plots need a package that is not installed",
            where="distpc compare",
            found="no matplotlib",
            fix="pip install 'distpc[plots]'",
        )


def draw_curves(
    rows: Mapping[str, Mapping[str, Any]], unit: str, out: Path, caveat: str = ""
) -> None:
    """Validation bits of every row over training samples passed, a panel a size, to a PNG."""
    pyplot = _pyplot()
    sizes = list(dict.fromkeys(row["size"] for row in rows.values()))
    figure, panels = pyplot.subplots(
        1, len(sizes), figsize=(6.5 * len(sizes), 4.5), squeeze=False, layout="constrained"
    )
    for panel, size in zip(panels[0], sizes, strict=True):
        panel.set_prop_cycle(_looks(pyplot))
        shown = {name: row for name, row in rows.items() if row["size"] == size}
        lowest = min(bits for row in shown.values() for _, bits in _mean_curve(row))
        highest = max(row[f"valid_{unit}"] for row in shown.values())
        for row in shown.values():
            if "chosen" in row:
                continue
            curve = _mean_curve(row)
            panel.plot(*zip(*curve, strict=True), markersize=4, label=row["variant"])
        # What lies far above the final figures is the first steps, which tell nothing.
        panel.set_ylim(lowest - 0.02, highest + 4 * (highest - lowest) + 0.02)
        panel.set_xlabel("training samples passed (those of distillation included)")
        panel.set_ylabel(f"validation {unit}")
        panel.set_title("" if size is None else f"size {size}")
        panel.grid(alpha=0.3)
        panel.legend(fontsize="small")
    _write(figure, out, caveat)
    pyplot.close(figure)


def draw_sizes(
    rows: Mapping[str, Mapping[str, Any]], unit: str, out: Path, caveat: str = ""
) -> None:
    """Test bits of every variant over size, with the range of the seeds, to a PNG."""
    pyplot = _pyplot()
    figure, panel = pyplot.subplots(figsize=(6.5, 4.5), layout="constrained")
    panel.set_prop_cycle(_looks(pyplot))
    for variant in dict.fromkeys(row["variant"] for row in rows.values()):
        own = sorted(
            (row for row in rows.values() if row["variant"] == variant), key=lambda r: r["size"]
        )
        sizes = [row["size"] for row in own]
        seeds = [[one[f"test_{unit}"] for one in row["seeds"].values()] for row in own]
        means = [mean(values) for values in seeds]
        down = [m - min(values) for m, values in zip(means, seeds, strict=True)]
        up = [max(values) - m for m, values in zip(means, seeds, strict=True)]
        is_best = any("chosen" in row for row in own)
        panel.errorbar(
            sizes, means, yerr=[down, up], capsize=3, label=variant,
            linestyle="--" if is_best else "-",
        )  # fmt: skip
    panel.set_xscale("log", base=2)
    panel.set_xticks(sizes, [str(size) for size in sizes])
    panel.set_xlabel("states of a latent")
    panel.set_ylabel(f"test {unit}")
    panel.grid(alpha=0.3)
    panel.legend(fontsize="small")
    _write(figure, out, caveat)
    pyplot.close(figure)


def _write(figure: Any, out: Path, caveat: str) -> None:
    if caveat:
        figure.suptitle(f"All figures are {caveat}.", fontsize="small")
    figure.savefig(out, dpi=110)


def _mean_curve(row: Mapping[str, Any]) -> list[tuple[float, float]]:
    """Mean over seeds of the bits at each validation; all seeds validate at the same visits."""
    curves = [one["curve"] for one in row["seeds"].values()]
    return [(points[0][0], mean(p[1] for p in points)) for points in zip(*curves, strict=False)]


def _looks(pyplot: Any) -> Any:
    """Colours, and another marker when they begin again: more variants than matplotlib's ten."""
    from cycler import cycler

    return cycler(marker=["o", "s", "^"]) * cycler(color=pyplot.get_cmap("tab10").colors)


def _pyplot() -> Any:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot
