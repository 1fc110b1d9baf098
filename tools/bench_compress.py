#!/usr/bin/env python3
"""How small a model makes samples, how fast, and what PNG, zlib and lzma make of the same ones.

    python tools/bench_compress.py MODEL DATA [--num N] [--batch-size B] [--json]

DATA is what `distpc compress` takes: a file, a folder of pictures, or train, valid or test. The
samples are decoded again and compared; the script fails where they differ. Bits are per value
(pixel and channel). One thread, as always when coding.
"""

from __future__ import annotations

import argparse
import io
import json
import lzma
import math
import platform
import sys
import time
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import torch

from distpc.circuits.io import load_model
from distpc.data.pictures import to_display
from distpc.data.spec import DatasetSpec
from distpc.errors import DistpcError
from distpc.inference.compress import BATCH_SIZE, compress, decompress
from distpc.inference.model import spec_of
from distpc.inference.sample_files import read_samples


def main() -> int:
    """Measure, print; 1 where samples come back changed."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("data")
    parser.add_argument("--num", type=int, help="samples, the first ones (default: all)")
    parser.add_argument("--batch-size", type=int, default=BATCH_SIZE)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args()
    try:
        figures = measure(options.model, options.data, options.num, options.batch_size)
    except DistpcError as error:
        print(f"bench_compress: {type(error).__name__}: {error}", file=sys.stderr)
        return 2
    if options.json:
        print(json.dumps(figures, indent=2))
    else:
        for name, value in figures.items():
            print(f"{name:28} {value:.5g}" if isinstance(value, float) else f"{name:28} {value}")
    return 0 if figures["bit_exact"] else 1


def measure(model_dir: Path, data: str, num: int | None, batch_size: int) -> dict[str, Any]:
    """All figures by name."""
    torch.set_num_threads(1)
    circuit = load_model(model_dir).eval()
    spec = spec_of(circuit)
    x, source = read_samples(data, spec, model_dir, num)
    packed = compress(circuit, x, batch_size=batch_size, source=source)
    start = time.perf_counter()
    found, header = decompress(circuit, packed.content, where=data)
    seconds = time.perf_counter() - start
    nats = -circuit.log_prob(x).double().sum().item()
    model_bits = nats / math.log(2) / x.numel()
    coded = packed.code_bits / x.numel()
    return {
        "machine": f"{platform.machine()}, {torch.backends.cpu.get_cpu_capability()}",
        "torch": torch.__version__,
        "num_samples": len(x),
        "num_values": x.numel(),
        "batch_size": header.batch_size,
        "bit_exact": bool(torch.equal(found, x.cpu())),
        "coded_bits_per_value": coded,
        "model_bits_per_value": model_bits,
        "ratio_to_model": coded / model_bits,
        "header_bytes": packed.header_bytes,
        "file_bits_per_value": 8 * len(packed.content) / x.numel(),
        "compress_per_second": len(x) / packed.seconds,
        "decompress_per_second": len(x) / seconds,
        **_others(x.numpy(), spec),
    }


def _others(x: np.ndarray, spec: DatasetSpec) -> dict[str, float]:
    """Bits a value of general methods: all samples in one stream; PNG one by one and in one sheet,
    which spares it a header an image."""
    values = x.astype(np.min_scalar_type(int(x.max()))).tobytes()
    sizes = {
        "zlib": len(zlib.compress(values, 9)),
        "lzma": len(lzma.compress(values, preset=9 | lzma.PRESET_EXTREME)),
    }
    if spec.image_shape is not None:
        pictures = to_display(x, spec)
        sizes["png"] = sum(_png_bytes(picture) for picture in pictures)
        sizes["png_sheet"] = _png_bytes(pictures.reshape(-1, *pictures.shape[2:]))
    return {f"{name}_bits_per_value": 8 * size / x.size for name, size in sizes.items()}


def _png_bytes(picture: np.ndarray) -> int:
    from PIL import Image

    content = io.BytesIO()
    pixels = picture[..., 0] if picture.shape[-1] == 1 else picture
    Image.fromarray(pixels).save(content, format="PNG", optimize=True)
    return content.tell()


if __name__ == "__main__":
    sys.exit(main())
