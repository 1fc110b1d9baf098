"""One sample as bytes in a shard: images as PNG, rows of text and tables as NPY."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from distpc.data.color import from_rgb
from distpc.data.png import SizeMismatchError, decode_png, encode_png
from distpc.data.spec import MISSING, DatasetSpec
from distpc.errors import DataError


class SampleCodec:
    """Translates samples between the values of a data set and the bytes in its shards.

    Images are stored as they came (grey or RGB) and change their colour space when read, so that
    shards stay viewable with any image program.

    Attributes:
        extension: of a sample's file in the shard.
        dtype: of decoded samples: int16, int32 where categories need it, float32 with real columns.
    """

    def __init__(self, spec: DatasetSpec) -> None:
        self.spec = spec
        self.extension = "png" if spec.kind == "image" else "npy"
        self.dtype = value_dtype(spec)
        self._tops = np.array(
            [np.inf if count is None else count - 1 for count in spec.num_categories]
        )
        self._decode_one: Callable[[bytes], np.ndarray]
        if spec.image_shape is not None:
            self._decode_one = self._decode_png
        else:
            self._header = _npy_bytes(np.zeros(spec.num_variables, self.dtype))[: -self._num_bytes]
            self._decode_one = self._decode_npy

    @property
    def _num_bytes(self) -> int:
        return self.spec.num_variables * self.dtype.itemsize

    def encode(self, values: np.ndarray) -> bytes:
        """The file of one sample: (V,) values, for images as stored (RGB before any colour)."""
        if self.spec.image_shape is None:
            return self._header + values.astype(self.dtype).tobytes()
        return encode_png(values.astype(np.uint8).reshape(self.spec.image_shape))

    def decode(self, files: Sequence[bytes], keys: Sequence[str], shard: Path | str) -> np.ndarray:
        """(N, V) values of N samples' files, in the data set's colour space and checked.

        Raises:
            DataError: naming `shard` and the key of a file that cannot be decoded, is of another
                size, or holds a value outside its variable's categories.
        """
        stored = np.empty(
            (len(files), self.spec.num_variables),
            np.uint8 if self.spec.image_shape is not None else self.dtype,
        )
        for row, data in enumerate(files):
            try:
                stored[row] = self._decode_one(data)
            except SizeMismatchError as error:
                raise DataError(
                    "a sample is not of the data set's size",
                    where=f"{shard}, key {keys[row]}",
                    found=error.found,
                    expected=error.expected,
                    fix="remove the shards stage's folder and run the same command again",
                ) from error
            except (OSError, SyntaxError, ValueError, EOFError, zlib.error, struct.error) as error:
                raise DataError(
                    f"a sample's {self.extension} file cannot be decoded",
                    where=f"{shard}, key {keys[row]}",
                    found=error,
                    fix="remove the shards stage's folder and run the same command again",
                ) from error
        values = self._finish(stored)
        self._check_range(values, keys, shard)
        return values

    def _finish(self, stored: np.ndarray) -> np.ndarray:
        if self.spec.image_shape is None:
            return stored
        if self.spec.color == "as_is":
            return stored.astype(self.dtype)
        pixels = stored.reshape(len(stored), *self.spec.image_shape)
        return from_rgb(pixels, self.spec.color).reshape(stored.shape)

    def _check_range(self, values: np.ndarray, keys: Sequence[str], shard: Path | str) -> None:
        bad = out_of_range(values, self._tops)
        if self.spec.has_missing:
            bad &= ~(np.isnan(values) if values.dtype.kind == "f" else values == MISSING)
        if not bad.any():
            return
        row, variable = (int(number) for number in np.argwhere(bad)[0])
        count = self.spec.num_categories[variable]
        raise DataError(
            "a value lies outside its variable's categories",
            where=f"{shard}, key {keys[row]}, variable {variable}",
            found=values[row, variable],
            expected="a finite number" if count is None else f"0 .. {count - 1}",
            fix="remove the shards stage's folder and run the same command again",
        )

    def _decode_png(self, data: bytes) -> np.ndarray:
        assert self.spec.image_shape is not None
        return decode_png(data, self.spec.image_shape).reshape(-1)

    def _decode_npy(self, data: bytes) -> np.ndarray:
        if data.startswith(self._header) and len(data) == len(self._header) + self._num_bytes:
            return np.frombuffer(data, self.dtype, offset=len(self._header))
        return self._decode_foreign_npy(data)

    def _decode_foreign_npy(self, data: bytes) -> np.ndarray:
        """A row whose header is spelt otherwise, as other numpy versions may do."""
        stream = io.BytesIO(data)
        if np.lib.format.read_magic(stream) != (1, 0):
            raise ValueError("not a NPY file of version 1.0")
        shape, _, dtype = np.lib.format.read_array_header_1_0(stream)
        # Before anything of that shape is allocated; object arrays (pickles) end here as well.
        if shape != (self.spec.num_variables,) or dtype != self.dtype:
            raise SizeMismatchError(
                f"shape {shape} of {dtype}", f"shape ({self.spec.num_variables},) of {self.dtype}"
            )
        content = stream.read()
        if len(content) != self._num_bytes:
            raise ValueError(f"{len(content)} bytes of values instead of {self._num_bytes}")
        return np.frombuffer(content, self.dtype)


def value_dtype(spec: DatasetSpec) -> np.dtype:
    """The smallest of int16, int32 and float32 that holds every value of the data set."""
    if not spec.is_discrete:
        return np.dtype("<f4")
    most = max(count for count in spec.num_categories if count is not None)
    return np.dtype("<i2") if most <= 2**15 else np.dtype("<i4")


def out_of_range(values: np.ndarray, tops: np.ndarray) -> np.ndarray:
    """(N, V) bool: which of (N, V) values their variables do not have; missing ones among them.

    Args:
        values: integers, or floats where there are real columns.
        tops: (V,) largest category of each variable, infinite for real ones.
    """
    if values.dtype.kind != "f":
        return (values < 0) | (values > tops.astype(values.dtype))
    off_grid = (values < 0) | (values > tops) | (values != np.floor(values))
    return ~np.isfinite(values) | (np.isfinite(tops) & off_grid)


def _npy_bytes(row: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, row, allow_pickle=False)
    return buffer.getvalue()
