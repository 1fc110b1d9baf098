#!/usr/bin/env python3
"""One integral circuit at several numbers of states, against circuits of the same structure.

    python tools/integral_table.py configs/mnist7_integral.yaml [section.field=value ...]

trains the config's networks once and evaluates the circuits that they write for each number of
states; then trains ordinary circuits of the same structure, with the same data and splits, by tuned
online EM and by Adam on logits, one for each number of states and with --epochs passes; the report
has passes and seconds of each. Every run is an ordinary `distpc run` in a folder of its own under
--out: the same command goes on where it was interrupted. Writes table.md and report.json there.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path
from typing import Any

from distpc.artifacts.files import read_json, write_bytes, write_json
from distpc.config import load_config
from distpc.inference.report import versions

FIRST = "integral"
RULES = {
    "em": {
        "rule": "online_em",
        "batch_size": 512,
        "micro_batch_size": 512,
        "step_size": 0.4,
        "final_step_size": 0.008,
        "schedule": "linear",
        "leaf_width": 8,
    },
    "adam": {
        "rule": "adam",
        "batch_size": 256,
        "micro_batch_size": 256,
        "step_size": 0.01,
        "final_step_size": 0.0005,
        "schedule": "cosine",
    },
}
"""EM with the settings of configs/mnist_hclt_lvd.yaml; Adam with the literature's rate."""


def main() -> None:
    """Train what is missing, then write the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("config", type=Path, help="with integral.enabled and evaluate_states")
    parser.add_argument("overrides", nargs="*", default=[], help="of all runs")
    parser.add_argument("--out", type=Path, help="folder (default: runs/NAME_table)")
    parser.add_argument(
        "--states", type=int, nargs="*", help="of the ordinary circuits (default: as evaluated)"
    )
    parser.add_argument("--only", help="make runs whose name starts so, and no table")
    parser.add_argument(
        "--table", action="store_true", help="train nothing: the table of the runs that are done"
    )
    parser.add_argument(
        "--epochs", type=int, default=5, help="passes of the ordinary circuits (default 5)"
    )
    options = parser.parse_args()
    config = load_config(options.config, options.overrides)
    folder = options.out or Path("runs") / f"{config.name}_table"
    evaluated = sorted({config.structure.num_states, *config.integral.evaluate_states})
    runs: dict[str, list[str]] = {FIRST: []}
    for rule, settings in RULES.items():
        for states in options.states or evaluated:
            runs[f"{rule}_{states}"] = [
                "integral.enabled=false",
                f"structure.num_states={states}",
                f"finetune.num_epochs={options.epochs}",
                *(f"finetune.{field}={value}" for field, value in settings.items()),
            ]
    for name, changes in runs.items():
        if not options.table and name.startswith(options.only or ""):
            train(options.config, [*options.overrides, *changes], folder, name)
    if options.only is None:
        done = [name for name in runs if (folder / name / "report.json").is_file()]
        report = gather(folder, done)
        write_json(folder / "report.json", report)
        write_bytes(folder / "table.md", table(report).encode())
        print(table(report))


def train(config: Path, overrides: list[str], folder: Path, name: str) -> None:
    """One run, with the shards of the first."""
    out = str(folder / name)
    command = [sys.executable, "-m", "distpc", "run", str(config), *overrides, "--out", out]
    if name != FIRST and (folder / FIRST).is_dir():
        command += ["--reuse", str(folder / FIRST)]
    print("$ distpc", " ".join(command[3:]), flush=True)
    subprocess.run(command, check=True)


def gather(folder: Path, names: list[str]) -> dict[str, Any]:
    """What report.json holds: a row a circuit."""
    rows = []
    for name in names:
        report = read_json(folder / name / "report.json")
        training = read_json(folder / name / "finetune" / "training.json")
        shared = {
            "trainable_parameters": training["num_parameters"],
            "finetune_seconds": report["stages"]["finetune"]["seconds"],
            "epochs": training["epochs"],
        }
        if name == FIRST:
            for states, figures in report["integral"]["states"].items():
                rows.append(
                    {
                        "training": name,
                        "num_states": int(states),
                        "circuit_parameters": figures["num_parameters"],
                        "test_bpd": figures["bits"],
                        **shared,
                    }
                )
            continue
        rule, states = name.split("_")
        rows.append(
            {
                "training": rule,
                "num_states": int(states),
                "circuit_parameters": report["num_parameters"],
                "test_bpd": report["test_bpd"],
                **shared,
            }
        )
    first = read_json(folder / names[0] / "report.json")
    return {
        "config": first["config"],
        "dataset": first["dataset"],
        "rows": rows,
        "versions": versions(),
    }


def table(report: dict[str, Any]) -> str:
    """The rows as Markdown."""
    lines = [
        "| training | states | circuit parameters | trainable | passes | test bpd | seconds |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in report["rows"]:
        lines.append(
            f"| {row['training']} | {row['num_states']} | {row['circuit_parameters']:,} | "
            f"{row['trainable_parameters']:,} | {row['epochs']:.0f} | {row['test_bpd']:.4f} | "
            f"{row['finetune_seconds']:.0f} |"
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
