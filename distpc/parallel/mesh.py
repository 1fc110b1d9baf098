"""Which training process this is: the only reader of what launchers put in the environment.

The R ranks of a run form a data x node mesh: rank = data_rank * node_parallel + node_rank. Ranks of
one data rank see the same samples and share a circuit's units; ranks of one node rank see different
samples. Consecutive ranks, which share a host, thus speak most.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, replace

import torch

from distpc.errors import ConfigError, ResourceError
from distpc.parallel.processes import interface_towards

RANK_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True)
class Mesh:
    """One process among the R training processes of a run.

    Attributes:
        rank: number of this process, 0 <= rank < world_size.
        world_size: number of training processes R.
        local_rank: number of this process on its machine.
        device: where this process computes; a GPU of its own when CUDA is available.
        node_parallel: ranks of the node axis, which share a model's units.
    """

    rank: int
    world_size: int
    local_rank: int
    device: torch.device
    node_parallel: int = 1

    @property
    def is_main(self) -> bool:
        """Whether this process writes the files and figures of the run."""
        return self.rank == 0

    @property
    def data_parallel(self) -> int:
        """Ranks of the data axis, which share a batch's samples."""
        return self.world_size // self.node_parallel

    @property
    def node_rank(self) -> int:
        """Place on the node axis: which units are this rank's."""
        return self.rank % self.node_parallel

    @property
    def data_rank(self) -> int:
        """Place on the data axis: which samples are this rank's."""
        return self.rank // self.node_parallel

    def with_node_axis(self, node_parallel: int) -> Mesh:
        """The same process in a data x node mesh.

        Raises:
            ConfigError: the ranks do not fill such a mesh.
        """
        check_node_axis(self.world_size, node_parallel)
        return replace(self, node_parallel=node_parallel)

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


@dataclass(frozen=True)
class Launch:
    """What a launcher told this process: its place among the ranks, and where their store is.

    Attributes:
        launcher: torchrun, deepspeed, or `other`.
        rank: number of this process, 0 <= rank < world_size.
        world_size: number of processes R.
        host: where the ranks' store is.
        port: of the store.
        has_store: whether the launcher itself holds the store; otherwise rank 0 opens it.
    """

    launcher: str
    rank: int
    world_size: int
    host: str
    port: int
    has_store: bool

    @classmethod
    def from_environment(cls) -> Launch:
        """What the environment says; asks no device.

        Raises:
            ConfigError: it names a rank, but not the other things, or no numbers.
        """
        try:
            return cls(
                launcher_name(),
                int(os.environ["RANK"]),
                int(os.environ["WORLD_SIZE"]),
                os.environ["MASTER_ADDR"],
                int(os.environ["MASTER_PORT"]),
                os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True",
            )
        except (KeyError, ValueError) as error:
            raise ConfigError(
                "the environment describes a rank, but not wholly",
                where=f"variables {', '.join(RANK_VARIABLES)}",
                found=f"{type(error).__name__}: {error}",
                expected="what torchrun or deepspeed set",
                fix="start distpc by launch/torchrun.sh or launch/deepspeed.sh, or unset them",
            ) from error


def launcher_name() -> str:
    """What starts the ranks: torchrun, deepspeed, other, a Ray cluster, or distpc itself."""
    if not is_rank():
        return "ray" if "RAY_ADDRESS" in os.environ else "distpc"
    if "TORCHELASTIC_RUN_ID" in os.environ:
        return "torchrun"
    return "deepspeed" if "CROSS_RANK" in os.environ else "other"


def launched_ranks() -> int | None:
    """How many ranks a launcher started, of which this process is one; None without one."""
    return Launch.from_environment().world_size if is_rank() else None


def is_rank() -> bool:
    """Whether a launcher started this process as one of several training processes."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def name_interface() -> None:
    """Have gloo speak through the interface that leads to rank 0's machine.

    It otherwise looks up this host's own name, which containers often cannot resolve. A value of
    GLOO_SOCKET_IFNAME that is set already stays.
    """
    interface = interface_towards(os.environ.get("MASTER_ADDR", ""))
    if interface is not None:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)


def is_main_process() -> bool:
    """Whether this process may speak to the terminal; asks no device."""
    return os.environ.get("RANK", "0") == "0"


def speaks_for_machine() -> bool:
    """Whether this is the first of the ranks on its machine; asks no device."""
    return os.environ.get("LOCAL_RANK", "0") == "0"


def check_node_axis(num_ranks: int, node_parallel: int) -> None:
    """Refuse ranks that do not fill a data x node mesh.

    Raises:
        ConfigError: the node axis does not divide the ranks.
    """
    if num_ranks % node_parallel:
        fitting = [size for size in range(1, num_ranks + 1) if num_ranks % size == 0]
        whole = max(1, num_ranks // node_parallel) * node_parallel
        raise ConfigError(
            "the ranks do not fill a mesh of data x node axis",
            where="parallel.node_parallel",
            found=f"{num_ranks} ranks in groups of {node_parallel}",
            expected=f"a divisor of {num_ranks}: {', '.join(map(str, fitting))}",
            fix=f"set parallel.node_parallel to one of them, or start {whole} or "
            f"{whole + node_parallel} ranks",
        )


def crowded(num_local_ranks: int, threads_per_rank: int) -> str | None:
    """A line on ranks that have to share this machine's cores; None where each has its own."""
    cores = len(os.sched_getaffinity(0))
    needed = num_local_ranks * threads_per_rank
    if torch.cuda.is_available() or needed <= cores:
        return None
    return (
        f"{num_local_ranks} ranks of {threads_per_rank} thread{'s' * (threads_per_rank > 1)} share "
        f"{cores} core{'s' * (cores > 1)}: they take turns, and a step takes about "
        f"{needed / cores:.3g} times as long as with {needed} cores"
    )


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
