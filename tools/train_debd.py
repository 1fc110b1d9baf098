#!/usr/bin/env python3
"""Train HCLTs by online EM on binary data sets and print their mean test log-likelihoods.

    python tools/train_debd.py FOLDER [NAME ...] [--states K] [--epochs N] ...

FOLDER holds NAME.train.data.gz, NAME.valid.data.gz and NAME.test.data.gz: rows of 0 and 1,
separated by commas. The epoch is chosen on the validation split. Figures are nats a sample.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import numpy as np
import torch

import distpc
from distpc.circuits import Circuit
from distpc.structures import hclt

NAMES = ("nltcs", "plants", "bnetflix")


def read(folder: Path, name: str, split: str) -> np.ndarray:
    """One split of a data set, (N, V) zeros and ones."""
    return np.loadtxt(folder / f"{name}.{split}.data.gz", dtype=np.int64, delimiter=",")


def mean_log_likelihood(circuit: Circuit, x: np.ndarray) -> float:
    """Nats a sample."""
    parts = torch.from_numpy(x).split(512)
    with torch.no_grad():
        total = sum(float(circuit.log_prob(part).double().sum()) for part in parts)
    return total / len(x)


def train(folder: Path, name: str, settings: argparse.Namespace) -> dict[str, float]:
    """Learn the tree, train the circuit, and evaluate it; seconds cover tree and training."""
    splits = {split: read(folder, name, split) for split in ("train", "valid", "test")}
    start = time.perf_counter()
    graph = hclt(splits["train"], settings.states, num_categories=[2] * splits["train"].shape[1])
    circuit = Circuit(
        graph, [2] * graph.num_variables, seed=settings.seed, init_noise=settings.init_noise
    )
    history = distpc.fit(
        circuit,
        splits["train"],
        valid=splits["valid"],
        epochs=settings.epochs,
        batch_size=settings.batch_size,
        step_size=settings.step_size,
        final_step_size=settings.final_step_size,
        pseudocount=settings.pseudocount,
        leaf_pseudocount=settings.leaf_pseudocount,
        seed=settings.seed,
        progress=False,
    )
    seconds = time.perf_counter() - start
    best = min(history, key=lambda row: row["valid_bits"])
    return {
        "best_epoch": best["epoch"],
        "seconds": seconds,
        "valid": mean_log_likelihood(circuit, splits["valid"]),
        "test": mean_log_likelihood(circuit, splits["test"]),
    }


def parser() -> argparse.ArgumentParser:
    """Settings; the defaults are one recipe for the three data sets."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("names", nargs="*", default=NAMES)
    parser.add_argument("--states", type=int, default=96)
    parser.add_argument("--epochs", type=int, default=24)
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--step-size", type=float, default=0.4)
    parser.add_argument("--final-step-size", type=float, default=0.02)
    parser.add_argument("--pseudocount", type=float, default=0.1)
    parser.add_argument("--leaf-pseudocount", type=float, default=0.1)
    parser.add_argument("--init-noise", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=0)
    return parser


def main() -> None:
    """Train each data set and print a table."""
    settings = parser().parse_args()
    print(
        f"{'data set':<12}{'K':>5}{'epochs':>8}{'best':>6}{'seconds':>9}{'valid':>10}{'test':>10}"
    )
    for name in settings.names:
        row = train(settings.folder, name, settings)
        print(
            f"{name:<12}{settings.states:>5}{settings.epochs:>8}{row['best_epoch']:>6.0f}"
            f"{row['seconds']:>9.1f}{row['valid']:>10.4f}{row['test']:>10.4f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
