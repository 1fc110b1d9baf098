"""The errors for workers of a cluster that died, or that it has no place for."""

from __future__ import annotations

from typing import Any

from distpc.config.schema import ParallelConfig
from distpc.errors import HeldLostError, ResourceError
from distpc.parallel.worker import shown

_SHOWN_CHARACTERS = 300
_AGAIN = "then run the same command again: finished items are kept"


def of_item(index: int, item: Any, deaths: int, cause: str) -> ResourceError:
    """One item was given to several workers, and all died."""
    return ResourceError(
        f"{deaths} workers in a row died over the same item",
        where=f"item {index}: {shown(item)}",
        found=cause,
        expected="a worker that lives to finish it",
        fix=f"most often memory: lower parallel.num_workers or the size of a shard, {_AGAIN}",
    )


def at_start(worker: str, deaths: int, cause: str) -> ResourceError:
    """Workers died before they were given anything."""
    return ResourceError(
        f"{deaths} workers in a row died while they started",
        where=f"worker {worker}",
        found=cause,
        expected="workers that live to be given an item",
        fix=f"most often memory: lower parallel.num_workers, {_AGAIN}",
    )


def no_room(parallel: ParallelConfig, machines: list[dict[str, float]]) -> ResourceError:
    """The cluster lost the machines on which workers could run."""
    cpus = sum(machine.get("CPU", 0) for machine in machines)
    gpus = sum(machine.get("GPU", 0) for machine in machines)
    return ResourceError(
        "the cluster shrank until no machine has room for a worker",
        where=f"after waiting parallel.join_seconds={parallel.join_seconds:g} for one to join",
        found=f"{cpus:g} CPUs and {gpus:g} GPUs on {len(machines)} machine(s)",
        expected=f"{parallel.cpus_per_worker:g} CPUs and {parallel.gpus_per_worker:g} GPUs "
        "on one machine",
        fix=f"add machines, {_AGAIN}",
    )


def of_held(index: int, cause: object) -> HeldLostError:
    """An item's handle leads to what a lost machine held."""
    return HeldLostError(
        "a machine was lost with results that it held for later work",
        where=f"item {index}",
        found=" ".join(str(cause).split())[:_SHOWN_CHARACTERS],
        fix="run the same command again: finished work is kept",
    )


def of_own_node(node: str) -> ResourceError:
    """The cluster's process that connects this driver is gone."""
    return ResourceError(
        "the cluster lost the node that this process is attached to",
        where=f"node {node}",
        found="its Ray process (raylet) is dead",
        expected="a node that lives as long as its drivers",
        fix=f"start it again, {_AGAIN}",
    )
