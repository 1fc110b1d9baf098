"""A result: what a run or a comparison reported, and the conditions it was made under."""

from __future__ import annotations

import json
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

from distpc.errors import ArtifactError

FOLDER = Path("docs/results")
KINDS = ("run", "compare", "table")
KEPT = ("dataset", "seed", "num_parameters", "teacher", "latents", "versions")
"""Of a run's report, beside its figures."""


def add(repo: Path, name: str, folder: Path, *, title: str, command: str) -> Path:
    """Store the report of a finished run or comparison; the file that was written.

    Raises:
        ArtifactError: the folder holds no report.
    """
    report = folder / "report.json"
    if not report.is_file():
        raise ArtifactError(
            "nothing was reported there",
            where=str(report),
            found="no such file",
            fix="give the folder of a finished `distpc run` or `distpc compare`",
        )
    found = json.loads(report.read_text())
    kind = "compare" if "variants" in found else "run"
    facts = _comparison(found) if kind == "compare" else _run(found)
    content = {
        "kind": kind,
        "title": title,
        "command": command,
        "commit": _commit(repo),
        "machine": machine(),
        **facts,
    }
    path = repo / FOLDER / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=1) + "\n")
    return path


def load(repo: Path) -> dict[str, dict[str, Any]]:
    """All stored results by name.

    Raises:
        ArtifactError: a file that is none.
    """
    found = {}
    for path in sorted((repo / FOLDER).glob("*.json")):
        content = json.loads(path.read_text())
        if content.get("kind") not in KINDS or "command" not in content:
            raise ArtifactError(
                "a file among the results is none",
                where=str(path),
                found=f"kind {content.get('kind')!r}, keys {', '.join(content)}",
                expected=f"kind of {', '.join(KINDS)}, title, command, commit, machine",
                fix="make it with tools/results.py add",
            )
        found[path.stem] = content
    return found


def machine() -> dict[str, Any]:
    """The machine that this runs on."""
    cpu = Path("/proc/cpuinfo")
    names = [
        line.split(":")[1].strip()
        for line in (cpu.read_text().splitlines() if cpu.exists() else [])
        if line.startswith("model name")
    ]
    return {
        "cpu": names[0] if names else platform.processor(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
    }


def _run(report: dict[str, Any]) -> dict[str, Any]:
    stages = {name: stage["seconds"] for name, stage in report["stages"].items()}
    figures = {key: value for key, value in report.items() if key.split("_")[0] in _SPLITS}
    kept = {key: report[key] for key in KEPT if key in report}
    return {"seconds": sum(stages.values()), "stages": stages, **figures, **kept}


_SPLITS = ("train", "valid", "test")


def _comparison(report: dict[str, Any]) -> dict[str, Any]:
    rows = report["variants"]
    runs = [one for row in rows.values() if "chosen" not in row for one in row["seeds"].values()]
    return {
        "seconds": sum(run["training_seconds"] for run in runs),
        "seconds_are": "fine-tuning of all runs, one core each",
        **{key: report[key] for key in ("dataset", "seeds", "versions", "variants")},
    }


def _commit(repo: Path) -> str:
    done = subprocess.run(
        ["git", "describe", "--always", "--dirty", "--abbrev=10"],
        cwd=repo,
        capture_output=True,
        text=True,
        check=False,
    )
    return done.stdout.strip() or "unknown"
