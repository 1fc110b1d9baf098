"""Which training process this is: the only reader of what launchers put in the environment."""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch

from distpc.errors import ResourceError


@dataclass(frozen=True)
class Mesh:
    """One process among the R training processes of a run.

    Attributes:
        rank: number of this process, 0 <= rank < world_size.
        world_size: number of training processes R.
        local_rank: number of this process on its machine.
        device: where this process computes; a GPU of its own when CUDA is available.
    """

    rank: int
    world_size: int
    local_rank: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        """Whether this process writes the files and figures of the run."""
        return self.rank == 0

    @classmethod
    def from_environment(cls) -> Mesh:
        """The mesh that torchrun, deepspeed or `launch.run_ranks` described; else one process.

        Raises:
            ResourceError: more processes on this machine than GPUs.
        """
        if not is_rank():
            return cls(0, 1, 0, _device(0))
        local_rank = int(os.environ.get("LOCAL_RANK", "0"))
        return cls(
            int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]), local_rank, _device(local_rank)
        )


def is_rank() -> bool:
    """Whether a launcher started this process as one of several training processes."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def is_main_process() -> bool:
    """Whether this process may speak to the terminal; asks no device."""
    return os.environ.get("RANK", "0") == "0"


def check_devices(num_local_ranks: int) -> None:
    """Refuse more processes on this machine than it has GPUs, where it has any.

    Raises:
        ResourceError: two processes would share a GPU, which NCCL refuses much later.
    """
    if not torch.cuda.is_available():
        return
    num_devices = torch.cuda.device_count()
    if num_local_ranks > num_devices:
        raise ResourceError(
            "more training processes than GPUs on this machine",
            where="parallel.num_ranks",
            found=f"{num_devices} GPUs",
            expected=f"{num_local_ranks} GPUs, one for each rank",
            fix=f"set parallel.num_ranks={num_devices}, or hide the GPUs "
            "(CUDA_VISIBLE_DEVICES=) to train on CPUs",
        )


def _device(local_rank: int) -> torch.device:
    check_devices(local_rank + 1)
    if torch.cuda.is_available():
        return torch.device("cuda", local_rank)
    return torch.device("cpu")
