"""Bytes that one rank sends in a training step, and how long links take for them.

A ring sends 2 (n - 1) / n of a payload to all-reduce it over n ranks, and (n - 1) / n to gather or
to scatter it.
"""

from __future__ import annotations

from dataclasses import dataclass

from distpc.parallel.memory import FLOAT_BYTES, Layout, share


@dataclass(frozen=True)
class Links:
    """What connects ranks.

    Attributes:
        ranks_per_host: R of one host; consecutive ranks, so that groups on the node axis lie on as
            few hosts as they can.
        within_bytes_per_second: that a rank sends to others of its host.
        between_bytes_per_second: that a rank sends to other hosts.
    """

    ranks_per_host: int
    within_bytes_per_second: float
    between_bytes_per_second: float

    def speed(self, first_to_last: int) -> float:
        """Bytes per second in a group whose ranks span `first_to_last` consecutive ranks."""
        fits = first_to_last <= self.ranks_per_host
        return self.within_bytes_per_second if fits else self.between_bytes_per_second


@dataclass(frozen=True)
class Traffic:
    """Bytes that a rank sends in a step.

    Attributes:
        parameters: statistics and flows, over the data axis.
        messages: gathered products and the flows scattered back, over the node axis.
    """

    parameters: int
    messages: int

    @property
    def total(self) -> int:
        """Of both axes."""
        return self.parameters + self.messages

    def seconds(self, layout: Layout, links: Links) -> float:
        """Time that the links take for it, none of it hidden behind computation."""
        whole = layout.num_ranks if layout.data_axis > 1 else 1
        return self.parameters / links.speed(whole) + self.messages / links.speed(layout.node_axis)


def bytes_sent(
    layout: Layout,
    *,
    num_parameters: int,
    gathered: int,
    local_batch: int,
    num_micro_batches: int,
    message_bytes: int = FLOAT_BYTES,
) -> Traffic:
    """What one rank sends in a step.

    ZeRO 0 all-reduces flows once a step. ZeRO 1 and 2 all-reduce them too (DeepSpeed reduces whole
    buckets and keeps its share of them), ZeRO 2 after every micro-batch, and gather statistics
    after the step. ZeRO 3 gathers statistics for each forward and backward pass and scatters flows,
    for every micro-batch.

    Args:
        layout: of the ranks.
        num_parameters: entries of the statistics.
        gathered: entries a sample of the messages that sums read.
        local_batch: samples of a step on this rank.
        num_micro_batches: pieces that they are cut into.
        message_bytes: of one entry of a message: 4, or 2 in bfloat16.
    """
    own = FLOAT_BYTES * share(num_parameters, layout.node_axis)
    n = layout.data_axis
    payloads = {
        0: 2,
        1: 2 + 1,
        2: 2 * num_micro_batches + 1,
        3: 3 * num_micro_batches,
    }[layout.zero_stage]
    m = layout.node_axis
    # Forward gathers the product below each sum, backward scatters the flow that comes back.
    messages = 2 * message_bytes * gathered * local_batch * (m - 1) // m
    return Traffic(parameters=payloads * own * (n - 1) // n, messages=messages)
