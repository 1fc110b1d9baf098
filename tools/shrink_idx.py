#!/usr/bin/env python3
"""Shrink images of IDX files: squares of pixels become one of their mean value.

    python tools/shrink_idx.py datasets/mnist datasets/mnist_14x14
    python tools/shrink_idx.py datasets/mnist datasets/mnist_7x7 --factor 4

Four (or more) times fewer variables: what takes an hour at 28 x 28 takes a quarter of it.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np

from distpc.artifacts.files import write_bytes
from distpc.data.sources.idx import read_idx_images
from distpc.errors import DataError


def shrink(images: np.ndarray, factor: int) -> np.ndarray:
    """(N, H, W, C) uint8 -> (N, H / factor, W / factor, C) uint8, means rounded to the nearest."""
    number, height, width, channels = images.shape
    blocks = images.reshape(number, height // factor, factor, width // factor, factor, channels)
    return (blocks.mean((2, 4)) + 0.5).astype(np.uint8)


def to_idx(images: np.ndarray) -> bytes:
    """An IDX file of grey images (N, H, W, 1)."""
    shape = images.shape[:3]
    return b"\0\0\x08\x03" + np.array(shape, ">u4").tobytes() + images.tobytes()


def main() -> None:
    """Shrink every *-images-idx3-ubyte of a folder into another one."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("source", type=Path, help="folder of IDX files, see tools/get_data.py")
    parser.add_argument("target", type=Path, help="folder of the smaller ones")
    parser.add_argument("--factor", type=int, default=2, help="pixels a side (default 2)")
    options = parser.parse_args()
    files = sorted(options.source.glob("*-images-idx3-ubyte*"))
    if not files:
        raise SystemExit(f"no *-images-idx3-ubyte in {options.source}: see tools/get_data.py")
    for file in files:
        images = read_idx_images(file)
        if options.factor < 1 or any(size % options.factor for size in images.shape[1:3]):
            raise DataError(
                "images do not part into squares of that size",
                where=file,
                found=f"{images.shape[1]} x {images.shape[2]} pixels, factor {options.factor}",
            )
        target = options.target / file.name.removesuffix(".gz")
        smaller = shrink(images, options.factor)
        write_bytes(target, to_idx(smaller))
        print(f"{target}: {smaller.shape[0]:,} images of {smaller.shape[1]} x {smaller.shape[2]}")


if __name__ == "__main__":
    main()
