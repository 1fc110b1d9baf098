"""Commands that use a model: sample, inpaint, query, compress, decompress, materialise."""

from __future__ import annotations

import argparse
from pathlib import Path

from distpc.cli.arguments import Commands, seed


def _add_model(
    commands: Commands, name: str, help_text: str, example: str
) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(
        name,
        help=help_text,
        epilog=f"examples:\n  {example}\n",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("model", type=Path, help="model folder, for example runs/digits/model")
    return parser


def add_sample(commands: Commands) -> None:
    """`sample`."""
    parser = _add_model(
        commands,
        "sample",
        "draw samples from a model",
        "distpc sample runs/digits/model --num 64 --out samples.png",
    )
    parser.add_argument("--num", type=int, default=36, help="samples to draw (default 36)")
    parser.add_argument("--seed", type=seed, default=0, help="of everything random (default 0)")
    parser.add_argument(
        "--out", type=Path, default=Path("samples.png"), help=".png for a picture, .npy for values"
    )
    parser.set_defaults(command=_sample)


def add_inpaint(commands: Commands) -> None:
    """`inpaint`."""
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
    parser.add_argument("--seed", type=seed, default=0, help="of everything random (default 0)")
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("completions.png"),
        help=".png for a picture, .npy for values",
    )
    parser.set_defaults(command=_inpaint)


def add_query(commands: Commands) -> None:
    """`query`."""
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
    parser.add_argument("--seed", type=seed, default=0, help="of those samples (default 0)")
    parser.add_argument("--out", type=Path, help=".npy or .csv (default: print)")
    parser.set_defaults(command=_query)


def add_compress(commands: Commands) -> None:
    """`compress`."""
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


def add_decompress(commands: Commands) -> None:
    """`decompress`."""
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


def add_materialise(commands: Commands) -> None:
    """`materialise`."""
    parser = _add_model(
        commands,
        "materialise",
        "write the circuit of another number of states that an integral circuit's networks make",
        "distpc materialise runs/mnist7_integral/model --num-states 256 --out models/mnist7_256",
    )
    parser.add_argument(
        "--num-states", type=int, required=True, help="quadrature points in place of every latent"
    )
    parser.add_argument("--out", type=Path, required=True, help="folder of the ordinary model")
    parser.set_defaults(command=_materialise)


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


def _materialise(options: argparse.Namespace) -> None:
    from distpc.inference.integral import materialise_command

    circuit = materialise_command(options.model, options.num_states, options.out)
    print(f"wrote {options.out}: {circuit}")
