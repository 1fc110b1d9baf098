"""The commands that compress and decompress files of samples."""

from __future__ import annotations

import secrets
import shutil
import time
from pathlib import Path

import numpy as np

from distpc.artifacts.files import write_bytes
from distpc.circuits.circuit import Circuit
from distpc.circuits.io import load_model
from distpc.data.pictures import from_display, to_display
from distpc.data.spec import DatasetSpec
from distpc.errors import DataError, EvidenceError
from distpc.inference.compress import BATCH_SIZE, Compressed, check, compress, decompress
from distpc.inference.compressed_file import Header
from distpc.inference.model import image_shape, spec_of
from distpc.inference.sample_files import read_samples, restore
from distpc.inference.tables import write_npy


def compress_command(
    model_dir: Path,
    data: str,
    out: Path,
    *,
    num: int | None = None,
    batch_size: int = BATCH_SIZE,
) -> Compressed:
    """Compress samples into the file `out` and print what they came to.

    Args:
        model_dir: the model's folder.
        data: what `sample_files.read_samples` reads.
        out: the file.
        num: samples, the first ones; None: all.
        batch_size: samples that are computed at once.

    Raises:
        EvidenceError: samples that do not fit the model, or variables that cannot be coded.
        ModelFileError: the model cannot be read.
    """
    circuit, spec = _open(model_dir)
    check(circuit)
    x, source = read_samples(str(data), spec, Path(model_dir), num)
    result = compress(circuit, x, batch_size=batch_size, source=source)
    write_bytes(Path(out), result.content)
    print(f"wrote {out}: {_summary(result)}")
    return result


def decompress_command(model_dir: Path, file: Path, out: Path, *, force: bool = False) -> Path:
    """Restore the samples of a compressed file.

    Args:
        model_dir: the folder of the model that they were compressed with.
        file: what `compress_command` wrote.
        out: .npy for the array as it was; or, without a suffix, a new folder that gets a .png of
            every image.
        force: try even if versions or the processor differ.

    Raises:
        DataError: the file is of another kind, cut, damaged, or of another model or machine.
        EvidenceError: `out` cannot hold the model's data.
        ModelFileError: the model cannot be read.
    """
    file, out = Path(file), Path(out)
    circuit, spec = _open(model_dir)
    _check_target(out, spec)
    try:
        content = file.read_bytes()
    except FileNotFoundError as error:
        raise DataError("there is no such file", where=file) from error
    start = time.perf_counter()
    x, header = decompress(circuit, content, where=file, force=force)
    speed = len(x) / (time.perf_counter() - start)
    _write(out, x.numpy(), header, spec)
    print(f"wrote {out}: {len(x)} samples, {speed:.3g} a second, equal to the originals")
    return out


def _open(model_dir: Path) -> tuple[Circuit, DatasetSpec]:
    """A model on the processor, where the results are the same from run to run."""
    circuit = load_model(Path(model_dir)).eval()
    return circuit, spec_of(circuit)


def _summary(result: Compressed) -> str:
    header = result.header
    values = header.num_samples * header.num_variables
    return (
        f"{header.num_samples} samples in {len(result.content):,} bytes, "
        f"{result.header_bytes:,} of them header\n"
        f"  code        {result.code_bits / values:.4f} bits a value\n"
        f"  likelihood  {result.model_bits / values:.4f} bits a value\n"
        f"  {header.num_samples / result.seconds:.3g} samples a second"
    )


def _check_target(out: Path, spec: DatasetSpec) -> None:
    """Refuse what could not be written before anything is decoded."""
    if out.suffix == "":
        image_shape(spec)
        if out.exists():
            raise EvidenceError(
                "pictures go into a new folder", where=out, found="something is there already"
            )
    elif out.suffix != ".npy":
        raise EvidenceError(
            "the output is of an unknown kind",
            where=out,
            found=out.suffix,
            expected=".npy, or a folder for .png files",
        )


def _write(out: Path, x: np.ndarray, header: Header, spec: DatasetSpec) -> None:
    if out.suffix == ".npy":
        write_npy(out, restore(x, header.source) if header.source else x)
        return
    pictures = to_display(x, spec)
    if header.num_missing or not np.array_equal(from_display(pictures, spec), x):
        raise EvidenceError(
            "pictures cannot hold these values exactly",
            where=out,
            found=f"{header.num_missing} missing values, colours '{spec.color}'",
            fix="write a .npy",
        )
    _write_pictures(out, pictures)


def _write_pictures(folder: Path, pictures: np.ndarray) -> None:
    """A .png of every image in a new folder, all of them or none."""
    from PIL import Image

    partial = folder.with_name(f".{folder.name}.{secrets.token_hex(4)}.partial")
    partial.mkdir(parents=True)
    try:
        for number, picture in enumerate(pictures):
            pixels = picture[..., 0] if picture.shape[-1] == 1 else picture
            Image.fromarray(pixels).save(partial / f"{number:06d}.png")
        partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
