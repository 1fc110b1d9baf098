"""The backward product of sums in Triton, with the flows' way down as its epilogue.

v = ratio @ W never reaches memory: a tile of it becomes the flow u * v, which is stored for the
leaves, and the ratio flow / y of every sum below. Reference: a plain product and `reference.split`.
"""

import triton
import triton.language as tl

from distpc.circuits.kernels.triton_products import ratio_of
from distpc.circuits.kernels.triton_sums import halves


@triton.jit
def pass_down(
    u, flow, y, sum_at, first_sum, end_sum, v, b, k, batch,
    K: tl.constexpr, ALIGN: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """Part of a tile: flows, and ratios of the sums below."""
    entry = b[:, None] * K + k[None, :]
    inside = (b < batch)[:, None] & (k < K)[None, :]
    if EVEN:
        values = v * tl.load(u + entry).to(tl.float32)
        tl.store(flow + entry, values.to(flow.dtype.element_ty))
    else:
        values = v * tl.load(u + entry, mask=inside, other=0.0).to(tl.float32)
        tl.store(flow + entry, values.to(flow.dtype.element_ty), mask=inside)
    for f in range(first_sum, end_sum):
        message = y + tl.multiple_of(tl.load(sum_at + f), ALIGN)
        if EVEN:
            ratio = ratio_of(values, tl.load(message + entry))
            tl.store(message + entry, ratio.to(y.dtype.element_ty))
        else:
            ratio = ratio_of(values, tl.load(message + entry, mask=inside, other=1.0))
            tl.store(message + entry, ratio.to(y.dtype.element_ty), mask=inside)


@triton.jit
def descend(
    u, flow, y, weights, heads, sum_at, ratio, batch, rows_per_table,
    M: tl.constexpr, K: tl.constexpr,
    BLOCK_B: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_M: tl.constexpr,
    ALIGN: tl.constexpr, PRECISION: tl.constexpr, EVEN: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """A tile (samples, units) of one node a program.

    `weights` (T, M, K) and `ratio` (nodes, B, M) are those of a group, `heads` its nodes'.
    """
    num_k: tl.constexpr = (K + BLOCK_K - 1) // BLOCK_K
    num_b = (batch + BLOCK_B - 1) // BLOCK_B
    pid = tl.program_id(0)
    number = pid // (num_b * num_k)
    tile = pid % (num_b * num_k)
    # Down the samples first: the tiles that run together share columns of W.
    b0 = (tile % num_b) * BLOCK_B
    k0 = (tile // num_b) * BLOCK_K
    b = b0 + tl.arange(0, BLOCK_B)
    k = k0 + tl.arange(0, BLOCK_K)
    m = tl.arange(0, BLOCK_M)
    head = heads + number * 6
    at = tl.multiple_of(tl.load(head + 1), ALIGN)
    first_sum = tl.load(head + 4)
    end_sum = tl.load(head + 5)
    left_at = ratio + number.to(tl.int64) * batch * M + b[:, None] * M + m[None, :]
    right_at = weights + (number // rows_per_table).to(tl.int64) * (M * K)
    right_at = right_at + m[:, None] * K + k[None, :]
    total = tl.zeros((BLOCK_B, BLOCK_K), tl.float32)
    for first in range(0, M, BLOCK_M):
        if EVEN:
            left = tl.load(left_at)
            right = tl.load(right_at)
        else:
            there = first + m < M
            left = tl.load(left_at, mask=(b < batch)[:, None] & there[None, :], other=0.0)
            right = tl.load(right_at, mask=there[:, None] & (k < K)[None, :], other=0.0)
        total = tl.dot(left, right, total, input_precision=PRECISION)
        left_at += BLOCK_M
        right_at += BLOCK_M * K
    u += at
    flow += at
    if PARTS == 1:
        pass_down(u, flow, y, sum_at, first_sum, end_sum, total, b, k, batch, K, ALIGN, EVEN)
    else:
        one, two = halves(total)
        for i in tl.static_range(2):
            k = k0 + i * (BLOCK_K // 2) + tl.arange(0, BLOCK_K // 2)
            part = one if i == 0 else two
            pass_down(u, flow, y, sum_at, first_sum, end_sum, part, b, k, batch, K, ALIGN, EVEN)
