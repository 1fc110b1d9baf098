"""Which layout of ranks a run should take on a cluster: memory, traffic and time of each."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

from distpc.circuits.footprint import Footprint, shared
from distpc.errors import ConfigError, ResourceError
from distpc.parallel.memory import Layout, share
from distpc.parallel.progress import in_bytes
from distpc.parallel.traffic import Links, traffic
from distpc.training.needs import layout_of, peak_bytes

SLACK = 1.05
"""Of layouts within this factor of the fastest, the simplest is taken."""


@dataclass(frozen=True)
class Cluster:
    """What a run may use.

    Attributes:
        hosts: machines.
        gpus_per_host: devices, and so ranks, of one.
        memory_bytes: of one device that the run may fill.
        link_gbps: gigabits a second that one device sends to other hosts.
        host_link_gbps: gigabits a second that one device sends within its host.
        latency_us: microseconds that any collective operation takes, however small.
        device_tflops: 1e12 floating-point operations a second that a device reaches in products
            of matrices.
    """

    hosts: int
    gpus_per_host: int
    memory_bytes: int
    link_gbps: float = 400.0
    host_link_gbps: float = 3600.0
    latency_us: float = 20.0
    device_tflops: float = 50.0

    @property
    def num_ranks(self) -> int:
        """R, one rank a device."""
        return self.hosts * self.gpus_per_host

    @property
    def links(self) -> Links:
        """In bytes."""
        within, between = self.host_link_gbps * 1e9 / 8, self.link_gbps * 1e9 / 8
        return Links(self.gpus_per_host, within, between, self.latency_us / 1e6)


@dataclass(frozen=True)
class Job:
    """What is trained.

    Attributes:
        costs: the whole circuit's sizes.
        batch: samples of a global batch.
        state_copies: tensors of a parameter's size that the training rule keeps.
        needs_whole_rows: whether the rule cannot work on shards of ZeRO.
        needs_whole_circuit: whether it cannot work on shares of the node axis either.
        offload: whether what ZeRO shards lies in the host's memory.
    """

    costs: Footprint
    batch: int
    state_copies: int = 0
    needs_whole_rows: bool = False
    needs_whole_circuit: bool = False
    offload: bool = False


@dataclass(frozen=True)
class Pinned:
    """Fields of the layout that the user has chosen: only layouts with them are considered.

    Attributes:
        node_axis, zero_stage, micro_batch: their values; None where the planner chooses.
    """

    node_axis: int | None = None
    zero_stage: int | None = None
    micro_batch: int | None = None

    FIELDS: ClassVar = {
        "node_axis": "parallel.node_parallel",
        "zero_stage": "parallel.zero_stage",
        "micro_batch": "finetune.micro_batch_size",
    }

    def admits(self, layout: Layout) -> bool:
        """Whether a layout has these values."""
        return self.node_axis in (None, layout.node_axis) and self.zero_stage in (
            None,
            layout.zero_stage,
        )

    def to_json(self) -> dict[str, int]:
        """The fields of the configuration that are pinned."""
        values = {field: getattr(self, name) for name, field in self.FIELDS.items()}
        return {field: value for field, value in values.items() if value is not None}

    def __str__(self) -> str:
        """As on the command line; empty where nothing is pinned."""
        return " ".join(f"{field}={value}" for field, value in self.to_json().items())


@dataclass(frozen=True)
class Option:
    """One layout, with the largest micro-batch that fits.

    Attributes:
        layout: of the ranks.
        micro_batch: samples that one rank puts through the circuit at once.
        memory: bytes of one rank at its peak, by what they are for.
        sent: bytes that one rank sends in a step.
        compute_seconds, link_seconds: of a step.
        fits: whether the memory is there.
    """

    layout: Layout
    micro_batch: int
    memory: dict[str, int]
    sent: int
    compute_seconds: float
    link_seconds: float
    fits: bool

    @property
    def peak(self) -> int:
        """Bytes of one rank."""
        return sum(self.memory.values())

    @property
    def seconds(self) -> float:
        """Of a step, nothing hidden behind anything."""
        return self.compute_seconds + self.link_seconds

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {
            "node_axis": self.layout.node_axis,
            "data_axis": self.layout.data_axis,
            "zero_stage": self.layout.zero_stage,
            "micro_batch": self.micro_batch,
            "bytes_per_rank": {**self.memory, "total": self.peak},
            "bytes_sent_per_step": self.sent,
            "compute_seconds": self.compute_seconds,
            "link_seconds": self.link_seconds,
            "step_seconds": self.seconds,
            "fits": self.fits,
        }


def in_words(memory: dict[str, int]) -> str:
    """Bytes by what they are for."""
    return ", ".join(
        f"{name.replace('_', ' ')} {in_bytes(size)}" for name, size in memory.items() if size
    )


def options(job: Job, cluster: Cluster, pinned: Pinned = Pinned()) -> list[Option]:
    """All layouts of the cluster's ranks, fitting ones first, by rising time of a step.

    Args:
        job: to train.
        cluster: to train on.
        pinned: what they must have.

    Raises:
        ResourceError: no layout of so many ranks leaves every replica a sample.
        ConfigError: none has what is pinned.
    """
    layouts = list(_layouts(job, cluster.num_ranks))
    if not layouts:
        raise ResourceError(
            "no layout gives every replica a sample of the global batch",
            where="finetune.batch_size",
            found=f"{job.batch} samples on {cluster.num_ranks} devices, which may share "
            f"{job.costs.state_units} states",
            expected=f"devices / node axis <= {job.batch}, for a node axis that divides both "
            f"{cluster.num_ranks} devices and {job.costs.state_units} states",
            fix="raise finetune.batch_size, or plan for fewer nodes",
        )
    admitted = [layout for layout in layouts if pinned.admits(layout)]
    if not admitted:
        raise ConfigError(
            f"no layout of {cluster.num_ranks} ranks has {pinned}",
            where="the fields given on the command line",
            expected="one of (node axis x data axis) "
            + "; ".join(layout.name for layout in layouts),
            fix="change or leave out these fields: without them the planner chooses",
        )
    found = [_option(job, cluster, layout, pinned.micro_batch) for layout in admitted]
    return sorted(found, key=lambda o: (not o.fits, o.seconds if o.fits else o.peak))


def choose(found: list[Option], cluster: Cluster, pinned: Pinned = Pinned()) -> Option:
    """The simplest of the layouts that are nearly as fast as the fastest that fits.

    Args:
        found: of `options`.
        cluster: that they are for.
        pinned: what they were restricted to.

    Raises:
        ResourceError: none fits; with the least that one needs.
    """
    usable = [option for option in found if option.fits]
    if usable:
        fastest = min(option.seconds for option in usable)
        near = [option for option in usable if option.seconds <= SLACK * fastest]
        return min(near, key=lambda o: (o.layout.node_axis, o.layout.zero_stage))
    least = min(found, key=lambda option: option.peak)
    considered = f" with {pinned}" if str(pinned) else ""
    raise ResourceError(
        f"no layout{considered} fits this circuit onto the cluster",
        where=f"{cluster.hosts} x {cluster.gpus_per_host} devices",
        found=f"{in_bytes(cluster.memory_bytes)} usable on a device "
        "(--gpu-memory-gib less --reserve-gib)",
        expected=f"at least {in_bytes(least.peak)} ({least.layout.name}, "
        f"micro-batch {least.micro_batch}): " + in_words(least.memory),
        fix="leave these fields out, " * bool(considered) + "more or larger devices, fewer "
        "states, or block-diagonal sums (structure.layer=monarch)",
    )


def reason(chosen: Option, found: list[Option]) -> str:
    """Why this layout, in a sentence or two."""
    fitting = [option for option in found if option.fits and option is not chosen]
    fastest = min(fitting, key=lambda option: option.seconds, default=None)
    if fastest is None:
        texts = ["the only one that fits"]
    elif fastest.seconds < chosen.seconds:
        texts = [f"simpler than the fastest, {fastest.layout.name}, and nearly as fast"]
    else:
        factor = fastest.seconds / chosen.seconds
        texts = [f"the fastest that fits; the next, {fastest.layout.name}, takes {factor:.2f} x"]
    axis, stage = chosen.layout.node_axis, chosen.layout.zero_stage
    lacking = [
        option
        for option in found
        if not option.fits and option.layout.node_axis == axis and option.layout.zero_stage < stage
    ]
    texts += [f"{o.layout.name} would need {in_bytes(o.peak)}" for o in lacking]
    return "; ".join(texts)


def _layouts(job: Job, num_ranks: int) -> Iterator[Layout]:
    for node_axis in range(1, num_ranks + 1):
        if num_ranks % node_axis or job.costs.state_units % node_axis:
            continue
        data_axis = num_ranks // node_axis
        if data_axis > job.batch or (job.needs_whole_circuit and node_axis > 1):
            continue
        # Messages are not computed again under ZeRO 3, see `recompute`.
        last = 2 if job.costs.stretches else 3
        # Offloading is of what ZeRO shards.
        first = 1 if job.offload else 0
        alone = job.needs_whole_rows or data_axis == 1
        stages = (first,) if alone else range(first, last + 1)
        for stage in stages:
            yield layout_of(job.costs, node_axis, data_axis, stage, offload=job.offload)


def _option(job: Job, cluster: Cluster, layout: Layout, most: int | None = None) -> Option:
    """With the largest micro-batch that fits, or of one sample where none does; or of `most`."""
    local = share(job.batch, layout.data_axis)
    pieces = 1 if most is None else share(local, most)
    while True:
        micro_batch = share(local, pieces)
        memory = peak_bytes(
            job.costs,
            layout,
            micro_batch=micro_batch,
            num_micro_batches=pieces,
            state_copies=job.state_copies,
        )
        fits = sum(memory.values()) <= cluster.memory_bytes
        if fits or micro_batch == 1 or most is not None:
            break
        pieces *= 2
    costs = shared(job.costs, layout.node_axis)
    sent = traffic(
        costs,
        layout,
        local_batch=local,
        num_micro_batches=pieces,
    )
    # A multiply-add is two operations.
    operations = 2 * costs.num_passes * costs.multiply_adds * local
    return Option(
        layout,
        micro_batch,
        memory,
        sent.total,
        operations / (cluster.device_tflops * 1e12),
        sent.seconds(layout, cluster.links),
        fits,
    )
