"""What the ranks tell each other; every function also works alone, without a process group."""

from __future__ import annotations

import contextlib
import traceback
from collections.abc import Iterator
from datetime import timedelta
from typing import Any, NamedTuple, TypeVar

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d

from distpc.errors import TrainingError
from distpc.parallel.axis import Axis
from distpc.parallel.mesh import Mesh, name_interface

T = TypeVar("T")


class Axes(NamedTuple):
    """The groups that one rank belongs to."""

    node: Axis
    data: Axis


_axes: dict[tuple[int, int], Axes] = {}

COLLECTIVE_SECONDS = 600.0
"""That an operation waits for other ranks, unless `start` was told otherwise."""
_seconds = COLLECTIVE_SECONDS
_TIMED_OUT = "Timed out waiting"
"""What gloo says of an operation that others did not take part in."""
_SHOWN_FRAMES = 4


def start(
    mesh: Mesh, store: dist.Store | None = None, *, seconds: float = COLLECTIVE_SECONDS
) -> None:
    """Join the process group of the mesh: gloo for CPU tensors, nccl for GPU tensors.

    Idempotent. A mesh of one process gets a group of its own that opens no port.

    Args:
        mesh: this process among the ranks.
        store: where the ranks find each other; default: the one that the environment names.
        seconds: that any operation may wait for the other ranks from then on.
    """
    global _seconds
    if dist.is_initialized():
        return
    if mesh.device.type == "cuda":
        torch.cuda.set_device(mesh.device)
    backend = "cpu:gloo,cuda:nccl" if mesh.device.type == "cuda" else "gloo"
    if mesh.world_size == 1:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    else:
        name_interface()
        dist.init_process_group(backend, store=store, rank=mesh.rank, world_size=mesh.world_size)
    _seconds = seconds
    bound_waits()


def bound_waits() -> None:
    """Give all groups the time that `start` was told; after somebody else has made groups.

    Groups have torch's own limits while ranks meet, which takes as long as their starts differ.
    """
    for group in distributed_c10d._world.pg_map:
        distributed_c10d._set_pg_timeout(timedelta(seconds=_seconds), group)


@contextlib.contextmanager
def waits_told(mesh: Mesh) -> Iterator[None]:
    """Inside, an operation that others do not take part in ends in an error of ours.

    Raises:
        TrainingError: this rank waited longer than `start` allows.
    """
    try:
        yield
    except RuntimeError as error:
        if _TIMED_OUT not in str(error):
            raise
        raise _in_vain(error, mesh) from error


def finish() -> None:
    """Leave the process group; call it at the end of every rank, also after an error.

    Without it a rank may exit non-zero after correct results.
    """
    _axes.clear()
    if dist.is_initialized():
        dist.destroy_process_group()


def axes(mesh: Mesh) -> Axes:
    """The groups of this rank's node and data axis; a collective of all ranks at the first call.

    Kept until `finish`, because a group cannot be made by some of its ranks alone.
    """
    key = mesh.world_size, mesh.node_parallel
    if key not in _axes:
        rows = torch.arange(mesh.world_size).view(-1, mesh.node_parallel)
        _axes[key] = Axes(
            node=Axis.among(rows.tolist(), mesh.rank), data=Axis.among(rows.T.tolist(), mesh.rank)
        )
        bound_waits()
    return _axes[key]


def sum_across(tensor: torch.Tensor, mesh: Mesh) -> torch.Tensor:
    """Element-wise sum of `tensor` (same shape on every rank) over the R ranks, as a new tensor."""
    return _reduced(tensor, mesh, dist.ReduceOp.SUM)


def mean_across(tensor: torch.Tensor, mesh: Mesh) -> torch.Tensor:
    """Element-wise mean of a floating `tensor` over the R ranks, as a new tensor."""
    return sum_across(tensor, mesh) / mesh.world_size


def max_across(tensor: torch.Tensor, mesh: Mesh) -> torch.Tensor:
    """Element-wise maximum of `tensor` over the R ranks, as a new tensor."""
    return _reduced(tensor, mesh, dist.ReduceOp.MAX)


def broadcast_object(value: T, mesh: Mesh) -> T:
    """Rank 0's `value`, on every rank; what other ranks pass is ignored."""
    if mesh.world_size == 1:
        return value
    holder: list[Any] = [value]
    dist.broadcast_object_list(holder, src=0)
    return holder[0]


def gather_objects(value: T, mesh: Mesh) -> list[T]:
    """The `value` of every rank, in rank order, on every rank."""
    if mesh.world_size == 1:
        return [value]
    values: list[Any] = [None] * mesh.world_size
    dist.all_gather_object(values, value)
    return values


def barrier(mesh: Mesh) -> None:
    """Wait until every rank is here."""
    if mesh.world_size > 1:
        dist.barrier()


def _reduced(tensor: torch.Tensor, mesh: Mesh, operation: Any) -> torch.Tensor:
    result = tensor.detach().clone()
    if mesh.world_size > 1:
        dist.all_reduce(result, op=operation)
    return result


def _in_vain(error: RuntimeError, mesh: Mesh) -> TrainingError:
    calls = [
        f"{frame.filename}:{frame.lineno} in {frame.name}"
        for frame in traceback.extract_tb(error.__traceback__)
        if not any(part in frame.filename for part in ("/torch/", "/deepspeed/"))
    ]
    return TrainingError(
        f"rank {mesh.rank} of {mesh.world_size} waited in vain for the others",
        where="\n".join(["a collective operation", *reversed(calls[-_SHOWN_FRAMES:])]),
        found=f"not all of them within {_seconds:g} s (parallel.collective_seconds)",
        expected="every rank to take part in the same operations",
        fix="look where the other ranks were (rank-N.log beside the stage's result); if one only "
        "computed that long, raise parallel.collective_seconds; the same command goes on from "
        "the last checkpoint",
    )
