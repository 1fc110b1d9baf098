"""Data and trees of `bench_gpu_bpd.py` in one small file, made beforehand on any machine."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path
from typing import NamedTuple

import numpy as np

from distpc.structures.chow_liu import chow_liu_tree
from distpc.structures.discretize import discretize
from distpc.structures.tree import Tree

SIZES = {"mnist": (36_864, 2_048), "fashion_mnist": (14_336, 2_048), "cifar": (49_152, 2_048)}
"""Samples to train on and to test on: some 23 MB together."""
PATCH = 8
"""Side of a patch of CIFAR, three colours."""
NUM_BINS, MAX_TREE_SAMPLES = 16, 10_000
"""How pairs of variables are counted for the tree."""


class Set(NamedTuple):
    """One data set.

    Attributes:
        train, test: (N, V) uint8.
        tree: the Chow-Liu tree of the training data.
    """

    train: np.ndarray
    test: np.ndarray
    tree: Tree


def make(
    path: Path,
    folder: Path,
    cifar: Path | None,
    names: list[str] | None = None,
    seed: int = 0,
) -> None:
    """Write the file, or some sets of one that is there.

    Args:
        path: an `.npz`.
        folder: where `tools/get_data.py` has put mnist and fashion_mnist.
        cifar: `train.tar.gz` and `test.tar.gz` with pictures of 32 x 32; None: leave it out.
        names: sets to make; None: all.
        seed: which samples are taken.
    """
    arrays = dict(np.load(path)) if path.exists() else {}
    for name, sizes in SIZES.items():
        if (name == "cifar" and cifar is None) or (names and name not in names):
            continue
        rng = np.random.default_rng(seed)
        for part, size in zip(("train", "test"), sizes, strict=True):
            images = _patches(cifar, part, size, rng) if name == "cifar" else None
            if images is None:
                images = _images(folder / name, part)
                images = images[np.sort(rng.permutation(len(images))[:size])]
            arrays[f"{name}/{part}"] = images.reshape(size, -1)
        train = arrays[f"{name}/train"].astype(np.int64)
        few = train[:MAX_TREE_SAMPLES]
        rows, values = discretize(few, [256] * train.shape[1], NUM_BINS)
        arrays[f"{name}/parents"] = np.array(chow_liu_tree(rows, values).parents, dtype=np.int32)
    np.savez_compressed(path, **arrays)  # type: ignore[arg-type]


def load(path: Path) -> dict[str, Set]:
    """The sets of a file that `make` wrote, by name."""
    with np.load(path) as arrays:
        names = dict.fromkeys(key.split("/")[0] for key in arrays)
        return {
            name: Set(
                arrays[f"{name}/train"],
                arrays[f"{name}/test"],
                Tree(tuple(arrays[f"{name}/parents"].tolist())),
            )
            for name in names
        }


def _images(folder: Path, part: str) -> np.ndarray:
    from distpc.data.sources.idx import read_idx_images

    prefix = "train" if part == "train" else "t10k"
    (file,) = folder.glob(f"{prefix}-images*")
    return read_idx_images(file)


def _patches(archive: Path | None, part: str, size: int, rng: np.random.Generator) -> np.ndarray:
    """(size, PATCH, PATCH, 3): a random patch of each of the first pictures of every class."""
    from PIL import Image

    assert archive is not None
    patches = []
    with tarfile.open(archive / f"{part}.tar.gz") as tar:
        names = sorted(name for name in tar.getnames() if name.endswith(".jpg"))
        wanted = set(names[:: max(1, len(names) // size)][:size])
        for member in tar:
            if member.name in wanted:
                file = tar.extractfile(member)
                assert file is not None
                picture = np.asarray(Image.open(io.BytesIO(file.read())).convert("RGB"))
                top, left = rng.integers(0, 33 - PATCH, 2)
                patches.append(picture[top : top + PATCH, left : left + PATCH])
    return np.stack(patches)
