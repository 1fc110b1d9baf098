"""Statistics of categorical leaves in Triton: flows summed by value, and the update, in one pass.

A program owns some values of a table and some units. It goes through the tokens (factor, sample)
that show one of its values and adds up their flows by a product with the matrix of "token t shows
value c": no atomics, so that two runs agree bit by bit. Reference: `reference.learn_leaves`.
"""

import triton
import triton.language as tl


@triton.jit
def learn_leaves(
    statistics, totals, u, v, codes, order, starts, step_size,
    table_at, sizes, tokens, factor_variable, factor_at, share, batch, num_chunks,
    K: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_T: tl.constexpr,
    SORTED: tl.constexpr, ALIGN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A table, BLOCK_C of its values, BLOCK_K of its units.

    SORTED: `order` (T, tokens) lists a table's tokens by value and `starts` (T, chunks + 1) where
    each chunk's begin; else a program goes through all tokens of its table.
    """
    pid = tl.program_id(0)
    num_k: tl.constexpr = (K + BLOCK_K - 1) // BLOCK_K
    k = (pid % num_k) * BLOCK_K + tl.arange(0, BLOCK_K)
    chunk = (pid // num_k) % num_chunks
    table = pid // (num_k * num_chunks)
    value = chunk * BLOCK_C + tl.arange(0, BLOCK_C)
    begin = 0
    end = tokens
    if SORTED:
        begin = tl.load(starts + table * (num_chunks + 1) + chunk)
        end = tl.load(starts + table * (num_chunks + 1) + chunk + 1)
    total = tl.zeros((BLOCK_C, BLOCK_K), tl.float32)
    for at in range(begin, end, BLOCK_T):
        token = at + tl.arange(0, BLOCK_T)
        there = token < end
        if SORTED:
            token = tl.load(order + table.to(tl.int64) * tokens + token, mask=there, other=0)
        factor = table * (tokens // batch) + token // batch
        sample = token % batch
        code = tl.load(
            codes + tl.load(factor_variable + factor, mask=there, other=0) * batch + sample,
            mask=there, other=-1,
        )  # fmt: skip
        rows = tl.load(factor_at + factor, mask=there, other=0) + sample.to(tl.int64) * K
        rows = tl.multiple_of(rows, ALIGN)[:, None] + k[None, :]
        inside = (there & (code >= 0))[:, None] & (k < K)[None, :]
        flow = tl.load(u + rows, mask=inside, other=0.0).to(tl.float32)
        flow *= tl.load(v + rows, mask=inside, other=0.0).to(tl.float32)
        shows = (value[:, None] == code[None, :]).to(u.dtype.element_ty)
        total = tl.dot(shows, flow.to(u.dtype.element_ty), total, input_precision=PRECISION)
    rate = tl.load(step_size)
    inside = (value < tl.load(sizes + table))[:, None] & (k < K)[None, :]
    statistics += tl.multiple_of(tl.load(table_at + table), ALIGN)
    entry = value[:, None] * K + k[None, :]
    old = tl.load(statistics + entry, mask=inside, other=0.0)
    new = old * (1.0 - rate) + (rate * share) * total
    tl.store(statistics + entry, new, mask=inside)
    sums = tl.sum(tl.where(inside, new, 0.0), 0)
    tl.store(totals + (table.to(tl.int64) * num_chunks + chunk) * K + k, sums, mask=k < K)
