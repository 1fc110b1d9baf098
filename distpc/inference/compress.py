"""Lossless compression: arithmetic coding of samples with a circuit's own conditionals.

Encoder and decoder walk through the variables in one order and compute every distribution with the
same code on batches of one shape (`circuits.incremental`), so both see the same bits; a last batch
that is not full is padded with zeros. What may change these bits (model, versions, processor,
threads) is in the header and compared; a checksum of the tables that were used, a batch, and one of
the values tell when a decode went wrong all the same.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import platform
import time
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from typing import Any

import numpy as np
import torch
from torch import Tensor

from distpc.circuits.circuit import Circuit
from distpc.circuits.incremental import Incremental
from distpc.errors import DataError, EvidenceError
from distpc.inference import coder
from distpc.inference.compressed_file import Header, from_bytes, to_bytes, values_digest
from distpc.parallel.progress import Progress

BATCH_SIZE = 256


@dataclass(frozen=True)
class Compressed:
    """Samples as a file's content.

    Attributes:
        content: all bytes of the file.
        header: what the file says of itself.
        header_bytes: bytes that are not code.
        code_bits: bits of the code.
        model_bits: -log2 likelihood of the values that are there, by the chain rule in float64; inf
            where the model calls a value impossible.
        seconds: time spent.
    """

    content: bytes
    header: Header
    header_bytes: int
    code_bits: int
    model_bits: float
    seconds: float


def compress(
    circuit: Circuit,
    x: Tensor | np.ndarray,
    *,
    batch_size: int = BATCH_SIZE,
    source: dict[str, Any] | None = None,
) -> Compressed:
    """Code samples without loss.

    Args:
        circuit: the model, whose variables are all categorical.
        x: (N, V) integers, -1 where missing.
        batch_size: samples that are computed at once, here and when decoding.
        source: dtype and shape of the array that `x` came from.

    Raises:
        EvidenceError: a real variable, or values that do not fit the circuit.
        ResourceError: the library of the extra `compress` is not installed.
    """
    check(circuit)
    if batch_size < 1:
        raise EvidenceError("no such batch size", found=batch_size, expected="1, 2, ...")
    x = circuit.reader.read(x).codes.t().contiguous().cpu()
    if not len(x):
        raise EvidenceError("there are no samples", expected="at least one row")
    batch_size = min(batch_size, len(x))
    num_missing = int((x == coder.MISSING).sum())
    start = time.perf_counter()
    words, batches, bits = [], [], 0.0
    with _one_thread(), Progress("compress", len(x), "samples") as progress:
        model = Incremental(circuit)
        for rows in x.split(batch_size):
            padded = torch.zeros(batch_size, x.shape[1], dtype=torch.int64)
            padded[: len(rows)] = rows
            encoder = coder.Encoder(padded.to(circuit.device), len(rows), num_missing / x.numel())
            model.run(batch_size, encoder)
            words.append(encoder.words())
            batches.append([len(words[-1]), encoder.checksum])
            bits += encoder.bits
            progress.advance(len(rows), bits_per_value=32 * len(words[-1]) / rows.numel())
    code = np.concatenate(words)
    header = Header(
        num_samples=len(x),
        num_variables=x.shape[1],
        batch_size=batch_size,
        precision=coder.PRECISION,
        order=list(model.order),
        num_missing=num_missing,
        model=model_digest(circuit),
        numerics=numerics(circuit),
        batches=batches,
        code_sha256=hashlib.sha256(code.astype("<u4").tobytes()).hexdigest(),
        values_sha256=values_digest(x.numpy()),
        dataset={k: circuit.dataset.get(k) for k in ("name", "kind", "image_shape", "color")},
        source=source or {},
    )
    content, header_bytes = to_bytes(header, code)
    seconds = time.perf_counter() - start
    return Compressed(content, header, header_bytes, 32 * len(code), bits, seconds)


def check(circuit: Circuit) -> None:
    """Refuse a circuit whose samples cannot be coded, or not here (see `compress`)."""
    coder.constriction()
    coder.check_categories(circuit.num_categories)


def decompress(
    circuit: Circuit, content: bytes, *, where: object = None, force: bool = False
) -> tuple[Tensor, Header]:
    """The samples in a file's content, (N, V) int64 with -1 where missing, and its header.

    Args:
        circuit: the model that they were compressed with.
        where: names the file in errors.
        force: try even if versions or the processor differ; a wrong result is an error as ever.

    Raises:
        DataError: another kind of file, cut, damaged, of another model, of other numeric
            settings, or one whose decoded values are not those that were compressed.
        FormatVersionError: written by another version of distpc.
        ResourceError: the library of the extra `compress` is not installed.
    """
    coder.constriction()
    header, words = from_bytes(content, where)
    _check_fit(circuit, header, where, force)
    parts = []
    with _one_thread(), Progress("decompress", header.num_samples, "samples") as progress:
        model = Incremental(circuit, header.order)
        first = 0
        for number, (size, checksum) in enumerate(header.batches):
            done = number * header.batch_size
            num_samples = min(header.batch_size, header.num_samples - done)
            decoder = coder.Decoder(
                words[first : first + size],
                (header.batch_size, header.num_variables),
                num_samples,
                header.missing_fraction,
            )
            _decode(model, decoder, checksum, f"{where}, batch {number}")
            parts.append(decoder.x[:num_samples])
            first += size
            progress.advance(num_samples)
    x = torch.cat(parts)
    if values_digest(x.numpy()) != header.values_sha256:
        raise _went_wrong(where)
    return x, header


def model_digest(circuit: Circuit) -> str:
    """SHA-256 of everything that the circuit's distributions follow from."""
    facts = [circuit.graph.to_json(), circuit.num_categories, circuit.smoothing]
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode())
    for name, tensor in sorted(circuit.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def numerics(circuit: Circuit) -> dict[str, Any]:
    """Versions and settings on which the last bits of a distribution may depend."""
    device = circuit.device
    return {
        "torch": torch.__version__,
        "constriction": metadata.version("constriction"),
        "machine": platform.machine(),
        "vector_instructions": torch.backends.cpu.get_cpu_capability(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "dtype": "float64",
        "threads": 1,
    }


def _check_fit(circuit: Circuit, header: Header, where: object, force: bool) -> None:
    shape = {"num_variables": header.num_variables, "precision": header.precision}
    own = {"num_variables": circuit.num_variables, "precision": coder.PRECISION}
    found = {**shape, "model": header.model}
    expected = {**own, "model": model_digest(circuit)}
    for name, value in found.items():
        if value != expected[name]:
            raise DataError(
                "the samples were compressed with another model",
                where=f"{where}, header field '{name}'",
                found=value,
                expected=f"{expected[name]} as in the model given",
                fix="name the model folder that the samples were compressed with",
            )
    for name, value in numerics(circuit).items():
        if header.numerics.get(name) != value and not force:
            raise DataError(
                "the samples were compressed where numbers are rounded in another way",
                where=f"{where}, header field 'numerics.{name}'",
                found=header.numerics.get(name),
                expected=f"{value} as here",
                fix="decompress with what the header names, or try --force: what is decoded "
                "wrongly is noticed and not written",
            )


def _decode(model: Incremental, decoder: coder.Decoder, checksum: int, where: str) -> None:
    try:
        model.run(len(decoder.x), decoder)
    except DataError as error:
        raise _went_wrong(where) from error
    if decoder.checksum != checksum:
        raise _went_wrong(where)


def _went_wrong(where: object) -> DataError:
    # The code's own digest was right, so it is the tables that differ.
    return DataError(
        "the distributions came out otherwise than when the samples were compressed",
        where=where,
        found="values or tables of another checksum; nothing was written",
        fix="decompress on the machine, and with the versions, that the samples were compressed on",
    )


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """Products cut into other pieces are rounded otherwise: one thread, wherever this runs."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
