"""Products in Triton: gather, multiply, rescale, round, in one pass; and the flows back.

References: `reference.multiply`, `reference.split`.
"""

import triton
import triton.language as tl


@triton.jit
def rescale(values, total):
    """Rows divided by their maxima, and the logs of those added to `total`."""
    top = tl.max(values, 1)
    top = tl.where(top > 0, top, 1.0)
    return values / top[:, None], total + tl.log(top)


@triton.jit
def multiply(
    u, log_top, y, inverse, leaf, leaf_inverse, codes,
    nodes, node_at, leaf_start, leaf_variable, leaf_at, leaf_inverse_at, leaf_floor,
    sum_start, sum_at, sum_inverse_at,
    batch,
    K: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_B: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    """One node of some samples a program; see `reference.multiply`."""
    node = tl.load(nodes + tl.program_id(0))
    b = tl.program_id(1) * BLOCK_B + tl.arange(0, BLOCK_B)
    k = tl.arange(0, BLOCK_K)
    in_batch = b < batch
    inside = in_batch[:, None] & (k < K)[None, :]
    entry = b[:, None] * K + k[None, :]
    values = tl.where((k < K)[None, :] & (b >= 0)[:, None], 1.0, 0.0)
    total = tl.zeros((BLOCK_B,), tl.float32)
    first_leaf = tl.load(leaf_start + node)
    end_leaf = tl.load(leaf_start + node + 1)
    first_sum = tl.load(sum_start + node)
    end_sum = tl.load(sum_start + node + 1)
    for f in range(first_leaf, end_leaf):
        code = tl.load(codes + tl.load(leaf_variable + f) * batch + b, mask=in_batch, other=-1)
        table = leaf + tl.multiple_of(tl.load(leaf_at + f), ALIGN)
        seen = inside & (code >= 0)[:, None]
        p = tl.load(table + code[:, None] * K + k[None, :], mask=seen, other=0.0)
        at = tl.multiple_of(tl.load(leaf_inverse_at + f), ALIGN)
        scale = tl.load(leaf_inverse + at + k, mask=k < K, other=0.0)
        p = (p + tl.load(leaf_floor + f)) * scale[None, :]
        values *= tl.where((code >= 0)[:, None], p, 1.0)
        # One factor alone is far above underflow, so the first may wait for the second.
        if f > first_leaf:
            values, total = rescale(values, total)
    for f in range(first_sum, end_sum):
        message = y + tl.multiple_of(tl.load(sum_at + f), ALIGN)
        factor = tl.load(message + entry, mask=inside, other=0.0).to(tl.float32)
        at = tl.multiple_of(tl.load(sum_inverse_at + f), ALIGN)
        scale = tl.load(inverse + at + k, mask=k < K, other=0.0)
        values *= factor * scale[None, :]
        values, total = rescale(values, total)
    if first_sum == end_sum:
        values, total = rescale(values, total)
    out = u + tl.multiple_of(tl.load(node_at + node), ALIGN)
    tl.store(out + entry, values.to(u.dtype.element_ty), mask=inside)
    tl.store(log_top + node.to(tl.int64) * batch + b, total, mask=in_batch)


@triton.jit
def split(
    u, v, y, nodes, node_at, sum_start, sum_at, batch,
    K: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_B: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    """One node of some samples a program; see `reference.split`."""
    node = tl.load(nodes + tl.program_id(0))
    b = tl.program_id(1) * BLOCK_B + tl.arange(0, BLOCK_B)
    k = tl.arange(0, BLOCK_K)
    inside = (b < batch)[:, None] & (k < K)[None, :]
    entry = b[:, None] * K + k[None, :]
    at = tl.multiple_of(tl.load(node_at + node), ALIGN)
    flow = tl.load(u + at + entry, mask=inside, other=0.0).to(tl.float32)
    flow *= tl.load(v + at + entry, mask=inside, other=0.0).to(tl.float32)
    for f in range(tl.load(sum_start + node), tl.load(sum_start + node + 1)):
        message = y + tl.multiple_of(tl.load(sum_at + f), ALIGN)
        values = tl.load(message + entry, mask=inside, other=1.0).to(tl.float32)
        ratio = tl.where(values > 0, flow / values, 0.0)
        tl.store(message + entry, ratio.to(y.dtype.element_ty), mask=inside)
