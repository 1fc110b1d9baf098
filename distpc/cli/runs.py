"""Commands that run a config: all stages, one stage, comparisons, plans; and the catalogue."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING

from distpc.cli.arguments import Commands, amount, count, path

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


def add_run(commands: Commands, examples: str) -> None:
    """`run`, and a command for each stage."""
    run = commands.add_parser(
        "run",
        help="every stage, skipping what is done",
        epilog=examples,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    _add_config(run)
    run.add_argument(
        "--until",
        choices=[name for name in STAGE_HELP if name != "evaluate"],
        metavar="STAGE",
        help="stop after this stage: `assign` for latents without a circuit",
    )
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


def _add_config(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", type=path, help="YAML file of the run, see docs/config.md")
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


def add_catalogue(commands: Commands) -> None:
    """`catalogue`."""
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


def add_compare(commands: Commands) -> None:
    """`compare`."""
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
        "  distpc compare configs/digits_compare.yaml 'compare.seeds=[0,1,2]' --dry-run\n"
        "  distpc compare configs/cifar_patches.yaml 'compare.only=[em_a,em_b,em_c,pixels]'\n",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("config", type=Path, help="YAML file of the run, see docs/config.md")
    parser.add_argument(
        "overrides", nargs="*", metavar="section.field=value", help="fields to change"
    )
    parser.add_argument("--out", type=Path, help="its folder (default: runs/NAME-compare)")
    parser.add_argument("--dry-run", action="store_true", help="list the runs, and which are done")
    parser.set_defaults(command=_compare)


def add_plan(commands: Commands) -> None:
    """`plan`."""
    parser = commands.add_parser(
        "plan",
        help="memory, traffic and time of every layout on a cluster, and which to take",
        description="Compare the layouts of a run's ranks on a cluster, take one, and print the\n"
        "fields to give to `distpc run` or a launcher. The layout in the config file does not\n"
        "count; parallel.node_parallel, parallel.zero_stage and finetune.micro_batch_size\n"
        "behind CONFIG do: only layouts that have them are considered.",
        epilog="examples:\n"
        "  distpc plan configs/digits.yaml --nodes 1 --gpus-per-node 8 --gpu-memory-gib 80\n"
        "  distpc plan configs/plan/hmm_32768.yaml --nodes 64 --gpus-per-node 8 "
        "--gpu-memory-gib 80\n"
        "  distpc plan configs/digits_hclt.yaml parallel.zero_stage=3 --nodes 2 "
        "--gpus-per-node 4 --gpu-memory-gib 24\n",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("config", type=Path, help="YAML file of the run, see docs/config.md")
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="section.field=value",
        help="fields to change; those of the layout restrict it",
    )
    parser.add_argument("--nodes", type=count, required=True, help="machines")
    parser.add_argument(
        "--gpus-per-node", type=count, required=True, help="devices of a machine, a rank each"
    )
    parser.add_argument(
        "--gpu-memory-gib", type=amount, required=True, help="memory of a device in GiB"
    )
    parser.add_argument(
        "--reserve-gib",
        type=amount,
        default=4.0,
        help="of that, left for the runtime and the allocator (default 4)",
    )
    parser.add_argument(
        "--link-gbps",
        type=amount,
        default=400.0,
        help="gigabits/s that a device sends to other machines (default 400)",
    )
    parser.add_argument(
        "--node-link-gbps",
        type=amount,
        default=3600.0,
        help="gigabits/s that a device sends within its machine (default 3600)",
    )
    parser.add_argument(
        "--latency-us",
        type=amount,
        default=20.0,
        help="microseconds of any collective operation, however small (default 20)",
    )
    parser.add_argument(
        "--device-tflops",
        type=amount,
        default=50.0,
        help="TFLOP/s that a device reaches in matrix products (default 50: float32 of an H100)",
    )
    parser.add_argument("--json", action="store_true", help="print JSON, with every layout")
    parser.set_defaults(command=_plan)


def _load(options: argparse.Namespace) -> tuple[RunConfig, Path]:
    from distpc.config import load_config

    overrides = list(options.overrides)
    if options.reuse:
        overrides.append(f"artifacts.reuse={json.dumps(options.reuse)}")
    config = load_config(Path(options.config), overrides)
    return config, options.out or Path("runs") / config.name


def _run(options: argparse.Namespace) -> None:
    from distpc.artifacts import read_json
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
            builds = pipeline.built(options.stage, options.until)
            print(describe(pipeline, builds))
            pipeline.check(builds)
    elif options.stage:
        result = pipeline.run_stage(options.stage)
        if options.stage == "evaluate" and result is not None:
            print(summarize(read_json(pipeline.folder / "report.json"), pipeline.folder))
    elif options.until:
        pipeline.run_until(options.until)
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
    print(plan_command(options.config, options.overrides, cluster, as_json=options.json))
