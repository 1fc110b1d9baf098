"""The command that draws data from a teacher: sample-teacher."""

from __future__ import annotations

import argparse
from pathlib import Path

from distpc.cli.arguments import Commands, amount, count, seed


def add_sample_teacher(commands: Commands) -> None:
    """`sample-teacher`."""
    parser = commands.add_parser(
        "sample-teacher",
        help="draw token sequences from a causal language model, on Ray workers",
        description="Write sequences of tokens for data.source.kind token_samples. Files that are "
        "there are kept: the same command goes on where it was interrupted, and more samples are "
        "added to fewer.",
        epilog="examples:\n"
        "  distpc sample-teacher models/smollm2 --out datasets/smollm2_samples --num 20000\n"
        "  distpc sample-teacher models/smollm2 --out datasets/short --num 1000 --length 16 "
        "--start-token '<|endoftext|>' --end-token '<|endoftext|>' --workers 2\n",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("model", type=Path, help="folder of the model and its tokenizer.json")
    parser.add_argument("--out", type=Path, required=True, help="folder of the samples")
    parser.add_argument("--num", type=count, default=20000, help="sequences (default 20000)")
    parser.add_argument("--length", type=count, default=32, help="tokens of each (default 32)")
    parser.add_argument("--seed", type=seed, default=0, help="of everything random (default 0)")
    parser.add_argument(
        "--temperature", type=amount, default=1.0, help="logits are divided by it (default 1)"
    )
    parser.add_argument(
        "--start-token", help="token that sequences begin after (default: the model's own)"
    )
    parser.add_argument("--end-token", help="token that ends a sequence (default: the model's own)")
    parser.add_argument(
        "--samples-per-file", type=count, default=256, help="a unit of work (default 256)"
    )
    parser.add_argument(
        "--batch-size", type=count, default=64, help="sequences drawn side by side (default 64)"
    )
    parser.add_argument("--workers", type=count, default=1, help="Ray actors (default 1)")
    parser.add_argument(
        "--cpus-per-worker", type=amount, default=1.0, help="CPUs of an actor (default 1)"
    )
    parser.add_argument(
        "--gpus-per-worker", type=float, default=0.0, help="GPUs of an actor (default 0)"
    )
    parser.set_defaults(command=_sample_teacher)


def _sample_teacher(options: argparse.Namespace) -> None:
    from distpc.config.schema import ParallelConfig
    from distpc.teachers.sampling import SampleSettings, sample_teacher

    settings = SampleSettings(
        num_samples=options.num,
        length=options.length,
        seed=options.seed,
        temperature=options.temperature,
        start_token=options.start_token,
        end_token=options.end_token,
        samples_per_file=options.samples_per_file,
        batch_size=options.batch_size,
    )
    parallel = ParallelConfig(
        num_workers=options.workers,
        cpus_per_worker=options.cpus_per_worker,
        gpus_per_worker=options.gpus_per_worker,
    )
    sample_teacher(options.model, options.out, settings, parallel)
    print(f"wrote {settings.num_samples} sequences of {settings.length} tokens to {options.out}")
