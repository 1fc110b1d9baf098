#!/usr/bin/env python3
"""Feature extraction on Ray against the bare model: samples a second, once the actors are ready.

    python tools/get_models.py efficientnet_lite0
    python tools/bench_extract.py --json                       a few minutes
    python tools/bench_extract.py --json --quick               under a minute

Both sides run EfficientNet-Lite0 up to one block on the same pictures in batches of the same size,
in as many processes with as many threads. The bare model is given tensors that lie ready in memory
(resized, normalised) and forgets what it computes; extraction reads and decodes shards, resizes,
encodes, and writes features. Sides take turns: bare, extraction, bare, ...; rates are medians, and
`ratio` is extraction's over the bare model's. `start_seconds` is from the request to the moment
when all actors have loaded the teacher.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import platform
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from distpc.artifacts import Artifact, StageContext
from distpc.config import RunConfig
from distpc.data import index, shards
from distpc.errors import DistpcError
from distpc.latents import extract
from distpc.latents.encode import ShardTask
from distpc.parallel.cluster import Cluster
from distpc.parallel.tally import Tally
from distpc.teachers import load_teacher, train

ROOT = Path(__file__).resolve().parents[1]
SIDE = 32


def main() -> int:
    """Measure, print; 1 where the ratio is below --least."""
    description, _, rest = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(
        description=description, epilog=rest, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    default = ROOT / "datasets/models/efficientnet_lite0"
    parser.add_argument("--model", type=Path, default=default, help="its folder (%(default)s)")
    parser.add_argument("--workers", type=int, default=2, help="processes a side (%(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="threads of each (%(default)s)")
    parser.add_argument("--shards", type=int, default=50, help="shards (%(default)s)")
    parser.add_argument("--samples", type=int, default=48, help="of a shard (%(default)s)")
    parser.add_argument("--batch", type=int, default=48, help="samples encoded at once")
    parser.add_argument("--layer", type=int, default=10, help="block (%(default)s)")
    parser.add_argument("--ahead", type=int, default=1, help="shards read ahead (%(default)s)")
    parser.add_argument("--turns", type=int, default=2, help="of extraction (%(default)s)")
    parser.add_argument("--least", type=float, default=0.0, help="exit 1 below this ratio")
    parser.add_argument("--quick", action="store_true", help="8 small shards: no figure to quote")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args()
    if options.quick:
        options.shards, options.samples, options.batch, options.turns = 8, 16, 16, 1
    try:
        with tempfile.TemporaryDirectory(prefix="bench-extract-") as folder:
            figures = measure(options, Path(folder))
    except DistpcError as error:
        print(f"bench_extract: {type(error).__name__}: {error}", file=sys.stderr)
        return 2
    if options.json:
        print(json.dumps(figures, indent=2))
    else:
        for name, value in figures.items():
            print(f"{name:28} {value}")
    return 0 if figures["ratio"] >= options.least else 1


def measure(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """All figures by name."""
    ctx = prepare(options, folder)
    entries = index.ShardIndex.load(ctx.input("index").path).shards("train")
    tasks = [ShardTask(entry) for entry in entries]
    samples = sum(entry.num_samples for entry in entries)
    bare: list[float] = []
    own: list[float] = []
    tally = Tally("features")
    with (
        Bare(options, ctx.input("teacher").path) as model,
        Cluster.connect(ctx.config.parallel) as cluster,
        cluster.pool(
            extract.WORKER,
            {"settings": extract.settings(ctx)},
            ahead=options.ahead,
            tally=tally,
        ) as pool,
    ):
        began = time.perf_counter()
        # One shard each, until every actor has had one.
        while pool.most_workers < options.workers:
            list(pool.map(tasks[: 2 * options.workers]))
            start_seconds = time.perf_counter() - began
        bare.append(model.rate(samples))
        before = dict(tally.seconds)
        for _ in range(options.turns):
            began = time.perf_counter()
            for _ in pool.map(tasks):
                pass
            own.append(samples / (time.perf_counter() - began))
            bare.append(model.rate(samples))
    rate, bare_rate = statistics.median(own), statistics.median(bare)
    return {
        "machine": f"{platform.machine()}, {torch.backends.cpu.get_cpu_capability()}",
        "torch": torch.__version__,
        **{name: getattr(options, name) for name in ("workers", "threads", "batch", "ahead")},
        "shards": len(entries),
        "samples": samples,
        "samples_per_second": round(rate, 2),
        "bare_samples_per_second": round(bare_rate, 2),
        "ratio": round(rate / bare_rate, 4),
        "all_samples_per_second": [round(value, 2) for value in own],
        "all_bare_samples_per_second": [round(value, 2) for value in bare],
        "start_seconds": round(start_seconds, 2),
        "worker_seconds": {
            name: round((value - before[name]) / options.turns, 2)
            for name, value in tally.seconds.items()
        },
    }


def prepare(options: argparse.Namespace, folder: Path) -> StageContext:
    """Real shards of made-up pictures, their index, and the teacher stage."""
    total = options.shards * options.samples
    pictures = folder / "pictures"
    pictures.mkdir()
    rng = np.random.default_rng(0)
    from PIL import Image

    for number in range(total + 2):
        coarse = rng.integers(256, size=(8, 8, 3), dtype=np.uint8)
        Image.fromarray(coarse).resize((SIDE, SIDE), Image.Resampling.BICUBIC).save(
            pictures / f"{number:06d}.png"
        )
    valid = 1 / (total + 2)
    config = RunConfig.model_validate(
        {
            "name": "bench",
            "data": {
                "source": {"kind": "image_folder", "path": str(pictures)},
                "split": {"train": 1 - 2 * valid, "valid": valid, "test": valid},
                "samples_per_shard": options.samples,
                "patch_size_pixels": 4,
            },
            "teacher": {
                "kind": "efficientnet",
                "pretrained": {"folder": str(options.model), "layer": options.layer},
                "extraction_batch_size": options.batch,
            },
            "parallel": {
                "num_workers": options.workers,
                "cpus_per_worker": options.threads,
                "prefetch_shards": options.ahead,
            },
        }
    )
    made: dict[str, Artifact] = {}
    for name, stage in (("shards", shards.run), ("index", index.run), ("teacher", train.run)):
        out = folder / name
        out.mkdir()
        ctx = StageContext(config, out, made, "f" * 16, folder / "tb")
        stage(ctx)
        made[name] = Artifact.seal(out, name, "f" * 16, 0.0, ctx.metadata)
    out = folder / "features"
    out.mkdir()
    return StageContext(config, out, made, "f" * 16, folder / "tb")


class Bare:
    """The model in processes of its own, on tensors that lie ready.

    Args:
        options: of the command line.
        teacher: folder of the teacher stage, which says which model.
    """

    def __init__(self, options: argparse.Namespace, teacher: Path) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipes, self._processes = [], []
        for _ in range(options.workers):
            here, there = context.Pipe()
            arguments = (there, str(teacher), options.threads, options.batch)
            process = context.Process(target=serve_bare, args=arguments, daemon=True)
            process.start()
            self._pipes.append(here)
            self._processes.append(process)
        for pipe in self._pipes:
            pipe.recv()

    def rate(self, samples: int) -> float:
        """Samples a second of all processes together, which share `samples` evenly."""
        began = time.perf_counter()
        for pipe in self._pipes:
            pipe.send(samples // len(self._pipes))
        done = sum(pipe.recv() for pipe in self._pipes)
        return done / (time.perf_counter() - began)

    def __enter__(self) -> Bare:
        return self

    def __exit__(self, *details: object) -> None:
        for pipe in self._pipes:
            pipe.send(0)
        for process in self._processes:
            process.join()


def serve_bare(pipe: Any, teacher: str, threads: int, batch: int) -> None:
    """Run the model over as many samples as asked for, until that is none."""
    torch.set_num_threads(threads)
    loaded: Any = load_teacher(Path(teacher))
    size, layer, model = loaded.image_size, loaded.layer, loaded.model.model
    inputs = (torch.rand(batch, 3, size, size) * 255 - 127) / 128
    # The faster of the two layouts, and the one that pictures come in.
    inputs = inputs.contiguous(memory_format=torch.channels_last)
    with torch.no_grad():
        model.feature_map(inputs, layer)
        pipe.send("ready")
        while samples := pipe.recv():
            done = 0
            while done < samples:
                part = inputs[: min(batch, samples - done)]
                model.feature_map(part, layer)
                done += len(part)
            pipe.send(done)


if __name__ == "__main__":
    sys.exit(main())
