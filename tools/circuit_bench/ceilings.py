"""What a device can do: rates of matrix products and of a copy, on random data."""

from __future__ import annotations

import statistics
from functools import partial

import torch

from circuit_bench.gpu_clock import seconds

SIZES = {"cpu": (512, 2**24)}
"""Side of a square matrix and bytes of a copy, elsewhere than on a GPU."""


def ceilings(device: str, rounds: int = 10) -> dict[str, float]:
    """`bf16_tflops`, `fp32_tflops` (large square products), `bf16_bmm_tflops` (batched ones as in a
    fold of 1,024 states and a batch of 512), `copy_gbs` (bytes read and written)."""
    side, size = SIZES.get(device.split(":")[0], (8192, 2**32))
    allowed = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    found = {
        "bf16_tflops": _product(device, torch.bfloat16, (side, side, side), rounds),
        "fp32_tflops": _product(device, torch.float32, (side // 2,) * 3, rounds),
        "bf16_bmm_tflops": _product(
            device, torch.bfloat16, (side // 16, side // 8, side // 8), rounds, folds=64
        ),
        "copy_gbs": _copy(device, size, rounds),
    }
    torch.backends.cuda.matmul.allow_tf32 = allowed
    return {name: round(value, 3) for name, value in found.items()}


def _product(
    device: str, dtype: torch.dtype, shape: tuple[int, int, int], rounds: int, folds: int = 1
) -> float:
    """TFLOP/s of (folds, m, k) x (folds, k, n)."""
    m, n, k = shape
    pairs = [
        (
            torch.randn(folds, m, k, device=device, dtype=dtype),
            torch.randn(folds, k, n, device=device, dtype=dtype),
        )
        for _ in range(2)
    ]
    out = torch.empty(folds, m, n, device=device, dtype=dtype)
    work = lambda a, b: torch.bmm(a, b, out=out)  # noqa: E731
    return 2e-12 * folds * m * n * k / _median(work, pairs, device, rounds)


def _copy(device: str, size: int, rounds: int) -> float:
    """GB/s of a copy within the device, read and written."""
    pairs = [
        (torch.randn(size // 4, device=device), torch.empty(size // 4, device=device))
        for _ in range(2)
    ]
    work = lambda source, target: target.copy_(source)  # noqa: E731
    return 2e-9 * size / _median(work, pairs, device, rounds)


def _median(work, pairs, device: str, rounds: int) -> float:  # type: ignore[no-untyped-def]
    for _ in range(3):
        work(*pairs[0])
    turns = [partial(work, *pairs[i % 2]) for i in range(rounds)]
    taken = [seconds(turn, device) for turn in turns]
    return statistics.median(taken)
