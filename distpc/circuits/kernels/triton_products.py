"""Products in Triton: gather, multiply, rescale, round, in one pass; and the flows back.

Where a kernel starts is looked up in one row of `heads`, by the number of the program: indices that
have to wait for one another are most of the time of a launch over a few nodes.
References: `reference.multiply`, `reference.split`.
"""

import triton
import triton.language as tl


@triton.jit
def ratio_of(flow, message):
    """flow / message, 0 where the message is.

    Of bfloat16 messages by a reciprocal that is right to 21 bits, without the range checks of a
    division.
    """
    values = message.to(tl.float32)
    if message.dtype == tl.bfloat16:
        root = tl.rsqrt(values)
        return tl.where(values > 0, flow * (root * root), 0.0)
    return tl.where(values > 0, flow / values, 0.0)


@triton.jit
def rescale(values, total):
    """Rows divided by their maxima, and the logs of those added to `total`."""
    top = tl.max(values, 1)
    top = tl.where(top > 0, top, 1.0)
    return values * (1.0 / top)[:, None], total + tl.log(top)


@triton.jit
def look_up(table, code, k, scale, rest, inside, EVEN: tl.constexpr, K: tl.constexpr):
    """Probabilities (B, K) of a leaf factor, S * scale + rest; 1 where its variable is missing."""
    seen = code >= 0
    at = table + tl.maximum(code, 0)[:, None] * K + k[None, :]
    values = tl.load(at) if EVEN else tl.load(at, mask=inside, other=0.0)
    return tl.where(seen[:, None], values * scale[None, :] + rest[None, :], 1.0)


@triton.jit
def leaf_of(
    leaf, leaf_inverse, leaf_at, leaf_inverse_at, leaf_floor, f, k, K: tl.constexpr,
    ALIGN: tl.constexpr,
):  # fmt: skip
    """Table of leaf factor f, and what its entries are multiplied by, and what is added then."""
    table = leaf + tl.multiple_of(tl.load(leaf_at + f), ALIGN)
    at = tl.multiple_of(tl.load(leaf_inverse_at + f), ALIGN)
    scale = tl.load(leaf_inverse + at + k, mask=k < K, other=0.0)
    return table, scale, tl.load(leaf_floor + f) * scale


