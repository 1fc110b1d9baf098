"""The file of compressed samples: a short prelude, a header, the code.

4 bytes   magic "DPCZ"
uint16    format version            (all numbers little-endian)
uint32    bytes of the header
uint32    CRC-32 of the header
header    JSON, deflated (see `Header`)
code      32-bit words, batch after batch
"""

from __future__ import annotations

import hashlib
import json
import struct
import zlib
from dataclasses import asdict, dataclass, fields
from typing import Any

import numpy as np

from distpc.errors import DataError, FormatVersionError

MAGIC = b"DPCZ"
FORMAT_VERSION = 1
PRELUDE = struct.Struct("<4sHII")
MAX_HEADER_BYTES = 2**28


@dataclass(frozen=True)
class Header:
    """What a decoder has to know and to check.

    Attributes:
        num_samples: N.
        num_variables: V.
        batch_size: B, samples that are computed at once; the last batch is padded to it.
        precision: bits of the tables' counts.
        order: of the variables.
        num_missing: values that are missing; above 0 every table has a symbol more.
        model: SHA-256 of the model.
        numerics: versions and settings on which the last bits of the tables may depend.
        batches: for each batch [words of code, checksum of symbols and counts].
        code_sha256: of the code.
        values_sha256: of the values, (N, V) int32.
        dataset: name, kind, image_shape and color of the model's data set.
        source: dtype and shape of the array that was compressed.
    """

    num_samples: int
    num_variables: int
    batch_size: int
    precision: int
    order: list[int]
    num_missing: int
    model: str
    numerics: dict[str, Any]
    batches: list[list[int]]
    code_sha256: str
    values_sha256: str
    dataset: dict[str, Any]
    source: dict[str, Any]

    @property
    def missing_fraction(self) -> float:
        """Share of values that are missing."""
        return self.num_missing / (self.num_samples * self.num_variables)


def values_digest(x: np.ndarray) -> str:
    """SHA-256 of (N, V) values, whatever their type."""
    return hashlib.sha256(x.astype("<i4").tobytes()).hexdigest()


def to_bytes(header: Header, words: np.ndarray) -> tuple[bytes, int]:
    """The file's content, and how many of its bytes are not code."""
    text = json.dumps(asdict(header), separators=(",", ":")).encode()
    packed = zlib.compress(text, 9)
    prelude = PRELUDE.pack(MAGIC, FORMAT_VERSION, len(packed), zlib.crc32(packed))
    return prelude + packed + words.astype("<u4").tobytes(), len(prelude) + len(packed)


def from_bytes(content: bytes, where: object) -> tuple[Header, np.ndarray]:
    """The header and the words of a file's content.

    Raises:
        DataError: another kind of file, cut, or changed since it was written.
        FormatVersionError: written by another version of distpc.
    """
    if content[:4] != MAGIC:
        raise DataError(
            "not a file of compressed samples",
            where=where,
            found=f"first bytes {content[:4].hex() or '(none)'}",
            expected=f"{MAGIC.hex()} ({MAGIC.decode()})",
            fix="name a file that distpc compress wrote",
        )
    if len(content) < PRELUDE.size:
        raise _damaged(where, f"{len(content)} bytes", f"at least {PRELUDE.size} bytes")
    _, version, size, checksum = PRELUDE.unpack_from(content)
    if version != FORMAT_VERSION:
        raise FormatVersionError(
            "compressed samples have a format version that this code does not read",
            where=where,
            found=version,
            expected=FORMAT_VERSION,
            fix="use the version of distpc that wrote the file",
        )
    packed, code = content[PRELUDE.size :][:size], content[PRELUDE.size + size :]
    if len(packed) != size or zlib.crc32(packed) != checksum:
        raise _damaged(where, f"a header of {len(packed)} bytes", f"{size} bytes, CRC {checksum}")
    header = _header(packed, where)
    expected = 4 * sum(words for words, _ in header.batches)
    if len(code) != expected:
        raise _damaged(where, f"{len(code)} bytes of code", f"{expected} bytes")
    digest = hashlib.sha256(code).hexdigest()
    if digest != header.code_sha256:
        raise _damaged(where, f"code of SHA-256 {digest[:16]}...", f"{header.code_sha256[:16]}...")
    return header, np.frombuffer(code, "<u4").astype(np.uint32)


def _header(packed: bytes, where: object) -> Header:
    try:
        inflated = zlib.decompressobj()
        text = inflated.decompress(packed, MAX_HEADER_BYTES)
        header = Header(**json.loads(text))
        _check_types(header)
    except (zlib.error, ValueError, TypeError) as error:
        # The checksum was right: whoever wrote this was no distpc of this version.
        names = ", ".join(field.name for field in fields(Header))
        raise _damaged(where, f"a header that cannot be read: {error}", names) from error
    return header


def _check_types(header: Header) -> None:
    counts = (header.num_samples, header.num_variables, header.batch_size)
    if not all(isinstance(count, int) and count > 0 for count in counts):
        raise ValueError(f"counts {counts}")
    if sorted(header.order) != list(range(header.num_variables)):
        raise ValueError("an order that does not name every variable once")
    if len(header.batches) != -(-header.num_samples // header.batch_size):
        raise ValueError(f"{len(header.batches)} batches")
    if not all(len(batch) == 2 and batch[0] >= 0 for batch in header.batches):
        raise ValueError("batches without words")
    if not isinstance(header.numerics, dict) or not isinstance(header.source, dict):
        raise ValueError("fields of another type")


def _damaged(where: object, found: str, expected: str) -> DataError:
    return DataError(
        "a file of compressed samples is cut or damaged",
        where=where,
        found=found,
        expected=expected,
        fix="copy the file again; nothing was decoded",
    )
