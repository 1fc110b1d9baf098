"""Bytes that a layout of ranks holds for parameters: plain arithmetic, no tensors."""

from __future__ import annotations

from dataclasses import dataclass

FLOAT_BYTES = 4
_ZERO_0_BUCKET = 500_000_000
"""Elements that DeepSpeed flattens at once to reduce them, where it shards nothing."""
MOST_BUCKET = 50_000_000
_LEAST_BUCKET = 1_000_000
_BUCKETS = 64


@dataclass(frozen=True)
class Layout:
    """How a circuit lies over ranks.

    Attributes:
        node_axis: ranks that share the rows of every sum, for the same samples.
        data_axis: replicas of such a group, for different samples; ZeRO shards over these.
        zero_stage: 0 replicates everything; 1 shards optimizer state, 2 also flows, 3 also
            statistics.
        reduce_bucket: elements that are reduced, gathered or kept alive at once.
        offload: what ZeRO shards lies in the host's memory.
    """

    node_axis: int = 1
    data_axis: int = 1
    zero_stage: int = 0
    reduce_bucket: int = MOST_BUCKET
    offload: bool = False

    @property
    def num_ranks(self) -> int:
        """R."""
        return self.node_axis * self.data_axis

    @property
    def name(self) -> str:
        """For tables: node axis x data axis, ZeRO stage."""
        return f"{self.node_axis} x {self.data_axis}, ZeRO {self.zero_stage}"


def share(amount: int, ranks: int) -> int:
    """The largest of nearly equal shares."""
    return -(-amount // ranks)


def fitting_bucket(num_parameters: int, largest: int) -> int:
    """Elements to reduce, gather or keep alive at once: what a few matrices take, not the circuit.

    Several buckets are in memory at a time, so that each is a 64th of the circuit; but no smaller
    than a parameter, which is gathered as a whole anyway, nor than what is worth an operation.

    Args:
        num_parameters: entries of the statistics on one rank of the node axis.
        largest: entries of the largest parameter there.
    """
    return min(MOST_BUCKET, max(num_parameters // _BUCKETS, largest, _LEAST_BUCKET))


def bytes_per_rank(num_parameters: int, layout: Layout, *, state_copies: int = 0) -> dict[str, int]:
    """Bytes of one rank between two steps, by what they are for.

    ZeRO 1 and 2 hold a float32 master copy of a rank's share even though the engine runs in
    float32; under ZeRO 3 a rank keeps its share three times (statistics, copy and flows) and the
    bucket that flows are reduced in. Found by measurement, tests/pipeline/test_plan_measured.py.

    Args:
        num_parameters: entries of the statistics S on one rank of the node axis, tied ones counted
            once.
        layout: of the ranks.
        state_copies: tensors of a parameter's size that the rule keeps: 0 for online EM, 1 for
            momentum, 2 for Adam.
    """
    own = FLOAT_BYTES * num_parameters
    part = share(own, layout.data_axis)
    stage = layout.zero_stage
    # Of the shards, those on the device.
    here = 0 if layout.offload and stage > 0 else part
    return {
        "statistics": here if stage == 3 else own,
        "master_copy": here if stage > 0 else 0,
        "kept_flows": here if stage == 3 else 0,
        "bucket": min(FLOAT_BYTES * layout.reduce_bucket, own) if stage == 3 else 0,
        "optimizer_state": state_copies * (own if stage == 0 else here),
    }


def engine_bytes(
    num_parameters: int, largest: int, layout: Layout, *, accumulates: bool
) -> tuple[int, int]:
    """Bytes of one rank that only a part of a step takes.

    Args:
        num_parameters: entries of the statistics on one rank of the node axis.
        largest: entries of the largest parameter there, which is gathered and reduced as a whole.
        layout: of the ranks.
        accumulates: whether a step has several backward passes.

    Returns:
        Bytes during the backward pass, beside messages and the flows that stay; and after it, when
        flows are reduced and the optimizer steps.
    """
    own, bank = FLOAT_BYTES * num_parameters, FLOAT_BYTES * largest
    part = share(own, layout.data_axis)
    setting = FLOAT_BYTES * layout.reduce_bucket
    bucket = min(max(setting, bank), own)
    if layout.zero_stage == 0:
        # Flows are copied into a flat buffer to be reduced.
        return 0, own + min(own, FLOAT_BYTES * _ZERO_0_BUCKET + bank)
    if layout.zero_stage == 1:
        return 0, max(own + bucket, 2 * part)
    if layout.zero_stage == 2:
        # A bucket and what is reduced of it, or its share beside those of earlier passes.
        return max(2 * bucket, (1 + accumulates) * part + bucket), 2 * part
    # Blocks in use and blocks fetched ahead; then weights and flows of one, or a bucket's flows
    # with what is scattered of them.
    gathered = min(max(2 * setting, bank), own)
    scattered = bucket + (bucket // layout.data_axis if layout.data_axis > 1 else 0)
    # The optimizer steps group by group, each with a copy of its flows.
    group = min(part, setting + share(bank, layout.data_axis))
    return gathered + max(scattered, 2 * bank), group
