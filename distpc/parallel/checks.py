"""Whether ranks still hold alike what they must hold alike, bit by bit.

Replicas are never compared by training itself: each rank updates its own from reduced gradients.
Bad memory, or one reduction that is not the same on all ranks, would let them drift apart silently.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import Tensor

from distpc.errors import TrainingError
from distpc.parallel.collectives import gather_objects
from distpc.parallel.engine import Engine
from distpc.parallel.mesh import Mesh

_WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_AT_ONCE = 2**20
"""Elements that are looked at together, to bound memory."""


@torch.no_grad()
def check_replicas(engine: Engine, step: int) -> None:
    """Compare what ranks hold more than once; a collective of all ranks.

    Under ZeRO 0 to 2 ranks of the data axis hold every parameter and buffer alike; ranks of the
    node axis hold alike what they do not share, under ZeRO 3 their shards of it.

    Args:
        engine: whose model is compared.
        step: number of the step, for the error.

    Raises:
        TrainingError: on every rank, naming the parameter, the first row that differs and the rank.
    """
    mesh = engine.mesh
    if mesh.world_size == 1:
        return
    named = list(engine.module.state_dict(keep_vars=True).items())
    of_ranks = gather_objects([_digest(_held(tensor)[0]) for _, tensor in named], mesh)
    for number, (name, tensor) in enumerate(named):
        for group in _groups(mesh, name in engine.splits, hasattr(tensor, "ds_tensor")):
            first = of_ranks[group[0]][number]
            odd = [rank for rank in group if of_ranks[rank][number] != first]
            if odd:
                raise _differs(engine, name, tensor, (group[0], odd[0]), step)


def _groups(mesh: Mesh, is_split: bool, is_sharded: bool) -> list[list[int]]:
    """The ranks that hold a tensor alike."""
    rows = torch.arange(mesh.world_size).view(-1, mesh.node_parallel)
    if is_split:
        return [] if is_sharded else rows.T.tolist()
    return rows.tolist() if is_sharded else [rows.flatten().tolist()]


def _held(tensor: Tensor) -> tuple[Tensor, int]:
    """What this rank holds of a tensor, flat, and the number of its first element."""
    shard = getattr(tensor, "ds_tensor", None)
    if shard is None:
        return tensor.detach().reshape(-1), 0
    start = shard.ds_numel * dist.get_rank(tensor.ds_process_group)  # type: ignore[attr-defined]
    # The last shards may be padded.
    count = max(0, min(shard.ds_numel, tensor.ds_numel - start))  # type: ignore[attr-defined]
    return shard.detach().reshape(-1)[:count], start


def _digest(values: Tensor) -> int:
    """A number that changes with any bit, and with the order of elements."""
    return sum(int(part.sum()) for part in _marks(values)) % 2**63


def _marks(values: Tensor) -> Iterator[Tensor]:
    """For each element a number made of its bits and its place, some elements at a time."""
    words = values.view(_WORDS[values.element_size()])
    for number, part in enumerate(words.split(_AT_ONCE)):
        yield (part.long() + number) * (2 * torch.arange(len(part), device=part.device) + 1)


def _differs(
    engine: Engine, name: str, tensor: Tensor, ranks: tuple[int, int], step: int
) -> TrainingError:
    """The error for a tensor that two ranks hold differently; a collective of all ranks."""
    held, start = _held(tensor)
    # Only two ranks' values are looked at, but every rank has to take part.
    given = (held.cpu(), start) if engine.mesh.rank in ranks else None
    (one, start), (other, _) = (
        found
        for rank, found in enumerate(gather_objects(given, engine.mesh))
        if rank in ranks and found is not None
    )
    words = _WORDS[one.element_size()]
    place = int((one.view(words) != other.view(words)).nonzero()[0])
    shape = tuple(getattr(tensor, "ds_shape", tensor.shape)) or (1,)
    index = torch.unravel_index(torch.tensor(start + place), shape)
    row = [int(number) for number in index[:-1]]
    split = engine.splits.get(name)
    if split is not None and split.dim < len(row):
        row[split.dim] += ranks[0] % engine.mesh.node_parallel * shape[split.dim]
    return TrainingError(
        "ranks that must hold a parameter alike differ",
        where=f"step {step}, parameter '{name}', row {row}, ranks {ranks[0]} and {ranks[1]}",
        found=f"{float(other[place])!r} on rank {ranks[1]}",
        expected=f"{float(one[place])!r}, as on rank {ranks[0]}",
        fix="look for faulty memory on their hosts; run the same command again to go on from the "
        "last checkpoint",
    )
