"""The `distpc` command: parses arguments, then imports what the command needs."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from distpc.cli import models, runs, teachers
from distpc.errors import DistpcError
from distpc.parallel.processes import leave_for_launcher

EXAMPLES = """examples:
  distpc run configs/digits.yaml
  distpc run configs/digits.yaml finetune.num_epochs=5 --out runs/short
  distpc run configs/digits.yaml --until assign
  distpc run configs/fashion_mnist.yaml --dry-run
  distpc compare configs/digits_compare.yaml
  distpc plan configs/fashion_mnist.yaml --nodes 1 --gpus-per-node 8 --gpu-memory-gib 80
  distpc finetune configs/digits.yaml
  distpc run configs/digits.yaml artifacts.url=s3://bucket/digits
  distpc run configs/digits.yaml --out runs/second --reuse runs/digits --reuse s3://bucket/digits
  distpc catalogue s3://bucket/digits
  distpc index --check runs/digits
  distpc sample runs/digits/model --num 64 --out samples.png
  distpc inpaint runs/digits/model --mask left --out completions.png
  distpc query runs/digits/model --data rows.npy
  distpc sample-teacher models/smollm2 --out datasets/smollm2_samples --num 20000
  distpc compress runs/digits/model test --out test.dpcz
  distpc decompress runs/digits/model test.dpcz --out test.npy
  distpc materialise runs/mnist7_integral/model --num-states 256 --out models/mnist7_256
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; 0 on success, 2 on an error that the user can mend."""
    parser = build_parser()
    options, rest = parser.parse_known_args(arguments)
    overrides = [text for text in rest if "=" in text and not text.startswith("-")]
    unknown = [text for text in rest if text not in overrides]
    if unknown or (overrides and not hasattr(options, "overrides")):
        parser.error(f"unrecognized arguments: {' '.join(unknown or overrides)}")
    if overrides:
        options.overrides = [*options.overrides, *overrides]
    try:
        options.command(options)
    except (DistpcError, OSError) as error:
        # OSError is a folder in place of a file, no permission ...: its own words name the path.
        print(f"distpc: {type(error).__name__}: {error}", file=sys.stderr)
        leave_for_launcher(error)
        return 2
    except KeyboardInterrupt:
        print("distpc: interrupted; the same command continues", file=sys.stderr)
        return 130
    return 0


def build_parser() -> argparse.ArgumentParser:
    """All commands and their options; imports nothing heavy."""
    parser = argparse.ArgumentParser(
        prog="distpc",
        description="Train probabilistic circuits by latent variable distillation.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    runs.add_run(commands, EXAMPLES)
    for add in (
        runs.add_catalogue,
        runs.add_compare,
        runs.add_plan,
        models.add_sample,
        models.add_inpaint,
        models.add_query,
        models.add_compress,
        models.add_decompress,
        models.add_materialise,
        teachers.add_sample_teacher,
    ):
        add(commands)
    return parser
