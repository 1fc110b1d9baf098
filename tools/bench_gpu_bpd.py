#!/usr/bin/env python
"""Seconds to a given likelihood: distpc against PyJuice on MNIST, Fashion-MNIST, CIFAR patches.

    python tools/get_data.py mnist; python tools/get_data.py fashion_mnist
    python tools/bench_gpu_bpd.py --make bpd.npz --cifar FOLDER      once, on any machine
    python tools/bench_gpu_bpd.py --data bpd.npz --json bpd.json --plot bpd.png

Each data set: one HCLT, one start, one batch size on both sides; ours by online EM, PyJuice by its
Anemone (step size from its default .4 down to .04) and by mini-batch EM with its tutorial's
schedule. Schedules are stretched over the time given, the same for all. The clock runs in training
steps alone; what compiling took is told apart.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from circuit_bench import bpd_data, gpu_turn
from circuit_bench.cases import outline
from circuit_bench.gpu_clock import at_most, free
from circuit_bench.gpu_table import machine
from circuit_bench.race import Racer, geometric, linear, race, seconds_to, tutorial
from torch import Tensor

from distpc.circuits.circuit import Circuit
from distpc.structures.hclt import hclt_graph

NUM_STATES = {"mnist": 256, "fashion_mnist": 256, "cifar": 256}
SETTINGS = {
    "mnist": (0.1, 1.0, 0.4, 0.008),
    "fashion_mnist": (0.1, 1.0, 0.4, 0.008),
    "cifar": (10.0, 25.6, 0.3, 0.01),
}
"""Of ours: samples' worth of smoothing in a sum row and in an input row, first and last step size,
as in configs/ (without smoothing over neighbouring values, which PyJuice has not)."""
PEERS = {
    "Anemone": ({"step_size": 0.4, "momentum": 0.9, "pseudocount": 1e-6}, linear(0.4, 0.04)),
    "MiniBatchEM": ({"step_size": 0.1, "pseudocount": 0.1}, tutorial),
}
MARGINS = (0.0, 0.02, 0.05, 0.1, 0.2)
"""Targets: PyJuice's best bits, and these above it."""


Prepared = dict[str, Any]
"""PyJuice's compiled structures by data set, or why there is none."""


def prepare(sets: dict[str, bpd_data.Set], options: argparse.Namespace) -> Prepared:
    """Compile PyJuice's structures: this computes nothing on the device."""
    from circuit_bench.peer_pyjuice import compile_outline

    found: Prepared = {}
    for name, data in sets.items():
        graph = hclt_graph(data.tree, options.states or NUM_STATES[name])
        try:
            found[name] = compile_outline(outline(graph, 256))
        except Exception as error:
            found[name] = f"{type(error).__name__}: {str(error)[:300]}"
    return found


def run_set(
    name: str, data: bpd_data.Set, prepared: Prepared, options: argparse.Namespace
) -> dict[str, Any]:
    """The curves of one data set, and seconds to its targets."""
    device = options.device
    train, test = (torch.from_numpy(x).to(device) for x in (data.train, data.test))
    if options.samples:
        train, test = train[: options.samples], test[: 2 * options.batch]
    states = options.states or NUM_STATES[name]
    graph = hclt_graph(data.tree, states)
    circuit = Circuit(graph, [256] * graph.num_variables, device=device)
    circuit.set_smoothing(*(options.smoothing or SETTINGS[name][:2]), len(train))
    curves = []
    if not options.no_peer:
        curves += _peer_curves(circuit, prepared.pop(name), train, test, options)
    curves.insert(0, _race(_ours(name, circuit, options), train, test, options))
    best = [min(b for _, b in c["curve"]) for c in curves[1:]] or [curves[0]["curve"][-1][1]]
    targets = [round(min(best) + margin, 4) for margin in MARGINS]
    reached = {c["name"]: [seconds_to(c["curve"], t) for t in targets] for c in curves}
    return {
        "set": name,
        "num_variables": graph.num_variables,
        "num_states": states,
        "num_parameters": circuit.num_parameters,
        "train_samples": len(train),
        "test_samples": len(test),
        "batch": options.batch,
        "curves": curves,
        "targets_bpd": targets,
        "seconds_to_target": reached,
    }


def _ours(name: str, circuit: Circuit, options: argparse.Namespace) -> Racer:
    from circuit_bench.ours_gpu import OursGpu

    # Warming up trains a little: the race is to start where the other side did.
    kept = [p.detach().clone() for p in circuit.parameters()]
    x = torch.zeros(options.batch, circuit.num_variables, dtype=torch.int64, device=circuit.device)
    ours = OursGpu(circuit, [x], options.dtype, fused=not options.plain)
    with torch.no_grad():
        for parameter, value in zip(circuit.parameters(), kept, strict=True):
            parameter.copy_(value)
    if ours.fast is not None:
        ours.fast.read()
    schedule = {"linear": linear, "geometric": geometric}[options.schedule]
    return Racer(
        "distpc, online EM",
        ours.step,
        ours.log_prob,
        schedule(*(options.step_sizes or SETTINGS[name][2:])),
        ours.warm_seconds,
        {"setting": ours.setting},
    )


