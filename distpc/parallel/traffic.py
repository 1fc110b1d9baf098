"""What one rank sends in a training step, and how long links take for it.

A ring sends 2 (n - 1) / n of a payload to all-reduce it over n ranks, and (n - 1) / n to gather or
to scatter it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from distpc.parallel.memory import FLOAT_BYTES, Layout, share

EXCHANGE_OPERATIONS = 2
"""Bare operations that take as long as one of the node axis does beside its bytes: it packs scales
with messages, brings what it gathered onto one scale, and waits for the slower rank each time
(1.1 ms for 0.5 ms where tools/bench_layouts.py was run)."""


class Sizes(Protocol):
    """What decides the traffic of one rank of the node axis; see `circuits.footprint.Footprint`."""

    @property
    def num_parameters(self) -> int:
        """Entries of the statistics."""

    @property
    def num_banks(self) -> int:
        """Parameters that hold them."""

    @property
    def num_exchanges(self) -> int:
        """Collectives of the node axis in a forward and backward pass."""

    @property
    def exchanged(self) -> int:
        """Entries a sample that they gather or scatter."""


@dataclass(frozen=True)
class Links:
    """What connects ranks.

    Attributes:
        ranks_per_host: R of one host; consecutive ranks, so that groups on the node axis lie on as
            few hosts as they can.
        within_bytes_per_second: that a rank sends to others of its host.
        between_bytes_per_second: that a rank sends to other hosts.
        latency_seconds: that any collective operation takes, however small.
    """

    ranks_per_host: int
    within_bytes_per_second: float
    between_bytes_per_second: float
    latency_seconds: float

    def speed(self, first_to_last: int) -> float:
        """Bytes per second in a group whose ranks span `first_to_last` consecutive ranks."""
        fits = first_to_last <= self.ranks_per_host
        return self.within_bytes_per_second if fits else self.between_bytes_per_second


@dataclass(frozen=True)
class Traffic:
    """What a rank sends in a step.

    Attributes:
        parameters: bytes of statistics and flows, over the data axis.
        messages: bytes of gathered products and of flows scattered back, over the node axis.
        num_collectives: bare operations that take as long as those that they are sent in.
    """

    parameters: int
    messages: int
    num_collectives: int

    @property
    def total(self) -> int:
        """Bytes of both axes."""
        return self.parameters + self.messages

    def seconds(self, layout: Layout, links: Links) -> float:
        """Time that the links take for it, none of it hidden behind computation."""
        whole = layout.num_ranks if layout.data_axis > 1 else 1
        sending = self.parameters / links.speed(whole)
        sending += self.messages / links.speed(layout.node_axis)
        return sending + self.num_collectives * links.latency_seconds


def traffic(
    costs: Sizes,
    layout: Layout,
    *,
    local_batch: int,
    num_micro_batches: int,
    scatters: bool = True,
) -> Traffic:
    """What one rank sends in a step.

    ZeRO 0 all-reduces flows once a step. ZeRO 1 and 2 all-reduce them too (DeepSpeed reduces whole
    buckets and keeps its share of them), ZeRO 2 after every micro-batch, and gather statistics
    after the step. ZeRO 3 gathers statistics for each forward and backward pass (what was gathered
    last is still there when backward begins) and scatters flows, for every micro-batch. Checked
    against counted bytes in tests/pipeline/test_plan_measured.py.

    Args:
        costs: the circuit's sizes on one rank of the layout's node axis.
        layout: of the ranks.
        local_batch: samples of a step on this rank.
        num_micro_batches: pieces that they are cut into.
        scatters: whether flows can be scattered; gloo, on CPUs, all-reduces them instead.
    """
    own = FLOAT_BYTES * costs.num_parameters
    n, m, pieces, stage = layout.data_axis, layout.node_axis, num_micro_batches, layout.zero_stage
    still_there = min(FLOAT_BYTES * layout.reduce_bucket, own)
    payload = {
        0: 2 * own,
        1: 3 * own,
        2: (2 * pieces + 1) * own,
        3: pieces * ((3 if scatters else 4) * own - still_there),
    }[stage]
    buckets = share(own, FLOAT_BYTES * layout.reduce_bucket)
    operations = {
        0: 1,
        1: buckets + 1,
        2: pieces * buckets + 1,
        3: pieces * (2 * costs.num_banks + buckets),
    }[stage]
    # Forward gathers the product below each sum, backward scatters the flow that comes back.
    messages = FLOAT_BYTES * costs.exchanged * local_batch * (m - 1) // m
    exchanges = EXCHANGE_OPERATIONS * costs.num_exchanges * pieces
    return Traffic(
        parameters=payload * (n - 1) // n,
        messages=messages,
        num_collectives=operations * (n > 1) + exchanges * (m > 1),
    )