@triton.jit
def multiply(
    u, log_top, y, inverse, leaf, leaf_inverse, codes,
    heads, leaf_variable, leaf_at, leaf_inverse_at, leaf_floor, sum_at, sum_inverse_at,
    batch,
    K: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_B: tl.constexpr, ALIGN: tl.constexpr,
    ONE_LEAF: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """One node of BLOCK_B samples a program; see `reference.multiply`.

    ONE_LEAF: every node has exactly one leaf; it is loaded together with the first sum. EVEN:
    samples and units fill whole blocks.
    """
    head = heads + tl.program_id(0) * 6
    node = tl.load(head)
    out = u + tl.multiple_of(tl.load(head + 1), ALIGN)
    first_leaf = tl.load(head + 2)
    end_leaf = tl.load(head + 3)
    first_sum = tl.load(head + 4)
    end_sum = tl.load(head + 5)
    k = tl.arange(0, BLOCK_K)
    # A node without sums takes 1 for the first one; the second is looked up in any case, not in a
    # loop: it need not wait for the first.
    has_sum = first_sum < end_sum
    second = tl.minimum(first_sum + 1, end_sum)
    has_second = second < end_sum
    message = y + tl.multiple_of(tl.load(sum_at + first_sum, mask=has_sum, other=0), ALIGN)
    next_message = y + tl.multiple_of(tl.load(sum_at + second, mask=has_second, other=0), ALIGN)
    at = tl.multiple_of(tl.load(sum_inverse_at + first_sum, mask=has_sum, other=0), ALIGN)
    scale = tl.load(inverse + at + k, mask=(k < K) & has_sum, other=1.0)
    at = tl.multiple_of(tl.load(sum_inverse_at + second, mask=has_second, other=0), ALIGN)
    next_scale = tl.load(inverse + at + k, mask=(k < K) & has_second, other=1.0)
    if ONE_LEAF:
        table, leaf_scale, rest = leaf_of(
            leaf, leaf_inverse, leaf_at, leaf_inverse_at, leaf_floor, first_leaf, k, K, ALIGN
        )
        code_at = codes + tl.load(leaf_variable + first_leaf) * batch
    b = tl.program_id(1) * BLOCK_B + tl.arange(0, BLOCK_B)
    inside = (b < batch)[:, None] & (k < K)[None, :]
    entry = b[:, None] * K + k[None, :]
    total = tl.zeros((BLOCK_B,), tl.float32)
    values = tl.load(message + entry, mask=inside & has_sum, other=1.0).to(tl.float32)
    factor = tl.load(next_message + entry, mask=inside & has_second, other=1.0).to(tl.float32)
    values *= scale[None, :]
    if not EVEN:
        values = tl.where(inside, values, 0.0)
    if ONE_LEAF:
        code = tl.load(code_at + b, mask=b < batch, other=-1)
        values *= look_up(table, code, k, leaf_scale, rest, inside, EVEN, K)
        values, total = rescale(values, total)
    else:
        values, total = rescale(values, total)
        for f in range(first_leaf, end_leaf):
            other, other_scale, other_rest = leaf_of(
                leaf, leaf_inverse, leaf_at, leaf_inverse_at, leaf_floor, f, k, K, ALIGN
            )
            code_at = codes + tl.load(leaf_variable + f) * batch
            code = tl.load(code_at + b, mask=b < batch, other=-1)
            values *= look_up(other, code, k, other_scale, other_rest, inside, EVEN, K)
            values, total = rescale(values, total)
    if has_second:
        values, total = rescale(values * (factor * next_scale[None, :]), total)
    for f in range(first_sum + 2, end_sum):
        message = y + tl.multiple_of(tl.load(sum_at + f), ALIGN)
        factor = tl.load(message + entry, mask=inside, other=0.0).to(tl.float32)
        at = tl.multiple_of(tl.load(sum_inverse_at + f), ALIGN)
        values *= factor * tl.load(inverse + at + k, mask=k < K, other=0.0)[None, :]
        values, total = rescale(values, total)
    if EVEN:
        tl.store(out + entry, values.to(u.dtype.element_ty))
        tl.store(log_top + node * batch + b, total)
    else:
        tl.store(out + entry, values.to(u.dtype.element_ty), mask=inside)
        tl.store(log_top + node * batch + b, total, mask=b < batch)


@triton.jit
def split(
    u, v, y, heads, sum_at, batch,
    K: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_B: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    """One node of some samples a program; see `reference.split`."""
    head = heads + tl.program_id(0) * 6
    at = tl.multiple_of(tl.load(head + 1), ALIGN)
    first_sum = tl.load(head + 4)
    end_sum = tl.load(head + 5)
    b = tl.program_id(1) * BLOCK_B + tl.arange(0, BLOCK_B)
    k = tl.arange(0, BLOCK_K)
    inside = (b < batch)[:, None] & (k < K)[None, :]
    entry = b[:, None] * K + k[None, :]
    flow = tl.load(u + at + entry, mask=inside, other=0.0).to(tl.float32)
    flow *= tl.load(v + at + entry, mask=inside, other=0.0).to(tl.float32)
    tl.store(v + at + entry, flow.to(v.dtype.element_ty), mask=inside)
    for f in range(first_sum, end_sum):
        message = y + tl.multiple_of(tl.load(sum_at + f), ALIGN)
        values = tl.load(message + entry, mask=inside, other=1.0)
        ratio = ratio_of(flow, values)
        tl.store(message + entry, ratio.to(y.dtype.element_ty), mask=inside)
