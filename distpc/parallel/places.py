"""Which elements of which tensor a rank holds, whatever the ZeRO stage: names and flat ranges.

Everything that is saved or loaded is said in the elements of whole tensors, never in rank numbers,
so that another number of ranks, another ZeRO stage or another axis of sharding finds its own.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from distpc.parallel.mesh import Mesh


@dataclass(frozen=True)
class Split:
    """How ranks of the node axis share a tensor: equal parts side by side along one dimension.

    A split tensor's elements are counted part by part, each part flattened by itself, so that what
    a rank holds of it is consecutive.

    Attributes:
        dim: along which it is cut, counted from the front.
        parts: n.
    """

    dim: int
    parts: int

    def part(self, whole: Tensor, number: int) -> Tensor:
        """A view of one part."""
        size = whole.shape[self.dim] // self.parts
        return whole.narrow(self.dim, number * size, size)

    def whole_shape(self, shape: Iterable[int]) -> tuple[int, ...]:
        """The shape of the tensor that parts of `shape` make up."""
        sizes = list(shape)
        sizes[self.dim] *= self.parts
        return tuple(sizes)

    def flattened(self, whole: Tensor) -> Tensor:
        """The elements of a whole tensor in the order in which they are counted."""
        return torch.cat([self.part(whole, n).reshape(-1) for n in range(self.parts)])

    def index_of(self, element: int, shape: Iterable[int]) -> tuple[int, ...]:
        """Where the element of that number lies in the whole tensor of `shape`."""
        part = list(shape)
        part[self.dim] //= self.parts
        number, within = divmod(element, math.prod(part))
        index = unravelled(within, part)
        return (
            *index[: self.dim],
            index[self.dim] + number * part[self.dim],
            *index[self.dim + 1 :],
        )

    def joined(self, elements: Tensor, shape: Iterable[int]) -> Tensor:
        """The whole tensor of `shape` from its elements in that order."""
        part = list(shape)
        part[self.dim] //= self.parts
        parts = elements.view(self.parts, math.prod(part))
        return torch.cat([values.view(part) for values in parts], self.dim)


def unravelled(element: int, shape: Iterable[int]) -> tuple[int, ...]:
    """The index of an element of a flattened tensor of `shape`."""
    index: list[int] = []
    for size in reversed(list(shape)):
        element, place = divmod(element, size)
        index.insert(0, place)
    return tuple(index)


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
        split: how its elements are counted, where ranks of the node axis share the tensor.
    """

    name: str
    shape: tuple[int, ...]
    start: int
    values: Tensor
    holder: Tensor | None
    offset: int
    split: Split | None = None

    def index_of(self, number: int) -> tuple[int, ...]:
        """Where its element `number` lies in the whole tensor."""
        if self.split is None:
            return unravelled(self.start + number, self.shape)
        return self.split.index_of(self.start + number, self.shape)

    def part(self, start: int, stop: int) -> Place:
        """The elements start .. stop - 1 of this place, counted from its own first."""
        return replace(
            self,
            start=self.start + start,
            values=self.values[start:stop],
            offset=self.offset + start,
        )


def places_of(
    named: Iterable[tuple[str, Tensor]],
    engine_optimizer: Any,
    mesh: Mesh,
    splits: Mapping[str, Split],
    *,
    owned: bool,
) -> list[Place]:
    """Where this rank holds elements of a model that DeepSpeed trains.

    Args:
        named: tensors of the module by name.
        engine_optimizer: DeepSpeed's, which knows the shards; any under ZeRO 0.
        mesh: this process among the ranks.
        splits: tensors of which this rank's module holds a part.
        owned: with True every element of every tensor has one place on one of the ranks:
            what is the same on several ranks is cut into equal shares. With False all that this
            rank holds the optimizer's tensors of.
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
    if owned:
        of_data = [place for place in replicated if place.name in splits]
        of_all = [place for place in replicated if place.name not in splits]
        replicated = _share(of_data, mesh.data_rank, mesh.data_parallel)
        replicated += _share(of_all, mesh.rank, mesh.world_size)
        if mesh.node_rank > 0:
            # Shards of what all node ranks hold alike are the first one's.
            sharded = [place for place in sharded if place.name in splits]
    return [_in_whole(place, splits, mesh) for place in (*sharded, *replicated)]


def _in_whole(place: Place, splits: Mapping[str, Split], mesh: Mesh) -> Place:
    """A place in this rank's part of a tensor as one in the whole tensor."""
    split = splits.get(place.name)
    if split is None:
        return place
    start = place.start + mesh.node_rank * math.prod(place.shape)
    return replace(place, shape=split.whole_shape(place.shape), start=start, split=split)


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


def _share(places: list[Place], rank: int, num_ranks: int) -> list[Place]:
    """One rank's consecutive share of the elements of all places together."""
    total = sum(len(place.values) for place in places)
    first, last = (total * number // num_ranks for number in (rank, rank + 1))
    found: list[Place] = []
    begin = 0
    for place in places:
        count = len(place.values)
        start, stop = max(first - begin, 0), min(last - begin, count)
        if start < stop:
            found.append(place.part(start, stop))
        begin += count
    return found
