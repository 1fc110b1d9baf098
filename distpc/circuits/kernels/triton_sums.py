"""Statistics of sums in Triton: the flows' matrix product, with the update as its epilogue.

Reference: `reference.learn_sums`.
"""

import triton
import triton.language as tl


@triton.jit
def prefetch(address):
    """Ask for the lines of memory at some addresses, to find them in the L2 cache later."""
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.u32 $0, 0;", "=r,l", [address.to(tl.uint64)],
        dtype=tl.int32, is_pure=False, pack=1,
    )  # fmt: skip


@triton.jit
def round_at_random(values, entry, seed):
    """Positive float32 values to ones that bfloat16 holds: up or down, right on average.

    16 pseudo-random bits are added to those that are cut off. The bits are an integer hash of the
    entry and the seed (the mixer of MurmurHash3, A. Appleby), so that a run can be repeated.
    """
    h = entry.to(tl.uint32) * 0x9E3779B1 + seed.to(tl.uint32)
    h ^= h >> 16
    h *= 0x85EBCA6B
    h ^= h >> 13
    h *= 0xC2B2AE35
    h ^= h >> 16
    bits = values.to(tl.uint32, bitcast=True) + (h & 0xFFFF)
    return (bits & 0xFFFF0000).to(tl.float32, bitcast=True)


@triton.jit
def update(
    statistics, weights, total, m, n, rate, share, floor, seed,
    M: tl.constexpr, N: tl.constexpr, EVEN: tl.constexpr, AT_RANDOM: tl.constexpr,
):  # fmt: skip
    """Part of a tile: S <- (1 - rate) S + rate * share * (S + eps) * total, W; its row sums.

    AT_RANDOM: S is kept in W alone, rounded at random.
    """
    entry = m[:, None] * N + n[None, :]
    inside = (m < M)[:, None] & (n < N)[None, :]
    source = weights if AT_RANDOM else statistics
    if EVEN:
        old = tl.load(source + entry).to(tl.float32)
    else:
        old = tl.load(source + entry, mask=inside, other=0.0).to(tl.float32)
    if AT_RANDOM:
        old -= floor
    new = old * (1.0 - rate) + (rate * share) * ((old + floor) * total)
    if AT_RANDOM:
        rounded = round_at_random(new + floor, entry, seed).to(weights.dtype.element_ty)
    else:
        rounded = (new + floor).to(weights.dtype.element_ty)
    if EVEN:
        if not AT_RANDOM:
            tl.store(statistics + entry, new)
        tl.store(weights + entry, rounded)
        sums = tl.sum(rounded.to(tl.float32), 1)
    else:
        if not AT_RANDOM:
            tl.store(statistics + entry, new, mask=inside)
        tl.store(weights + entry, rounded, mask=inside)
        sums = tl.sum(tl.where(inside, rounded.to(tl.float32), 0.0), 1)
    return sums


@triton.jit
def halves(values):
    """The left and the right half of the columns of a tile."""
    rows: tl.constexpr = values.shape[0]
    half: tl.constexpr = values.shape[1] // 2
    return tl.split(tl.permute(tl.reshape(values, (rows, 2, half)), (0, 2, 1)))


