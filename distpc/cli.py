"""The `distpc` command: parses arguments, then imports what the command needs."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from distpc.errors import DistpcError

if TYPE_CHECKING:
    from distpc.config import RunConfig

STAGE_HELP = {
    "shards": "write the source's samples as WebDataset shards",
    "index": "scan every shard once: counts, keys, checksums",
    "teacher": "train or prepare the teacher",
    "features": "extract patch features with Ray workers",
    "fit": "cluster the features (k-means with Ray workers)",
    "assign": "give every patch its cluster id",
    "structure": "learn the region graph",
    "distill": "train the circuit on data and latents",
    "finetune": "train the circuit on data alone (DeepSpeed ranks)",
    "evaluate": "likelihoods, samples and completions of the best model",
}

EXAMPLES = """examples:
  distpc run configs/digits.yaml
  distpc run configs/digits.yaml finetune.num_epochs=5 --out runs/short
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
    except DistpcError as error:
        print(f"distpc: {type(error).__name__}: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        # A folder in place of a file, no permission ...: the system's own words name the path.
        print(f"distpc: {type(error).__name__}: {error}", file=sys.stderr)
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
    run = commands.add_parser(
        "run",
        help="every stage, skipping what is done",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    _add_config(run)
    run.set_defaults(command=_run, stage=None)
    for name, text in STAGE_HELP.items():
        stage = commands.add_parser(
            name,
            help=text,
            description=f"Run one stage: {text}.",
            epilog=f"example:\n  distpc {name} configs/digits.yaml\n",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        _add_config(stage)
        stage.set_defaults(command=_run, stage=name)
        if name == "index":
            stage.add_argument(
                "--check",
                action="store_true",
                help="read all shards and finished stages of a run (its config or its folder) or "
                "of a place (folder or URL) and compare sizes, checksums and fingerprints; ends "
                "with 0 only if all hold",
            )
            stage.epilog = f"{stage.epilog}  distpc index --check runs/digits\n"
    _add_catalogue(commands)
    _add_compare(commands)
    _add_plan(commands)
    _add_sample(commands)
    _add_inpaint(commands)
    _add_query(commands)
    _add_compress(commands)
    _add_decompress(commands)
    _add_sample_teacher(commands)
    return parser


def _add_config(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", type=_path, help="YAML file of the run, see docs/config.md")
    parser.add_argument(
        "overrides", nargs="*", metavar="section.field=value", help="fields to change"
    )
    parser.add_argument("--out", type=Path, help="run folder (default: runs/NAME)")
    parser.add_argument(
        "--reuse",
        action="append",
        default=[],
        metavar="PLACE",
        help="run folder, folder or s3://bucket/prefix: stages that are finished there, with the "
        "same fingerprint, are taken instead of computed (may be repeated)",
    )
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="print the resolved config, the circuit's size, bytes per rank and what would run",
    )


def _path(text: str) -> Path | str:
    return text if "://" in text else Path(text)


def _add_catalogue(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "catalogue",
        help="the finished stages at a place: fingerprint, size, date, what they were made from",
        epilog="examples:\n"
        "  distpc catalogue runs/digits\n"
        "  distpc catalogue s3://bucket/digits --stage features\n"
        "  distpc catalogue s3://bucket/digits --json\n",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("place", help="run folder, folder of published stages, or its URL")
    parser.add_argument("--stage", choices=list(STAGE_HELP), help="list this stage alone")
    parser.add_argument("--json", action="store_true", help="print JSON, with all that is known")
    parser.set_defaults(command=_catalogue)


def _add_compare(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "compare",
        help="the same circuit on the same budget, trained in several ways",
        description="Train the variants of the section `compare` (default: tuned EM, shuffled "
        "features, random features, random patches, the data's own values, the configured teacher) "
        "on as many samples each, and write a table, report.json and plots. Finished runs are kept:"
        " the same command goes on where it was interrupted.",
        epilog="examples:\n"
        "  distpc compare configs/digits_compare.yaml\n"
        "  distpc compare configs/cifar_patches.yaml data.source.path=train.tar.gz "
        "data.source.test_path=test.tar.gz\n"
        "  distpc compare configs/digits_compare.yaml 'compare.seeds=[0,1,2]' --dry-run\n",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("config", type=Path, help="YAML file of the run, see docs/config.md")
    parser.add_argument(
        "overrides", nargs="*", metavar="section.field=value", help="fields to change"
    )
    parser.add_argument("--out", type=Path, help="its folder (default: runs/NAME-compare)")
    parser.add_argument("--dry-run", action="store_true", help="list the runs, and which are done")
    parser.set_defaults(command=_compare)


def _add_plan(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "plan",
        help="memory, traffic and time of every layout on a cluster, and which to take",
        epilog="examples:\n"
        "  distpc plan configs/digits.yaml --nodes 1 --gpus-per-node 8 --gpu-memory-gib 80\n"
        "  distpc plan configs/plan/hmm_32768.yaml --nodes 64 --gpus-per-node 8 "
        "--gpu-memory-gib 80\n",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("config", type=Path, help="YAML file of the run, see docs/config.md")
    parser.add_argument(
        "overrides", nargs="*", metavar="section.field=value", help="fields to change"
    )
    parser.add_argument("--nodes", type=_count, required=True, help="machines")
    parser.add_argument(
        "--gpus-per-node", type=_count, required=True, help="devices of a machine, a rank each"
    )
    parser.add_argument(
        "--gpu-memory-gib", type=_amount, required=True, help="memory of a device in GiB"
    )
    parser.add_argument(
        "--reserve-gib",
        type=_amount,
        default=4.0,
        help="of that, left for the runtime and the allocator (default 4)",
    )
    parser.add_argument(
        "--link-gbps",
        type=_amount,
        default=400.0,
        help="gigabits/s that a device sends to other machines (default 400)",
    )
    parser.add_argument(
        "--node-link-gbps",
        type=_amount,
        default=3600.0,
        help="gigabits/s that a device sends within its machine (default 3600)",
    )
    parser.add_argument(
        "--latency-us",
        type=_amount,
        default=20.0,
        help="microseconds of any collective operation, however small (default 20)",
    )
    parser.add_argument(
        "--device-tflops",
        type=_amount,
        default=50.0,
        help="TFLOP/s that a device reaches in matrix products (default 50: float32 of an H100)",
    )
    parser.add_argument("--json", action="store_true", help="print JSON, with every layout")
    parser.set_defaults(command=_plan)


def _count(text: str) -> int:
    count = int(text)
    if count < 1:
        raise argparse.ArgumentTypeError(f"at least 1, found {text}")
    return count


def _amount(text: str) -> float:
    amount = float(text)
    if not 0 < amount < float("inf"):
        raise argparse.ArgumentTypeError(f"a number above 0, found {text}")
    return amount


def _add_model(
    commands: argparse._SubParsersAction, name: str, help_text: str, example: str
) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(
        name,
        help=help_text,
        epilog=f"examples:\n  {example}\n",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("model", type=Path, help="model folder, for example runs/digits/model")
    return parser


def _seed(text: str) -> int:
    seed = int(text)
    if not 0 <= seed < 2**63:
        raise argparse.ArgumentTypeError(f"a seed is 0 .. 2**63 - 1, found {text}")
    return seed


def _add_sample(commands: argparse._SubParsersAction) -> None:
    parser = _add_model(
        commands,
        "sample",
        "draw samples from a model",
        "distpc sample runs/digits/model --num 64 --out samples.png",
    )
    parser.add_argument("--num", type=int, default=36, help="samples to draw (default 36)")
    parser.add_argument("--seed", type=_seed, default=0, help="of everything random (default 0)")
    parser.add_argument(
        "--out", type=Path, default=Path("samples.png"), help=".png for a picture, .npy for values"
    )
    parser.set_defaults(command=_sample)


def _add_inpaint(commands: argparse._SubParsersAction) -> None:
    parser = _add_model(
        commands,
        "inpaint",
        "complete masked images: originals, masked, completions, uncertainty",
        "distpc inpaint runs/digits/model --mask left --out completions.png",
    )
    parser.add_argument(
        "--images",
        type=Path,
        help="a .npy of values or a folder of images (default: the run's test split)",
    )
    parser.add_argument(
        "--mask",
        default="right",
        choices=["left", "right", "top", "bottom", "centre", "random"],
        help="part of the image to complete (default right)",
    )
    parser.add_argument(
        "--num", type=int, help="images to complete (default 8, or all if there are fewer)"
    )
    parser.add_argument(
        "--fill",
        default="samples",
        choices=["samples", "mpe", "mean"],
        help="complete by samples (default), the jointly most probable values, or the means",
    )
    parser.add_argument(
        "--completions", type=int, default=4, help="samples for each image (default 4)"
    )
    parser.add_argument("--seed", type=_seed, default=0, help="of everything random (default 0)")
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("completions.png"),
        help=".png for a picture, .npy for values",
    )
    parser.set_defaults(command=_inpaint)


def _add_query(commands: argparse._SubParsersAction) -> None:
    parser = _add_model(
        commands,
        "query",
        "likelihoods, conditionals, explanations and moments of rows; entropies of a model",
        "distpc query runs/digits/model --data rows.csv --what log_prob --out result.csv\n"
        "  distpc query runs/digits/model --data rows.npy --what mpe --out most_probable.npy\n"
        "  distpc query runs/digits/model --what entropy --num 10000\n"
        "  distpc query runs/digits/model --what mutual_information --out pairs.npy",
    )
    parser.add_argument("--data", type=Path, help=".npy or .csv; NaN or an empty cell is missing")
    parser.add_argument(
        "--what",
        default="log_prob",
        choices=[
            "log_prob",
            "conditional",
            "mpe",
            "expectation",
            "entropy",
            "mutual_information",
        ],
        help="of each row of --data: its log_prob (default), each missing cell's conditional "
        "distribution or expectation (mean and variance), or the jointly most probable values "
        "(mpe); of the model: its entropy, or the mutual_information of all pairs of columns",
    )
    parser.add_argument(
        "--num", type=int, default=1000, help="samples that estimate the entropy (default 1000)"
    )
    parser.add_argument("--seed", type=_seed, default=0, help="of those samples (default 0)")
    parser.add_argument("--out", type=Path, help=".npy or .csv (default: print)")
    parser.set_defaults(command=_query)


def _add_compress(commands: argparse._SubParsersAction) -> None:
    parser = _add_model(
        commands,
        "compress",
        "code samples without loss, at the model's own likelihood",
        "distpc compress runs/digits/model test --out test.dpcz",
    )
    parser.add_argument(
        "data",
        help="a .npy or .csv of values, an IDX file, a .png or a folder of them; or train, valid "
        "or test: that split of the model's run",
    )
    parser.add_argument("-o", "--out", type=Path, required=True, help="the compressed file")
    parser.add_argument("--num", type=int, help="samples, the first ones (default: all)")
    parser.add_argument(
        "--batch-size", type=int, default=256, help="samples computed at once (default 256)"
    )
    parser.set_defaults(command=_compress)


def _add_decompress(commands: argparse._SubParsersAction) -> None:
    parser = _add_model(
        commands,
        "decompress",
        "restore the samples of a compressed file, bit for bit",
        "distpc decompress runs/digits/model test.dpcz --out test.npy",
    )
    parser.add_argument("file", type=Path, help="what distpc compress wrote")
    parser.add_argument(
        "-o",
        "--out",
        type=Path,
        required=True,
        help=".npy for the array as it was; or a new folder for a .png of every image",
    )
    parser.add_argument(
        "--force",
        action="store_true",
        help="try on another processor or with other versions than the file names; what comes out "
        "wrong is an error, never a file",
    )
    parser.set_defaults(command=_decompress)


def _add_sample_teacher(commands: argparse._SubParsersAction) -> None:
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
    parser.add_argument("--num", type=_count, default=20000, help="sequences (default 20000)")
    parser.add_argument("--length", type=_count, default=32, help="tokens of each (default 32)")
    parser.add_argument("--seed", type=_seed, default=0, help="of everything random (default 0)")
    parser.add_argument(
        "--temperature", type=_amount, default=1.0, help="logits are divided by it (default 1)"
    )
    parser.add_argument(
        "--start-token", help="token that sequences begin after (default: the model's own)"
    )
    parser.add_argument("--end-token", help="token that ends a sequence (default: the model's own)")
    parser.add_argument(
        "--samples-per-file", type=_count, default=256, help="a unit of work (default 256)"
    )
    parser.add_argument(
        "--batch-size", type=_count, default=64, help="sequences drawn side by side (default 64)"
    )
    parser.add_argument("--workers", type=_count, default=1, help="Ray actors (default 1)")
    parser.add_argument(
        "--cpus-per-worker", type=_amount, default=1.0, help="CPUs of an actor (default 1)"
    )
    parser.add_argument(
        "--gpus-per-worker", type=float, default=0.0, help="GPUs of an actor (default 0)"
    )
    parser.set_defaults(command=_sample_teacher)


def _load(options: argparse.Namespace) -> tuple[RunConfig, Path]:
    from distpc.config import load_config

    overrides = list(options.overrides)
    if options.reuse:
        overrides.append(f"artifacts.reuse={json.dumps(options.reuse)}")
    config = load_config(Path(options.config), overrides)
    return config, options.out or Path("runs") / config.name


def _run(options: argparse.Namespace) -> None:
    from distpc.parallel.mesh import is_main_process
    from distpc.pipeline.describe import describe, summarize
    from distpc.pipeline.runner import Pipeline

    if getattr(options, "check", False):
        from distpc.pipeline.verify import check_command

        check_command(options.config, options.overrides, options.out)
        return
    config, folder = _load(options)
    pipeline = Pipeline(config, folder)
    if options.dry_run:
        # Under a launcher every rank runs this command, and one speaks.
        if is_main_process():
            print(describe(pipeline, options.stage))
            pipeline.check()
    elif options.stage:
        pipeline.run_stage(options.stage)
    else:
        report = pipeline.run()
        if report is not None:
            print(summarize(report, pipeline.folder))


def _catalogue(options: argparse.Namespace) -> None:
    from distpc.pipeline.catalogue_command import catalogue

    print(catalogue(options.place, options.stage, as_json=options.json))


def _compare(options: argparse.Namespace) -> None:
    from distpc.config import load_config
    from distpc.pipeline.comparison import compare, describe_runs

    config = load_config(options.config, options.overrides)
    folder = options.out or Path("runs") / f"{config.name}-compare"
    if options.dry_run:
        print(describe_runs(config, folder))
        return
    compare(config, folder)
    print((folder / "table.md").read_text(), end="")
    print(f"report and plots in {folder}")


def _plan(options: argparse.Namespace) -> None:
    from distpc.config import load_config
    from distpc.pipeline.plan import Cluster
    from distpc.pipeline.plan_command import plan_command

    cluster = Cluster(
        hosts=options.nodes,
        gpus_per_host=options.gpus_per_node,
        memory_bytes=max(0, int((options.gpu_memory_gib - options.reserve_gib) * 2**30)),
        link_gbps=options.link_gbps,
        host_link_gbps=options.node_link_gbps,
        latency_us=options.latency_us,
        device_tflops=options.device_tflops,
    )
    text = plan_command(
        load_config(options.config, options.overrides),
        cluster,
        as_json=options.json,
    )
    print(text)


def _sample(options: argparse.Namespace) -> None:
    from distpc.inference.sample import sample_command

    sample_command(options.model, n=options.num, seed=options.seed, out=options.out)
    print(f"wrote {options.out}")


def _inpaint(options: argparse.Namespace) -> None:
    from distpc.inference.inpaint import inpaint_command

    inpaint_command(
        options.model,
        images=options.images,
        mask=options.mask,
        n=options.num,
        num_completions=options.completions,
        seed=options.seed,
        out=options.out,
        fill=options.fill,
    )
    print(f"wrote {options.out}")


def _query(options: argparse.Namespace) -> None:
    from distpc.inference.query import query_command

    query_command(
        options.model,
        options.data,
        what=options.what,
        out=options.out,
        num_samples=options.num,
        seed=options.seed,
    )


def _compress(options: argparse.Namespace) -> None:
    from distpc.inference.compress_files import compress_command

    compress_command(
        options.model, options.data, options.out, num=options.num, batch_size=options.batch_size
    )


def _decompress(options: argparse.Namespace) -> None:
    from distpc.inference.compress_files import decompress_command

    decompress_command(options.model, options.file, options.out, force=options.force)


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
