#!/usr/bin/env python
"""Every kernel of the fused training step at three sizes, and a roofline picture.

    python tools/bench_kernels.py --json kernels.json --plot roofline.png
    python tools/bench_kernels.py --json kernels.json --plot roofline.png --draw    the picture

All launches of a kernel in a step are recorded as one CUDA graph and timed by events, medians of
repeated runs; the rates over which they are drawn, of matrix products and of a copy, are measured
in the same run. What bytes and operations are is said in `circuit_bench/kernels.py`.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from circuit_bench.cases import Case
from circuit_bench.ceilings import ceilings
from circuit_bench.gpu_clock import free, is_out_of_memory, medians
from circuit_bench.gpu_table import machine
from circuit_bench.kernels import Kernel, kernels_of

CASES = ["hclt:768:64", "hclt:768:256", "hclt:768:1024", "hmm:32:1024", "hmm:32:4096"]
BATCH, VOCABULARY = 512, 33_279


def run_case(case: Case, options: argparse.Namespace) -> list[dict[str, Any]]:
    """The rows of one case."""
    from distpc.circuits.kernels.step import FastStep

    circuit = case.circuit(device=options.device)
    fast = FastStep(circuit, case.batch, dtype=getattr(torch, case.dtype))
    for x in case.batches(2, options.device):
        fast.step(x, 0.1)
    rows = []
    with torch.no_grad():
        for kernel in kernels_of(fast):
            rows.append({"case": str(case), **_measure(kernel, options)})
            say(f"  {rows[-1]}")
    return rows


def _measure(kernel: Kernel, options: argparse.Namespace) -> dict[str, Any]:
    work = _recorded(kernel.run, options.device)
    median, spread = medians({"it": work}, options.device, options.rounds, 2.0)["it"]
    return {
        "kernel": kernel.name,
        "ms": round(1e3 * median, 5),
        "spread_ms": round(1e3 * spread, 5),
        "bytes": kernel.bytes,
        "flops": kernel.flops,
        "gbs": round(kernel.bytes / median / 1e9, 2),
        "tflops": round(kernel.flops / median / 1e12, 3),
    }


def _recorded(run: Callable[[], object], device: str) -> Callable[[], object]:
    """As one CUDA graph: launches follow each other as they do in a step."""
    run()
    if device == "cpu":
        return run
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    graph.replay()
    return graph.replay


def draw(content: dict[str, Any], path: Path) -> None:
    """Achieved rates over intensity, under the roofs; kernels without products as bandwidth."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    roofs = content["machine"]["ceilings"]
    rows = content["kernels"]
    figure, (left, right) = pyplot.subplots(
        1, 2, figsize=(13, 5), layout="constrained", width_ratios=(3, 2)
    )
    with_products = [row for row in rows if row["flops"]]
    at = [row["flops"] / row["bytes"] for row in with_products] or [1.0]
    span = [min(at) / 2, max(at) * 2]
    line = [min(roofs["bf16_tflops"], x * roofs["copy_gbs"] / 1e3) for x in span]
    ridge = 1e3 * roofs["bf16_tflops"] / roofs["copy_gbs"]
    if span[0] < ridge < span[1]:
        span.insert(1, ridge)
        line.insert(1, roofs["bf16_tflops"])
    left.loglog(span, line, "k-", label="measured: copy, bfloat16 matrix product")
    markers = dict(zip(dict.fromkeys(row["case"] for row in rows), "osD^vP*X", strict=False))
    colours = {name: f"C{i}" for i, name in enumerate(dict.fromkeys(r["kernel"] for r in rows))}
    for row in with_products:
        left.plot(
            row["flops"] / row["bytes"],
            row["tflops"],
            markers.get(row["case"], "o"),
            color=colours[row["kernel"]],
        )
    left.set(xlabel="operations per byte", ylabel="TFLOP/s", title="kernels with matrix products")
    left.grid(alpha=0.3, which="both")
    names = {row["kernel"] for row in with_products}
    for name in colours:
        if name in names:
            left.plot([], [], "s", color=colours[name], label=name)
    for case, marker in markers.items():
        left.plot([], [], marker, color="grey", label=case)
    left.legend(fontsize=7)
    _bars(right, [row for row in rows if not row["flops"]], roofs["copy_gbs"])
    figure.suptitle(content["machine"]["device"])
    figure.savefig(path, dpi=120)


def _bars(panel: Any, rows: list[dict[str, Any]], copy: float) -> None:
    labels = [f"{row['kernel'].split(':')[0]}\n{row['case'].rsplit(':', 2)[0]}" for row in rows]
    panel.barh(labels, [row["gbs"] for row in rows])
    panel.axvline(copy, color="k", label="measured: copy")
    panel.set(xlabel="GB/s", title="kernels that move bytes")
    panel.tick_params(axis="y", labelsize=6)
    panel.invert_yaxis()
    panel.legend(fontsize=7)


def say(line: str) -> None:
    """To the terminal, at once."""
    print(line, file=sys.stderr, flush=True)


def read_options() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--cases", nargs="+", default=CASES, metavar="CASE", help="as of bench_circuit.py")
    add("--device", default="cuda")
    add("--dtype", default="bfloat16", choices=["float32", "bfloat16"])
    add("--batch", type=int, default=BATCH)
    add("--vocabulary", type=int, default=VOCABULARY)
    add("--rounds", type=int, default=20)
    add("--json", type=Path)
    add("--plot", type=Path)
    add("--draw", action="store_true", help="measure nothing: draw what --json holds")
    return parser.parse_args()


def main() -> None:
    """Measure, write, draw."""
    options = read_options()
    if options.draw:
        draw(json.loads(options.json.read_text()), options.plot)
        return
    about = {**machine(options.device), "ceilings": ceilings(options.device)}
    content: dict[str, Any] = {"machine": about, "kernels": []}
    for name in options.cases:
        case = Case.parse(name, options.batch, options.dtype, options.vocabulary)
        say(str(case))
        try:
            content["kernels"] += run_case(case, options)
        except Exception as error:
            reason = "out of memory" if is_out_of_memory(error) else str(error)[:300]
            say(f"  {case} failed: {type(error).__name__}: {reason}")
        free(options.device)
        if options.json:
            options.json.write_text(json.dumps(content, indent=2) + "\n")
        if options.plot and content["kernels"]:
            draw(content, options.plot)


if __name__ == "__main__":
    main()
