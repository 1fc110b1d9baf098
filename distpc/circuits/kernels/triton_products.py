"""Products in Triton: gather, multiply, rescale, round, in one pass; and the flows back.

Where a kernel starts is looked up in one row of `heads`, by the number of the program: indices that
have to wait for one another are most of the time of a launch over a few nodes.
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
def look_up(
    leaf, leaf_inverse, codes, leaf_variable, leaf_at, leaf_inverse_at, leaf_floor,
    f, b, k, batch, K: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    """Probabilities (B, K) of leaf factor f; 1 where its variable is missing."""
    code = tl.load(codes + tl.load(leaf_variable + f) * batch + b, mask=b < batch, other=-1)
    table = leaf + tl.multiple_of(tl.load(leaf_at + f), ALIGN)
    seen = (code >= 0)[:, None] & (k < K)[None, :]
    values = tl.load(table + code[:, None] * K + k[None, :], mask=seen, other=0.0)
    at = tl.multiple_of(tl.load(leaf_inverse_at + f), ALIGN)
    scale = tl.load(leaf_inverse + at + k, mask=k < K, other=0.0)
    values = (values + tl.load(leaf_floor + f)) * scale[None, :]
    return tl.where((code >= 0)[:, None], values, 1.0)


@triton.jit
def multiply(
    u, log_top, y, inverse, leaf, leaf_inverse, codes,
    heads, leaf_variable, leaf_at, leaf_inverse_at, leaf_floor, sum_at, sum_inverse_at,
    batch,
    K: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_B: tl.constexpr, ALIGN: tl.constexpr,
    ONE_LEAF: tl.constexpr,
):  # fmt: skip
    """One node of some samples a program; see `reference.multiply`.

    ONE_LEAF: every node has exactly one leaf; it is loaded together with the first sum.
    """
    head = heads + tl.program_id(0) * 6
    node = tl.load(head)
    out = u + tl.multiple_of(tl.load(head + 1), ALIGN)
    first_leaf = tl.load(head + 2)
    end_leaf = tl.load(head + 3)
    first_sum = tl.load(head + 4)
    end_sum = tl.load(head + 5)
    b = tl.program_id(1) * BLOCK_B + tl.arange(0, BLOCK_B)
    k = tl.arange(0, BLOCK_K)
    inside = (b < batch)[:, None] & (k < K)[None, :]
    entry = b[:, None] * K + k[None, :]
    total = tl.zeros((BLOCK_B,), tl.float32)
    # A node without sums takes 1 for the first one.
    has_sum = first_sum < end_sum
    message = y + tl.multiple_of(tl.load(sum_at + first_sum, mask=has_sum, other=0), ALIGN)
    at = tl.multiple_of(tl.load(sum_inverse_at + first_sum, mask=has_sum, other=0), ALIGN)
    values = tl.load(message + entry, mask=inside & has_sum, other=1.0).to(tl.float32)
    values *= tl.load(inverse + at + k, mask=(k < K) & has_sum, other=1.0)[None, :]
    values = tl.where(inside, values, 0.0)
    # The second sum is loaded in any case, not in a loop: it need not wait for the first.
    second = tl.minimum(first_sum + 1, end_sum)
    has_second = second < end_sum
    message = y + tl.multiple_of(tl.load(sum_at + second, mask=has_second, other=0), ALIGN)
    at = tl.multiple_of(tl.load(sum_inverse_at + second, mask=has_second, other=0), ALIGN)
    factor = tl.load(message + entry, mask=inside & has_second, other=1.0).to(tl.float32)
    factor *= tl.load(inverse + at + k, mask=(k < K) & has_second, other=1.0)[None, :]
    if ONE_LEAF:
        values *= look_up(
            leaf, leaf_inverse, codes, leaf_variable, leaf_at, leaf_inverse_at, leaf_floor,
            first_leaf, b, k, batch, K, ALIGN,
        )  # fmt: skip
        values, total = rescale(values, total)
    else:
        values, total = rescale(values, total)
        for f in range(first_leaf, end_leaf):
            values *= look_up(
                leaf, leaf_inverse, codes, leaf_variable, leaf_at, leaf_inverse_at, leaf_floor,
                f, b, k, batch, K, ALIGN,
            )  # fmt: skip
            values, total = rescale(values, total)
    if has_second:
        values, total = rescale(values * factor, total)
    for f in range(first_sum + 2, end_sum):
        message = y + tl.multiple_of(tl.load(sum_at + f), ALIGN)
        factor = tl.load(message + entry, mask=inside, other=0.0).to(tl.float32)
        at = tl.multiple_of(tl.load(sum_inverse_at + f), ALIGN)
        values *= factor * tl.load(inverse + at + k, mask=k < K, other=0.0)[None, :]
        values, total = rescale(values, total)
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
        values = tl.load(message + entry, mask=inside, other=1.0).to(tl.float32)
        ratio = tl.where(values > 0, flow / values, 0.0)
        tl.store(message + entry, ratio.to(y.dtype.element_ty), mask=inside)
