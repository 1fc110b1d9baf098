"""Statistics of categorical leaves in Triton: flows summed by value, and the update, in one pass.

A program owns some values of a table and some units. It goes through the tokens (factor, sample)
that show one of its values and adds up their flows by a product with the matrix of "token t shows
value c": no atomics, so that two runs agree bit by bit. Reference: `reference.learn_leaves`.
"""

import triton
import triton.language as tl

from distpc.circuits.kernels.triton_sums import prefetch


@triton.jit
def learn_leaves(
    statistics, totals, flow, codes, order, starts, step_size,
    table_at, sizes, reads, factor_variable, factor_at, share, batch, num_chunks,
    K: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_T: tl.constexpr,
    SORTED: tl.constexpr, ALIGN: tl.constexpr, PRECISION: tl.constexpr, EVEN: tl.constexpr,
    PREFETCH: tl.constexpr,
):  # fmt: skip
    """A table, BLOCK_C of its values, BLOCK_K of its units.

    SORTED: `codes` (T, tokens) are a table's in rising order, `order` which tokens those are, and
    `starts` (T, chunks + 1) where each chunk's begin. Else a program goes through all tokens, and
    `codes` (V, B) are those of each variable. EVEN: samples and units fill whole blocks.
    """
    pid = tl.program_id(0)
    num_k: tl.constexpr = (K + BLOCK_K - 1) // BLOCK_K
    k = (pid % num_k) * BLOCK_K + tl.arange(0, BLOCK_K)
    chunk = (pid // num_k) % num_chunks
    table = pid // (num_k * num_chunks)
    value = chunk * BLOCK_C + tl.arange(0, BLOCK_C)
    total = tl.zeros((BLOCK_C, BLOCK_K), tl.float32)
    t = tl.arange(0, BLOCK_T)
    statistics += tl.multiple_of(tl.load(table_at + table), ALIGN)
    if PREFETCH:
        line = tl.minimum((pid % num_k) * BLOCK_K + tl.arange(0, BLOCK_K // 32) * 32, K - 1)
        row = tl.minimum(value, tl.load(sizes + table) - 1)
        prefetch(statistics + row[:, None] * K + line[None, :])
    if SORTED:
        begin = tl.load(starts + table * (num_chunks + 1) + chunk)
        end = tl.load(starts + table * (num_chunks + 1) + chunk + 1)
        first = table.to(tl.int64) * reads * batch
        for at in range(begin, end, BLOCK_T):
            there = at + t < end
            token = tl.load(order + first + at + t, mask=there, other=0).to(tl.int32)
            code = tl.load(codes + first + at + t, mask=there, other=-1)
            rows = tl.load(factor_at + table * reads + token // batch, mask=there, other=0)
            rows = tl.multiple_of(rows + (token % batch).to(tl.int64) * K, ALIGN)
            inside = there[:, None] & (k < K)[None, :]
            values = tl.load(flow + rows[:, None] + k[None, :], mask=inside, other=0.0)
            shows = (value[:, None] == code[None, :]).to(flow.dtype.element_ty)
            total = tl.dot(shows, values, total, input_precision=PRECISION)
    else:
        for f in range(table * reads, (table + 1) * reads):
            code_at = codes + tl.load(factor_variable + f) * batch + t
            flow_at = flow + tl.multiple_of(tl.load(factor_at + f), ALIGN)
            flow_at = flow_at + t[:, None] * K + k[None, :]
            for first in range(0, batch, BLOCK_T):
                if EVEN:
                    code = tl.load(code_at)
                    values = tl.load(flow_at)
                else:
                    there = first + t < batch
                    code = tl.load(code_at, mask=there, other=-1)
                    values = tl.load(flow_at, mask=there[:, None] & (k < K)[None, :], other=0.0)
                shows = (value[:, None] == code[None, :]).to(flow.dtype.element_ty)
                total = tl.dot(shows, values, total, input_precision=PRECISION)
                code_at += BLOCK_T
                flow_at += BLOCK_T * K
    rate = tl.load(step_size)
    inside = (value < tl.load(sizes + table))[:, None] & (k < K)[None, :]
    entry = value[:, None] * K + k[None, :]
    old = tl.load(statistics + entry, mask=inside, other=0.0)
    new = old * (1.0 - rate) + (rate * share) * total
    tl.store(statistics + entry, new, mask=inside)
    sums = tl.sum(tl.where(inside, new, 0.0), 0)
    tl.store(totals + (table.to(tl.int64) * num_chunks + chunk) * K + k, sums, mask=k < K)
