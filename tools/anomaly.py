#!/usr/bin/env python3
"""Anomaly scores of images: how well a model tells another data set from its own.

    python tools/anomaly.py MODEL NORMAL OTHER [--num 2000] [--json]
    python tools/anomaly.py runs/fashion_mnist/model datasets/fashion_mnist datasets/mnist

MODEL is the folder of a model trained on NORMAL; NORMAL and OTHER are folders of IDX files (as
tools/get_data.py brings them) or IDX files. Every score is higher for what looks more anomalous:

* surprise: -log2 p(x), in bits.
* surprise_reversed: its negative. Simple images are likely under models of complicated ones
  (Nalisnick et al., 2019), so that plain likelihood may be worse than a coin.
* typicality: the distance of log2 p(x) from its mean over training images of NORMAL (after
  Nalisnick et al., 2019, with batches of one image).
* surprise_less_png: -log2 p(x) less the bits of the image's PNG, which stands for how complicated
  it is (Serra et al., 2020).

The area under the ROC curve is the chance that an image of OTHER scores above one of NORMAL.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from scipy.stats import rankdata

from distpc.data.png import encode_png
from distpc.data.sources.idx import read_idx_images
from distpc.errors import DataError, DistpcError, EvidenceError

if TYPE_CHECKING:
    from distpc.circuits.circuit import Circuit


def images_in(path: Path, split: str) -> np.ndarray:
    """(N, height, width, channels) uint8 of an IDX file, or of a folder's `split` images.

    Raises:
        DataError: there is no such file, or several, or it is broken.
    """
    if path.is_file():
        return read_idx_images(path)
    found = sorted(path.glob(f"{split}*images*")) if path.is_dir() else []
    if len(found) != 1:
        raise DataError(
            "one IDX file of images is needed",
            where=path,
            found=[file.name for file in found] or "none",
            expected=f"a file, or a folder with one {split}-images-idx3-ubyte[.gz]",
            fix="python tools/get_data.py NAME",
        )
    return read_idx_images(found[0])


def log2_prob(circuit: Circuit, images: np.ndarray, where: Path) -> np.ndarray:
    """(N,) float64 bits."""
    if math.prod(images.shape[1:]) != circuit.num_variables:
        raise EvidenceError(
            "images of another size than the model's",
            where=where,
            found=images.shape[1:],
            expected=f"{circuit.num_variables} values an image",
        )
    x = torch.from_numpy(images.reshape(len(images), -1).astype(np.int64))
    result: np.ndarray = circuit.log_prob(x).double().cpu().numpy() / math.log(2)
    return result


def png_bits(images: np.ndarray) -> np.ndarray:
    """(N,) bits of each image's PNG file."""
    return np.array([8.0 * len(encode_png(image)) for image in images])


def area_under_curve(normal: np.ndarray, other: np.ndarray) -> float:
    """The chance that a score of `other` is above one of `normal` (ties count half)."""
    ranks = rankdata(np.concatenate([normal, other]))[len(normal) :]
    above = ranks.sum() - len(other) * (len(other) + 1) / 2
    return float(above / (len(normal) * len(other)))


def areas(
    circuit: Circuit, normal: np.ndarray, other: np.ndarray, train: np.ndarray, paths: list[Path]
) -> dict[str, float]:
    """The area under the curve of each score."""
    bits = [log2_prob(circuit, x, path) for x, path in zip((normal, other), paths, strict=True)]
    typical = log2_prob(circuit, train, paths[0])
    # Images of probability 0 are as far from typical as can be, and not part of the mean.
    centre = typical[np.isfinite(typical)].mean()
    scores = {
        "surprise": [-b for b in bits],
        "surprise_reversed": bits,
        "typicality": [np.abs(b - centre) for b in bits],
        "surprise_less_png": [-b - png_bits(x) for b, x in zip(bits, (normal, other), strict=True)],
    }
    return {name: area_under_curve(*pair) for name, pair in scores.items()}


def run(options: argparse.Namespace) -> None:
    import distpc

    circuit = distpc.load(options.model)
    normal = images_in(options.normal, "t10k")[: options.num]
    other = images_in(options.other, "t10k")[: options.num]
    train = images_in(options.normal, "train")[: options.num]
    found = areas(circuit, normal, other, train, [options.normal, options.other])
    if options.json:
        counts = {"normal_images": len(normal), "other_images": len(other)}
        print(json.dumps({**counts, "area_under_curve": found}, indent=2))
        return
    print(f"{len(normal)} images of {options.normal} against {len(other)} of {options.other}")
    for name, area in found.items():
        print(f"  {name:20s} area under the curve {area:.4f}")


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path, help="model folder")
    parser.add_argument("normal", type=Path, help="data like those that the model was trained on")
    parser.add_argument("other", type=Path, help="data to tell from them")
    parser.add_argument("--num", type=int, help="images of each (default: all test images)")
    parser.add_argument("--json", action="store_true", help="print JSON")
    options = parser.parse_args()
    try:
        run(options)
    except DistpcError as error:
        print(f"anomaly: {type(error).__name__}: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
