"""The kernels of the fused step, each with what it cannot avoid: bytes moved, operations done.

A kernel is timed over all of its launches in a step. Bytes count each operand once: an input that
a launch reads, an output that it writes; what caches save between launches is not subtracted, so
that a small case can pass the rate of the device's memory. Legend: B batch, K units of a node, K'
of its sum, w bytes of a message's or a weight's entry, T tables.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, NamedTuple

import torch

if TYPE_CHECKING:
    from distpc.circuits.kernels.step import FastStep

FLOAT = 4


class Kernel(NamedTuple):
    """One kind of launch.

    Attributes:
        name: of the kernel.
        run: all of its launches in a step.
        bytes: that they have to move.
        flops: multiplications and additions of their matrix products; 0: it has none.
    """

    name: str
    run: Callable[[], object]
    bytes: int
    flops: int


def kernels_of(fast: FastStep) -> Iterator[Kernel]:
    """The kernels of a step that has run at least once, so that its buffers hold a batch."""
    from distpc.circuits.kernels import launch

    layout, stages = fast.layout, fast._stages
    batch, width = layout.batch, layout.u.element_size()
    nodes = layout.plan.nodes
    inner = [node for node in nodes if node.sums]
    messages = sum(batch * node.shape[1] for node in nodes)
    below = sum(batch * nodes[s].shape[0] for node in inner for s in node.sums)
    looked_up = sum(
        min(batch, int(max(leaves.sizes))) * leaves.units * leaves.count * leaves.reads
        for leaves in layout.leaves
    )
    yield Kernel(
        "multiply: leaves, products, maxima",
        lambda: [launch.multiply(layout, part) for parts, _ in stages for part in parts],
        FLOAT * looked_up + width * (below + messages),
        0,
    )
    groups = [group for _, of_stage in stages for group in of_stage]
    weights = sum(group.weights.numel() for group in groups)
    flops = sum(2 * group.u.numel() * group.weights.shape[1] for group in groups)
    both = sum(batch * sum(node.shape) for node in nodes)
    yield Kernel(
        "ascend: sums (cuBLAS)",
        lambda: [torch.bmm(g.u, g.weights.mT, out=g.y) for g in groups],
        width * (weights + both),
        flops,
    )
    yield Kernel(
        "descend: sums backward, flows, ratios",
        lambda: [launch.descend(layout, group) for group in reversed(groups)],
        width * (weights + both + messages + 2 * below),
        flops,
    )
    tables = list(layout.tables.values())
    weights = sum(part.weights.numel() for part in tables)
    yield Kernel(
        "learn_sums: flows, update, weights",
        lambda: [launch.learn_sums(layout, part, fast.step_size) for part in tables],
        width * (both + weights) + 2 * FLOAT * weights,
        flops,
    )
    yield Kernel(
        "read_weights",
        lambda: [launch.read_weights(layout, part) for part in tables],
        (FLOAT + width) * weights,
        0,
    )
    entries = sum(sum(leaves.sizes) * leaves.units for leaves in layout.leaves)
    flows = sum(leaves.count * leaves.reads * leaves.units for leaves in layout.leaves) * batch
    yield Kernel(
        "learn_leaves: scatter, update",
        lambda: [launch.learn_leaves(layout, part, fast.step_size) for part in layout.leaves],
        2 * FLOAT * entries + width * flows,
        0,
    )
