"""docs/results.md, its plots, and the tables of README.md, from the stored results."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from distpc.errors import ConfigError
from distpc.pipeline.comparison.plot import draw_curves, draw_sizes
from distpc.pipeline.comparison.table import table_text
from results_page.store import FOLDER, load

PAGE = Path("docs/results.md")
README = Path("README.md")
MARKED = re.compile(r"(<!-- results: ([\w ,]+) -->\n).*?(<!-- end of results -->)", re.DOTALL)

Result = Mapping[str, Any]


def write(repo: Path) -> list[Path]:
    """Write both pages and the plots; the files that changed."""
    results = load(repo)
    changed = []
    for path, text in _pages(repo, results).items():
        if not path.exists() or path.read_text() != text:
            path.write_text(text)
            changed.append(path)
    for name, result in results.items():
        if result["kind"] == "compare":
            changed += _draw(repo, name, result)
    return changed


def differences(repo: Path) -> list[str]:
    """Lines of the pages that are not what the stored results say, as `file:line: text`."""
    wrong = []
    for path, text in _pages(repo, load(repo)).items():
        found = path.read_text().splitlines() if path.exists() else []
        expected = text.splitlines()
        length = max(len(found), len(expected))
        for number in range(length):
            ours = expected[number] if number < len(expected) else "(nothing)"
            theirs = found[number] if number < len(found) else "(nothing)"
            if ours != theirs:
                wrong.append(f"{path}:{number + 1}: {theirs!r}, but the results say {ours!r}")
    return wrong


def _pages(repo: Path, results: Mapping[str, Result]) -> dict[Path, str]:
    readme = repo / README
    return {repo / PAGE: _page(results), readme: _fill(readme.read_text(), results)}


def _fill(text: str, results: Mapping[str, Result]) -> str:
    def table(match: re.Match[str]) -> str:
        names = [name.strip() for name in match[2].split(",")]
        for name in names:
            if name not in results:
                raise ConfigError(
                    "README.md names a result that is not stored",
                    where=f"{README}, {match[1].strip()}",
                    found=name,
                    expected=f"of {', '.join(results)}",
                    fix="add it with tools/results.py add, or take the name out",
                )
        lines = [line for name in names for line in _rows(name, results[name])]
        return match[1] + "\n".join([*HEAD, *lines]) + "\n" + match[3]

    return MARKED.sub(table, text)


HEAD = ("| what | parameters | test | command |", "|---|---|---|---|")


def _rows(name: str, result: Result) -> Iterator[str]:
    caveat = _caveat(result)
    beside = f" ({caveat})" if caveat else ""
    if result["kind"] == "run":
        unit = _unit(result)
        yield (
            f"| {result['title']} | {result['num_parameters']:,} | "
            f"{result[f'test_{unit}']:.4f} {unit}{beside} | `{result['command']}` |"
        )
    elif result["kind"] == "compare":
        unit = _unit(next(iter(result["variants"].values())))
        for size in dict.fromkeys(row["size"] for row in result["variants"].values()):
            rows = [row for row in result["variants"].values() if row["size"] == size]
            best = [row for row in rows if "chosen" in row]
            shown = best + [row for row in rows if row["group"] is None and "chosen" not in row]
            figures = ", ".join(f"{row['variant']} {row[f'test_{unit}']:.4f}" for row in shown)
            at = "" if size is None else f", size {size}"
            yield (
                f"| {result['title']}{at} | {rows[0]['num_parameters']:,} | "
                f"{figures} {unit}{beside} | "
                f"[{name}]({PAGE}#{name}) |"
            )
    else:
        yield f"| {result['title']} | | {result['summary']} | [{name}]({PAGE}#{name}) |"


def _page(results: Mapping[str, Result]) -> str:
    parts = [
        "# Results\n",
        "Written by `tools/results.py render` from the files of `docs/results`; `tools/results.py "
        "--check` compares. Figures of comparisons are means over the seeds, `spread` is the "
        "largest minus the smallest; of a group of settings the one that is best on the "
        "validation split counts.\n",
    ]
    for name, result in results.items():
        machine = result["machine"]
        parts.append(f"## {name}\n\n{result['title']}.\n")
        parts.append(f"    {result['command']}\n")
        parts.append(_body(name, result))
        if result["kind"] == "run" and _caveat(result):
            parts.append(f"All figures are {_caveat(result)}.\n")
        where = f"{machine['cores']} cores of {machine['cpu']}, Python {machine['python']}"
        seconds = f"{result['seconds']:,.0f} s" if result.get("seconds") else "seconds not kept"
        what = f" ({result['seconds_are']})" if "seconds_are" in result else ""
        parts.append(f"{where}; {seconds}{what}; commit {result['commit']}.\n")
        if "note" in result:
            parts.append(f"{result['note']}\n")
    return "\n".join(parts)


def _body(name: str, result: Result) -> str:
    if result["kind"] == "run":
        shown = [key for key in result if key.split("_")[0] in ("train", "valid", "test")]
        numbers = [key for key in shown if isinstance(result[key], float)]
        figures = " | ".join(f"{result[key]:.4f}" for key in numbers)
        head = " | ".join(numbers)
        rule = "|".join(["---"] * (len(numbers) + 1))
        return f"| parameters | {head} |\n|{rule}|\n| {result['num_parameters']:,} | {figures} |\n"
    if result["kind"] == "compare":
        rows = result["variants"]
        unit = _unit(next(iter(rows.values())))
        pictures = [f"![{name}: {unit} over samples]({FOLDER.name}/{name}_curves.png)"]
        if any(row["size"] is not None for row in rows.values()):
            pictures.append(f"![{name}: {unit} over size]({FOLDER.name}/{name}_sizes.png)")
        return table_text(rows, unit, _caveat(result)) + "\n" + "\n".join(pictures) + "\n"
    lines = [result["columns"], ["---"] * len(result["columns"]), *result["rows"]]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines) + "\n"


def _draw(repo: Path, name: str, result: Result) -> list[Path]:
    rows = result["variants"]
    unit = _unit(next(iter(rows.values())))
    curves, sizes = (repo / FOLDER / f"{name}_{kind}.png" for kind in ("curves", "sizes"))
    draw_curves(rows, unit, curves, _caveat(result))
    if all(row["size"] is None for row in rows.values()):
        return [curves]
    draw_sizes(rows, unit, sizes, _caveat(result))
    return [curves, sizes]


def _caveat(result: Result) -> str:
    """What stands beside its figures; results that were stored before there was one have none."""
    return str(result.get("dataset", {}).get("caveat", ""))


def _unit(figures: Mapping[str, Any]) -> str:
    return next(key for key in figures if re.fullmatch(r"test_bp[dct]", key)).removeprefix("test_")