def _peer_curves(
    circuit: Circuit, made: Any, train: Tensor, test: Tensor, options: argparse.Namespace
) -> list[dict[str, Any]]:
    from circuit_bench.peer_pyjuice import PyJuicePeer

    curves: list[dict[str, Any]] = []
    if isinstance(made, str):
        say(f"  PyJuice: {made}")
        return curves
    try:
        with at_most(options.peer_limit):
            peer = PyJuicePeer(circuit, [train[: options.batch].long()], options.device, made)
            start = [t.detach().clone() for t in peer.parameters()]
        for name, (settings, schedule) in PEERS.items():
            with torch.no_grad():
                for tensor, value in zip(peer.parameters(), start, strict=True):
                    tensor.copy_(value)
            with at_most(options.peer_limit):
                peer.warm_up(name, **settings)
            setup = peer.compile_seconds + peer.warm_seconds
            racer = Racer(
                f"PyJuice, {name}",
                peer.step,
                peer.log_prob,
                schedule,
                setup,
                {"setting": peer.setting},
            )
            curves.append(_race(racer, train, test, options))
    except Exception as error:
        say(f"  PyJuice: {type(error).__name__}: {str(error)[:300]}")
    return curves


def _race(racer: Racer, train: Tensor, test: Tensor, options: argparse.Namespace) -> dict[str, Any]:
    found = race(racer, train, test, options.batch, options.seconds, options.evaluations)
    last = found["curve"][-1]
    say(
        f"  {racer.name}: {last[1]} bpd after {last[0]} s, {found['steps']} steps, "
        f"setup {found['setup_seconds']} s"
    )
    return found


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """A panel a data set: bits per dimension over seconds."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(
        1, len(rows), figsize=(4.6 * len(rows), 4), layout="constrained", squeeze=False
    )
    for row, panel in zip(rows, panels[0], strict=True):
        lowest = min(b for c in row["curves"] for _, b in c["curve"])
        for curve in row["curves"]:
            seconds, bits = zip(*curve["curve"], strict=True)
            panel.plot(seconds, bits, "o-", markersize=3, label=curve["name"])
        panel.set(
            title=f"{row['set']}, HCLT, {row['num_states']} states",
            xlabel="seconds of training",
            ylim=(lowest - 0.03, lowest + 0.8),
        )
        panel.grid(alpha=0.3)
    panels[0][0].set_ylabel("test bits per dimension")
    panels[0][0].legend(fontsize=8)
    figure.savefig(path, dpi=120)


def say(line: str) -> None:
    """To the terminal, at once."""
    print(line, file=sys.stderr, flush=True)


def read_options() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--make", type=Path, metavar="NPZ", help="write the data file, and stop")
    add("--folder", type=Path, default=Path("datasets"), help="of tools/get_data.py (%(default)s)")
    add("--cifar", type=Path, help="folder of train.tar.gz and test.tar.gz with 32 x 32 pictures")
    add("--data", type=Path, metavar="NPZ")
    add("--sets", nargs="+", choices=list(NUM_STATES), help="default: all that the file has")
    add("--device", default="cuda")
    add("--json", type=Path)
    add("--plot", type=Path)
    add("--seconds", type=float, default=4.0, help="of training, each side (%(default)s)")
    add("--evaluations", type=int, default=12)
    add("--batch", type=int, default=512)
    add("--states", type=int, help="K, default 256")
    add("--samples", type=int, help="to train on, default: all")
    add("--step-sizes", type=float, nargs=2, help="of ours, first and last")
    add("--smoothing", type=float, nargs=2, help="of ours: samples' worth in sum and input rows")
    add("--schedule", default="geometric", choices=["linear", "geometric"], help="of ours")
    add("--dtype", default="bfloat16", choices=["float32", "bfloat16"])
    add("--peer-limit", type=float, default=30.0, help="seconds, to warm up")
    add("--no-peer", action="store_true")
    add("--plain", action="store_true", help="the ordinary step instead of the fused one")
    return parser.parse_args()


def main() -> None:
    """Make the data, or run the races."""
    options = read_options()
    if options.make:
        bpd_data.make(options.make, options.folder, options.cifar, options.sets)
        return
    sets = bpd_data.load(options.data)
    if options.sets:
        sets = {name: sets[name] for name in options.sets}
    prepared = {} if options.no_peer else prepare(sets, options)
    gpu_turn.take()
    rows: list[dict[str, Any]] = []
    begun = time.perf_counter()
    for name, data in sets.items():
        say(name)
        rows.append(run_set(name, data, prepared, options))
        free(options.device)
        if options.json:
            about = {"machine": machine(options.device), "sets": rows}
            options.json.write_text(json.dumps(about, indent=2) + "\n")
        if options.plot:
            draw(rows, options.plot)
        say(f"  {time.perf_counter() - begun:.0f} s so far")


if __name__ == "__main__":
    main()
