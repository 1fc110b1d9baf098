#!/usr/bin/env python3
"""Look at the latents of a run: what its clusters hold, how they are used, and how many are enough.

    python tools/inspect_latents.py runs/digits
    python tools/inspect_latents.py runs/digits --clusters 12 --members 20 --out looks

Writes into RUN/inspect (or --out), and for TensorBoard into RUN/tb/inspect:

    members.png (images) or members.md (text)   some members of some clusters, drawn at random
    usage.png                                   how often each cluster occurs, sorted
    elbow.png                                   mean squared distance over the number of clusters
    projection.png                              features and centroids in two dimensions
    latents.json                                the figures: usage, entropy, mutual information
                                                between neighbours, elbow, shares of variance

The run needs its stages up to `assign`. Needs matplotlib: pip install distpc[plots].
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import numpy as np

from distpc.artifacts import Artifact
from distpc.artifacts.files import atomic_path, read_json, write_bytes, write_json
from distpc.artifacts.manifest import MANIFEST
from distpc.config.load import load_config
from distpc.errors import ArtifactError, DistpcError
from distpc.latents.elbow import POINTS, elbow, sizes_around
from distpc.latents.looks import Looks
from distpc.latents.projection import Projection, colours
from distpc.latents.store import feature_shards

_STAGES = ("index", "features", "fit", "assign")
_PICTURES = ("elbow", "members", "projection", "usage")


def main() -> int:
    """The command line; returns the exit status."""
    description, _, rest = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(
        description=description, epilog=rest, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path, metavar="RUN", help="folder of a run")
    parser.add_argument("--out", type=Path, help="folder for the files (RUN/inspect)")
    parser.add_argument(
        "--clusters", type=_at_least_one, default=8, help="clusters shown (%(default)s)"
    )
    parser.add_argument(
        "--members", type=_at_least_one, default=12, help="members of each (%(default)s)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of what is drawn (%(default)s)")
    options = parser.parse_args()
    try:
        inspect(
            options.run,
            options.out or options.run / "inspect",
            options.clusters,
            options.members,
            options.seed,
        )
    except (DistpcError, ImportError) as error:
        print(f"inspect_latents: {type(error).__name__}: {error}", file=sys.stderr)
        return 1
    return 0


def _at_least_one(text: str) -> int:
    if (number := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"{number} is not 1 or more")
    return number


def inspect(run: Path, out: Path, num_shown: int, num_members: int, seed: int) -> None:
    """Write all files.

    Raises:
        DistpcError: a stage has not run, or its files cannot be read.
    """
    for name in _STAGES:
        if not (run / name / MANIFEST).is_file():
            raise ArtifactError(
                f"the run has not finished its stage {name}",
                where=run,
                expected=f"the stages {', '.join(_STAGES)}",
                fix=f"distpc run CONFIG --until assign --out {run}",
            )
    stages = {name: Artifact.open(run / name) for name in _STAGES}
    report = read_json(stages["assign"].path / "report.json")
    config = load_config(run / "resolved_config.yaml")
    assign = stages["assign"]
    names = sorted(Path(file).stem for file in assign.files if file.endswith(".safetensors"))
    usage = np.asarray(report["usage"])
    num_clusters = int(report["num_clusters"])
    size = config.data.patch_size_pixels
    looks = Looks(stages, assign.path, names, usage, size, num_clusters)
    out.mkdir(parents=True, exist_ok=True)

    members = looks.members(num_shown, num_members, seed)
    is_image = looks.index.spec.kind == "image"
    shown: Any = looks.montage(members) if is_image else looks.snippet_table(members)
    if is_image:
        shares = {looks.name(c): usage[c] / usage.sum() for c in members}
        _save_members(out / "members.png", shown, shares)
    else:
        write_bytes(out / "members.md", shown.encode())
    plane = looks.projection()
    _save_projection(out / "projection.png", plane)
    features, _ = looks.features(2 * POINTS)
    sizes = sizes_around(num_clusters, len(features) // 2)
    bend = elbow(features, sizes, seed)
    _save_elbow(out / "elbow.png", bend, num_clusters)
    _save_usage(out / "usage.png", usage, report)
    figures = {
        "run": str(run),
        "clusters_shown": {looks.name(c): int(usage[c]) for c in members},
        "feature_shards": len(feature_shards(stages["features"])),
        "elbow_points": len(features) // 2,
        "elbow": bend,
        "projection": plane.to_json(),
        **{name: value for name, value in report.items() if name != "format_version"},
    }
    write_json(out / "latents.json", figures)
    _log(run / "tb/inspect", out, figures, None if is_image else shown)
    _print(figures, out)


def _save_members(path: Path, sheet: np.ndarray, shares: dict[str, float]) -> None:
    """The montage with each cluster's name and share beside its row."""
    plt = _pyplot()
    height, width = sheet.shape[:2]
    figure, axes = plt.subplots(figsize=(width / 90 + 1.2, height / 90))
    axes.imshow(sheet, interpolation="nearest")
    rows = (np.arange(len(shares)) + 0.5) * height / len(shares)
    names = [f"{name} ({share:.2%})" for name, share in shares.items()]
    axes.set_yticks(rows, names, fontsize=8)
    axes.set_xticks([])
    axes.set_ylabel("cluster (share of all patches)", fontsize=8)
    _save(figure, path)