@triton.jit
def learn_sums(
    statistics, weights, row_sums, u, ratio, step_size, seed,
    table_at, u_at, ratio_at, lengths, floor, share,
    M: tl.constexpr, N: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_B: tl.constexpr,
    GROUP_M: tl.constexpr, ALIGN: tl.constexpr, PRECISION: tl.constexpr,
    EVEN: tl.constexpr, PARTS: tl.constexpr, PREFETCH: tl.constexpr,
    AT_RANDOM: tl.constexpr,
):  # fmt: skip
    """One tile of one table a program.

    M is K' (rows of a table), N is K; `share` is 1 / (samples of the batch). Reads S, 4 bytes an
    entry, writes S, 4, and W, 2. EVEN: tiles and steps fit without a rest. PARTS (1, 2, 4): the
    update takes a tile part by part, which keeps it in registers.
    """
    num_m: tl.constexpr = (M + BLOCK_M - 1) // BLOCK_M
    num_n: tl.constexpr = (N + BLOCK_N - 1) // BLOCK_N
    pid = tl.program_id(0)
    table = pid // (num_m * num_n)
    tile = pid % (num_m * num_n)
    # Tiles close in time share rows of both factors, which then come out of the cache.
    width = GROUP_M * num_n
    first_m = (tile // width) * GROUP_M
    height = min(num_m - first_m, GROUP_M)
    tile_m = first_m + (tile % width) % height
    tile_n = (tile % width) // height

    m = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    b = tl.arange(0, BLOCK_B)
    length = tl.load(lengths + table)
    ratio += tl.multiple_of(tl.load(ratio_at + table), ALIGN)
    u += tl.multiple_of(tl.load(u_at + table), ALIGN)
    left_at = ratio + b[:, None] * M + m[None, :]
    right_at = u + b[:, None] * N + n[None, :]
    statistics += tl.multiple_of(tl.load(table_at + table), ALIGN)
    if PREFETCH and EVEN and not AT_RANDOM:
        line = tile_n * BLOCK_N + tl.arange(0, BLOCK_N // 32) * 32
        prefetch(statistics + m[:, None] * N + line[None, :])
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for first in range(0, length, BLOCK_B):
        if EVEN:
            left = tl.load(left_at)
            right = tl.load(right_at)
        else:
            there = (first + b < length)[:, None]
            left = tl.load(left_at, mask=there & (m < M)[None, :], other=0.0)
            right = tl.load(right_at, mask=there & (n < N)[None, :], other=0.0)
        total = tl.dot(tl.trans(left), right, total, input_precision=PRECISION)
        left_at += BLOCK_B * M
        right_at += BLOCK_B * N

    rate = tl.load(step_size)
    number = tl.load(seed) + table * 0x3C6EF35F
    weights += table.to(tl.int64) * (M * N)
    if PARTS == 1:
        sums = update(
            statistics, weights, total, m, n, rate, share, floor, number, M, N, EVEN, AT_RANDOM
        )
    else:
        sums = tl.zeros((BLOCK_M,), tl.float32)
        part = tl.arange(0, BLOCK_N // PARTS)
        one, two = halves(total)
        if PARTS == 2:
            for i in tl.static_range(2):
                n = tile_n * BLOCK_N + i * (BLOCK_N // 2) + part
                values = one if i == 0 else two
                sums += update(
                    statistics,
                    weights,
                    values,
                    m,
                    n,
                    rate,
                    share,
                    floor,
                    number,
                    M,
                    N,
                    EVEN,
                    AT_RANDOM,
                )
        else:
            for i in tl.static_range(4):
                n = tile_n * BLOCK_N + i * (BLOCK_N // 4) + part
                first, second = halves(one if i < 2 else two)
                values = first if i % 2 == 0 else second
                sums += update(
                    statistics,
                    weights,
                    values,
                    m,
                    n,
                    rate,
                    share,
                    floor,
                    number,
                    M,
                    N,
                    EVEN,
                    AT_RANDOM,
                )
    tl.store(row_sums + (table.to(tl.int64) * M + m) * num_n + tile_n, sums, mask=m < M)


@triton.jit
def read_weights(
    statistics, weights, row_sums, table_at, floor,
    M: tl.constexpr, N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    ALIGN: tl.constexpr,
):  # fmt: skip
    """W and the sums of its rows, out of S; see `reference.read_weights`."""
    table = tl.program_id(1)
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    statistics += tl.multiple_of(tl.load(table_at + table), ALIGN)
    weights += table.to(tl.int64) * (M * N)
    total = tl.zeros((BLOCK_M,), tl.float32)
    for first in range(0, N, BLOCK_N):
        n = first + tl.arange(0, BLOCK_N)
        inside = (m < M)[:, None] & (n < N)[None, :]
        entry = m[:, None] * N + n[None, :]
        rounded = tl.load(statistics + entry, mask=inside, other=0.0) + floor
        rounded = rounded.to(weights.dtype.element_ty)
        tl.store(weights + entry, rounded, mask=inside)
        total += tl.sum(tl.where(inside, rounded.to(tl.float32), 0.0), 1)
    tl.store(row_sums + table.to(tl.int64) * M + m, total, mask=m < M)
