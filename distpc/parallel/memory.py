"""Bytes that a layout of ranks needs for parameters: plain arithmetic, no tensors."""

from __future__ import annotations

FLOAT_BYTES = 4


def bytes_per_rank(num_parameters: int, zero_stage: int, num_ranks: int) -> dict[str, int]:
    """Resident bytes for statistics, flows and DeepSpeed's master copy on one rank.

    Online EM keeps no optimizer state. ZeRO 1 and 2 hold a float32 master copy of a rank's share
    even though the engine runs in float32; ZeRO 2 partitions flows; ZeRO 3 statistics too (blocks
    that are gathered for a moment are not counted here).

    Args:
        num_parameters: entries of the statistics S, tied ones counted once.
        zero_stage: 0 .. 3.
        num_ranks: R ranks on the data axis.
    """
    whole = FLOAT_BYTES * num_parameters
    share = -(-whole // num_ranks)
    sizes = {
        "statistics": share if zero_stage == 3 else whole,
        "flows": share if zero_stage >= 2 else whole,
        "master_copy": share if zero_stage >= 1 else 0,
    }
    return {**sizes, "total": sum(sizes.values())}