def _save_usage(path: Path, usage: np.ndarray, report: dict[str, Any]) -> None:
    plt = _pyplot()
    figure, axes = plt.subplots(figsize=(7, 3.6))
    axes.bar(np.arange(len(usage)), np.sort(usage)[::-1] / usage.sum(), width=1.0)
    axes.axhline(1 / len(usage), color="black", linewidth=0.8, linestyle="--", label="equal use")
    axes.set_xlabel("cluster, from the most to the least used")
    axes.set_ylabel("share of all latents")
    axes.set_title(
        f"{report['used']} of {len(usage)} used, entropy {report['usage_entropy_bits']:.2f} of "
        f"{report['max_entropy_bits']:.2f} bits",
        fontsize=10,
    )
    axes.legend(fontsize=8)
    _save(figure, path)


def _save_elbow(path: Path, bend: list[dict[str, Any]], num_clusters: int) -> None:
    plt = _pyplot()
    figure, axes = plt.subplots(figsize=(6, 3.6))
    sizes = [entry["num_clusters"] for entry in bend]
    axes.plot(sizes, [entry["fitted"] for entry in bend], "o-", label="features clustered")
    axes.plot(sizes, [entry["held_out"] for entry in bend], "s--", label="features held out")
    axes.axvline(num_clusters, color="grey", linewidth=0.8, label="this run")
    axes.set_xscale("log", base=2)
    axes.set_ylim(bottom=0)
    axes.set_xlabel("clusters K")
    axes.set_ylabel("mean squared distance")
    axes.legend(fontsize=8)
    _save(figure, path)


def _save_projection(path: Path, plane: Projection) -> None:
    plt = _pyplot()
    figure, axes = plt.subplots(figsize=(6, 6))
    shades = colours(plane.labels) / 255
    axes.scatter(plane.points[:, 0], plane.points[:, 1], s=3, c=shades, linewidths=0)
    axes.scatter(plane.centroids[:, 0], plane.centroids[:, 1], s=24, c="black", marker="x")
    first, second = plane.explained
    axes.set_xlabel(f"first principal component ({first:.0%} of the variance)")
    axes.set_ylabel(f"second ({second:.0%})")
    axes.set_title(f"{len(plane.points)} features, centroids as crosses", fontsize=10)
    _save(figure, path)


def _log(folder: Path, out: Path, figures: dict[str, Any], text: str | None) -> None:
    """The same for TensorBoard."""
    import shutil

    from PIL import Image
    from torch.utils.tensorboard import SummaryWriter

    shutil.rmtree(folder, ignore_errors=True)
    with SummaryWriter(folder) as writer:
        for path in (
            out / f"{name}.png" for name in _PICTURES if text is None or name != "members"
        ):
            with Image.open(path) as picture:
                pixels = np.asarray(picture.convert("RGB"))
            writer.add_image(f"inspect/{path.stem}", pixels, 0, dataformats="HWC")
        if text is not None:
            writer.add_text("inspect/members", text, 0)
        for entry in figures["elbow"]:
            for part in ("fitted", "held_out"):
                writer.add_scalar(f"inspect/elbow_{part}", entry[part], entry["num_clusters"])


def _print(figures: dict[str, Any], out: Path) -> None:
    print(f"{figures['used']} of {len(figures['usage'])} clusters used")
    print(f"usage entropy {figures['usage_entropy_bits']:.3f} bits")
    for name, bits in figures["neighbour_information_bits"].items():
        print(f"mutual information of {name} neighbours {bits:.3f} bits")
    print(f"files in {out}: {', '.join(sorted(path.name for path in out.iterdir()))}")


def _pyplot() -> Any:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt


def _save(figure: Any, path: Path) -> None:
    figure.tight_layout()
    with atomic_path(path) as partial:
        figure.savefig(partial, format="png", dpi=130)
    _pyplot().close(figure)


if __name__ == "__main__":
    sys.exit(main())
