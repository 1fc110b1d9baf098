"""Images in IDX files, the format of MNIST and Fashion-MNIST, gzipped or not.

Header: two zero bytes, the type of the values (8: unsigned byte), the number of dimensions, then
each dimension as a big-endian 32-bit integer; the values follow, last dimension fastest.
"""

from __future__ import annotations

import gzip
import math
import struct
import zlib
from pathlib import Path
from typing import IO, Any, cast

import numpy as np

from distpc.config.sources import IdxSource
from distpc.data.sources.base import Source, existing
from distpc.data.spec import DatasetSpec
from distpc.errors import DataError

UNSIGNED_BYTE = 8
MAX_GZIP_RATIO = 1100
"""Deflate shrinks nothing further than about 1032 to 1."""


class Idx(Source):
    """Training images and, if given, the published test images behind them."""

    def __init__(self, config: IdxSource) -> None:
        self._paths = [existing(config.train_images, "train_images")]
        if config.test_images is not None:
            self._paths.append(existing(config.test_images, "test_images"))
        parts = [read_idx_images(path) for path in self._paths]
        if len(parts) == 2 and parts[0].shape[1:] != parts[1].shape[1:]:
            raise DataError(
                "train and test images differ in size",
                where=self._paths[1],
                found=parts[1].shape[1:],
                expected=f"{parts[0].shape[1:]} as in {self._paths[0]}",
            )
        self._parts = parts
        self.num_samples = sum(len(part) for part in parts)
        self.num_published_test = len(parts[1]) if len(parts) == 2 else 0
        height, width, channels = parts[0].shape[1:]
        self.spec = DatasetSpec(
            name=self._paths[0].resolve().parent.name or "idx",
            kind="image",
            num_variables=height * width * channels,
            num_categories=(256,) * (height * width * channels),
            image_shape=(height, width, channels),
        )

    def read(self, position: int) -> np.ndarray:
        """(V,) uint8."""
        first = len(self._parts[0])
        if position < first:
            return self._parts[0][position].reshape(-1)
        return self._parts[1][position - first].reshape(-1)

    def identity(self) -> dict[str, Any]:
        """Shape and checksum of every file's content."""
        # A list: train/images and test/images have the same name.
        return {
            "files": [
                {"name": path.name, "shape": list(part.shape), "crc32": zlib.crc32(part.data)}
                for path, part in zip(self._paths, self._parts, strict=True)
            ]
        }


def read_idx_images(path: Path) -> np.ndarray:
    """(N, height, width, channels) uint8 from an IDX file of 3 or 4 dimensions.

    Raises:
        DataError: not an IDX file of images in unsigned bytes, cut, or longer than it says.
    """
    with path.open("rb") as raw:
        is_gzip = raw.read(2) == b"\x1f\x8b"
        raw.seek(0)
        try:
            return _read_images(
                cast("IO[bytes]", gzip.GzipFile(fileobj=raw)) if is_gzip else raw, path
            )
        except (EOFError, OSError, zlib.error) as error:
            raise DataError(
                "an IDX file cannot be read to its end",
                where=path,
                found=error,
                fix="bring the file again (tools/get_data.py NAME)",
            ) from error


def _read_images(stream: IO[bytes], path: Path) -> np.ndarray:
    head = stream.read(4)
    num_dimensions = head[3] if len(head) == 4 else 0
    if head[:3] != bytes([0, 0, UNSIGNED_BYTE]) or num_dimensions not in (3, 4):
        raise DataError(
            "not an IDX file of images",
            where=path,
            found=f"first bytes {head.hex() or '(none)'}",
            expected="00000803 (grey images) or 00000804 (with channels)",
            fix="give the *-images-idx3-ubyte file, not the labels",
        )
    dimensions = stream.read(4 * num_dimensions)
    if len(dimensions) < 4 * num_dimensions:
        raise EOFError("cut inside the header")
    shape = struct.unpack(f">{num_dimensions}I", dimensions)
    size = math.prod(shape)
    channels = shape[3] if num_dimensions == 4 else 1
    if not size or channels not in (1, 3):
        raise DataError(
            "an IDX file's images have no pixels, or neither 1 nor 3 channels",
            where=path,
            found=f"dimensions {shape}",
        )
    # A header may promise anything: reading allocates that much, so look at the file first. One
    # byte more than promised is enough to see surplus without unpacking a bomb.
    plausible = size <= path.stat().st_size * MAX_GZIP_RATIO
    content = stream.read(size + 1) if plausible else b""
    if len(content) != size:
        raise DataError(
            "an IDX file is not as long as its header says",
            where=path,
            found="more bytes" if len(content) > size else "fewer bytes: the file is cut",
            expected=f"{size} bytes: {shape}",
            fix="bring the file again (tools/get_data.py NAME)",
        )
    return np.frombuffer(content, np.uint8).reshape(*shape[:3], channels)
