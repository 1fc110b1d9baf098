"""Which elements of which tensor a rank holds, whatever the ZeRO stage: names and flat ranges.

Everything that is saved or loaded is said in the elements of whole tensors, never in rank numbers,
so that another number of ranks, another ZeRO stage or another axis of sharding finds its own.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from distpc.parallel.mesh import Mesh


@dataclass(frozen=True)
class Place:
    """Consecutive elements of one flattened tensor, where this rank keeps them.

    Attributes:
        name: of the parameter or buffer, as in the module's state dict.
        shape: of the whole tensor.
        start: first element.
        values: (n,) view of the elements start .. start + n - 1.
        holder: what the optimizer takes for a parameter and keys its own tensors by: the parameter
            itself, or a flat piece of several; None where the tensor is not trained.
        offset: of `start` in the flattened holder.
    """

    name: str
    shape: tuple[int, ...]
    start: int
    values: Tensor
    holder: Tensor | None
    offset: int

    def part(self, start: int, stop: int) -> Place:
        """The elements start .. stop - 1 of this place, counted from its own first."""
        return replace(
            self,
            start=self.start + start,
            values=self.values[start:stop],
            offset=self.offset + start,
        )


def places_of(
    named: Iterable[tuple[str, Tensor]], engine_optimizer: Any, mesh: Mesh, *, owned: bool
) -> list[Place]:
    """Where this rank holds elements of a model that DeepSpeed trains.

    Args:
        named: tensors of the module by name.
        engine_optimizer: DeepSpeed's, which knows the shards; any under ZeRO 0.
        mesh: this process among the ranks.
        owned: with True every element of every tensor has one place on one of the ranks:
            what is the same on all ranks is cut into equal shares. With False all that this rank
            holds the optimizer's tensors of.
    """
    sharded: list[Place] = []
    replicated: list[Place] = []
    for name, tensor in named:
        if hasattr(tensor, "ds_id"):
            sharded += _of_stage_3(name, tensor, engine_optimizer)
        elif hasattr(tensor, "_hp_mapping"):
            sharded += _of_stages_1_and_2(name, tensor, engine_optimizer)
        else:
            holder = tensor if tensor.requires_grad else None
            values = tensor.detach().reshape(-1)
            replicated.append(Place(name, tuple(tensor.shape), 0, values, holder, 0))
    return [*sharded, *(_share(replicated, mesh) if owned else replicated)]


def _of_stages_1_and_2(name: str, tensor: Any, engine_optimizer: Any) -> Iterator[Place]:
    mapping = tensor._hp_mapping
    if mapping is None:
        return
    whole, piece = mapping.lp_fragment_address, mapping.hp_fragment_address
    # The parameter's own values: in float32 they equal the optimizer's copy after every step.
    values = tensor.detach().reshape(-1).narrow(0, whole.start, whole.numel)
    holder = engine_optimizer.single_partition_of_fp32_groups[mapping.param_group_index]
    yield Place(name, tuple(tensor.shape), whole.start, values, holder, piece.start)


def _of_stage_3(name: str, tensor: Any, engine_optimizer: Any) -> Iterator[Place]:
    shard = tensor.ds_tensor
    start = shard.ds_numel * torch.distributed.get_rank(tensor.ds_process_group)
    # The last shards may be padded, or hold nothing but padding.
    count = min(shard.ds_numel, tensor.ds_numel - start)
    if count <= 0:
        return
    holder, offset = None, 0
    position = engine_optimizer.grad_position.get(engine_optimizer.get_param_id(tensor))
    if position is not None:
        group, offset, _ = position
        holder = engine_optimizer.fp32_partitioned_groups_flat[group]
    values = shard.detach().reshape(-1).narrow(0, 0, count)
    yield Place(name, tuple(tensor.ds_shape), start, values, holder, offset)


def _share(places: list[Place], mesh: Mesh) -> list[Place]:
    """This rank's consecutive share of the elements of all places together."""
    total = sum(len(place.values) for place in places)
    first, last = (total * rank // mesh.world_size for rank in (mesh.rank, mesh.rank + 1))
    found: list[Place] = []
    begin = 0
    for place in places:
        count = len(place.values)
        start, stop = max(first - begin, 0), min(last - begin, count)
        if start < stop:
            found.append(place.part(start, stop))
        begin += count
    return found
