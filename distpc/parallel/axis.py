"""The ranks along one axis of the mesh, and what they send each other: tensors of equal shapes.

Bytes are those of a ring: (n - 1) / n of a payload for gathering and scattering, on every backend.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class Axis:
    """A group of ranks, as one of them sees it.

    Attributes:
        ranks: of the world, in the order of the axis.
        rank: this process's place among them.
        group: what torch calls the group.
    """

    ranks: tuple[int, ...]
    rank: int
    group: dist.ProcessGroup | None

    @classmethod
    def among(cls, groups: Sequence[Sequence[int]], rank: int) -> Axis:
        """The one of disjoint groups that `rank` is in; a collective of all ranks."""
        own: Axis | None = None
        for ranks in groups:
            # DeepSpeed asks for a group even where a rank is alone in it.
            group = dist.group.WORLD if len(groups) == 1 else dist.new_group(list(ranks))
            if rank in ranks:
                own = cls(tuple(ranks), list(ranks).index(rank), group)
        assert own is not None
        return own

    @property
    def size(self) -> int:
        """Ranks n along the axis."""
        return len(self.ranks)

    def all_gather(self, tensor: Tensor) -> Tensor:
        """(...) of each rank -> (n, ...) in their order, on all of them."""
        out = tensor.new_empty(self.size, *tensor.shape)
        if tensor.numel():
            dist.all_gather_into_tensor(out.view(-1), tensor.reshape(-1), group=self.group)
        return out

    def sum_scatter(self, tensor: Tensor) -> Tensor:
        """(n, ...) of each rank -> the sum (...) over ranks of the part that is this rank's."""
        out = torch.empty_like(tensor[0])
        if not tensor.numel():
            return out
        if tensor.device.type == "cpu":
            # gloo would all-reduce, which sends twice as much.
            parts = torch.empty_like(tensor)
            dist.all_to_all_single(parts, tensor, group=self.group)
            return parts.sum(0)
        dist.reduce_scatter_tensor(out.view(-1), tensor.reshape(-1), group=self.group)
        return out

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum over ranks, bit for bit the same on all of them; a new tensor."""
        total = tensor.clone(memory_format=torch.contiguous_format)
        if total.numel():
            dist.all_reduce(total, group=self.group)
        return total
