"""Training steps through DeepSpeed ZeRO, for any model and any element-wise optimizer."""

from __future__ import annotations

import itertools
import logging
import os
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from distpc.errors import TrainingError
from distpc.parallel import collectives
from distpc.parallel.memory import MOST_BUCKET
from distpc.parallel.mesh import Mesh
from distpc.parallel.places import Place, Split, places_of

if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")

import deepspeed

# Otherwise DeepSpeed compiles a C++ reduction for CPUs at the first start, which takes minutes
# where it works at all, and whose shared memory outlives a killed rank.
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")


class Engine:
    """A model and its optimizer under ZeRO, stepped once a global batch.

    ::

        for piece in engine.micro_batches(len(x), global_count=G, micro_batch=64):
            engine.backward(-engine(x[piece]).sum(), global_count=G)
        engine.step()

    Under ZeRO 2 and 3 every forward and backward pass is a collective operation: all ranks must
    make the same number of them (see `micro_batches`). The optimizer sees flat pieces of
    parameters, so its step must be element-wise, and under ZeRO 3 it is stepped several times a
    step, each time with part of the parameters. Writing to `optimizer.param_groups` (learning
    rates) works between steps. Its `state_dict` is whole, and the same on every rank, under ZeRO 0
    only.

    Attributes:
        module: the model; under ZeRO 3 its parameters are empty outside a forward pass.
        optimizer: the optimizer that was given.
        mesh: this process among the ranks.
        config_json: the configuration that DeepSpeed was given, for the logs.

    Args:
        model: float32 module, the same on every rank (rank 0's values count).
        optimizer: over the model's parameters; parameters without a gradient may be left out.
        mesh: this process among the ranks; its process group is joined if it was not. Ranks of its
            node axis must be given the same samples, and ZeRO shards over its data axis.
        zero_stage: 0 replicates everything; 1 shards optimizer state, 2 also gradients, 3 also
            parameters.
        reduce_bucket: elements that are reduced, gathered or kept alive at once.
        offload: keep in the host's memory what ZeRO shards: under ZeRO 1 and 2 the master copy,
            which the optimizer steps there, under 2 flows too, and under 3 also parameters.
        splits: names of parameters and buffers of which the model holds the node rank's part. The
            model itself sees to what ranks of a node axis have to tell each other.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        mesh: Mesh,
        zero_stage: int = 0,
        reduce_bucket: int = MOST_BUCKET,
        offload: bool = False,
        splits: Mapping[str, Split] | None = None,
    ) -> None:
        collectives.start(mesh)
        self.splits = dict(splits or {})
        self.module = model.to(mesh.device)
        self.optimizer = optimizer
        self.mesh = mesh
        self.zero_stage = zero_stage
        self.config_json = deepspeed_config(zero_stage, reduce_bucket, offload=offload)
        # It warns of every optimizer that is not on its list; ours are element-wise and tested.
        log = logging.getLogger("DeepSpeed")
        level = log.level
        log.setLevel(logging.ERROR)
        # DeepSpeed remembers that of the engine before.
        deepspeed.utils.groups.mpu = None
        try:
            self._engine, *_ = deepspeed.initialize(
                model=model,
                optimizer=optimizer,
                config=self.config_json,
                dist_init_required=False,
                mpu=ModelParallelUnit(mesh) if mesh.node_parallel > 1 else None,
            )
        finally:
            log.setLevel(level)
        # DeepSpeed has made groups of its own.
        collectives.bound_waits()

    def __call__(self, *inputs: Any, **keywords: Any) -> Any:
        """The model's forward pass."""
        return self._engine(*inputs, **keywords)

    def train(self, mode: bool = True) -> Engine:
        """Put the model in training mode, or in evaluation mode with False."""
        self._engine.train(mode)
        return self

    def eval(self) -> Engine:
        """Put the model in evaluation mode."""
        return self.train(False)

    def micro_batches(self, num_local: int, *, global_count: int, micro_batch: int) -> list[slice]:
        """Cut this rank's samples into as many pieces as every other rank's.

        Assumes shares of a global batch that differ by one sample at most. Pieces hold at most
        `micro_batch` samples; one may be empty, and has to be forwarded all the same.

        Args:
            num_local: samples of this rank.
            global_count: samples of all ranks.
            micro_batch: samples that fit in memory at once.
        """
        largest_share = -(-global_count // self.mesh.data_parallel)
        pieces = max(1, -(-largest_share // micro_batch))
        cuts = [num_local * piece // pieces for piece in range(pieces + 1)]
        return [slice(start, stop) for start, stop in itertools.pairwise(cuts)]

    def backward(self, local_sum_loss: torch.Tensor, *, global_count: int) -> None:
        """Add to the gradients those of one micro-batch.

        After all micro-batches of all ranks a gradient is that of (sum of their losses) /
        `global_count`, whatever the sizes of the micro-batches.

        Args:
            local_sum_loss: loss summed (not averaged) over this micro-batch's samples.
            global_count: samples in the global batch, over all ranks and micro-batches.
        """
        # DeepSpeed averages over the data axis, so this factor turns its mean into a sum.
        scale = self.mesh.data_parallel / global_count
        self._engine.backward(local_sum_loss * scale, scale_wrt_gas=False)

    def step(self) -> None:
        """Reduce the gradients of this global batch, step the optimizer, clear the gradients.

        Raises:
            TrainingError: a gradient was not finite, so that DeepSpeed left out the step.
        """
        self._engine.step()
        if not self._engine.was_step_applied():
            raise TrainingError(
                "a training step was left out because a gradient is not finite",
                where=f"step {self._engine.global_steps}",
                expected="finite gradients",
                fix="lower the step size, or check the data; the last good model is kept",
            )

    @property
    def num_steps(self) -> int:
        """Steps taken by this engine."""
        return self._engine.global_steps

    def places(self, *, owned: bool) -> list[Place]:
        """Where this rank keeps elements of the model and of the optimizer's tensors.

        Args:
            owned: True for each element of the model on exactly one rank, as a checkpoint wants;
                False for all whose optimizer state this rank keeps, as a resumed one wants.
        """
        named, optimizer = self._named_tensors(), self._engine.optimizer
        return places_of(named, optimizer, self.mesh, self.splits, owned=owned)

    def full_state(self) -> dict[str, torch.Tensor]:
        """Every parameter and persistent buffer whole, as CPU tensors, on rank 0 only.

        Collective: every rank calls it; ranks above 0 get an empty dict.
        """
        state: dict[str, torch.Tensor] = {}
        for name, tensor in self._named_tensors():
            with self._whole(tensor):
                whole = self._joined(name, tensor.detach())
                if self.mesh.is_main:
                    state[name] = whole.to("cpu", copy=True)
        return state

    def load_full_state(self, state: dict[str, torch.Tensor]) -> None:
        """Set parameters and persistent buffers on every rank to rank 0's `state`.

        Collective: every rank calls it; what ranks above 0 pass is ignored.

        Raises:
            TrainingError: names or shapes are not those of the model.
        """
        named = self._named_tensors()
        shapes = {name: self._whole_shape(name, tensor) for name, tensor in named}
        found = {name: tuple(tensor.shape) for name, tensor in state.items()}
        found = collectives.broadcast_object(found, self.mesh)
        if found != shapes:
            differing = sorted(set(found.items()) ^ set(shapes.items()))
            raise TrainingError(
                "a saved state is not one of this model",
                where=", ".join(dict.fromkeys(name for name, _ in differing)),
                found={name: shape for name, shape in differing if found.get(name) == shape},
                expected={name: shape for name, shape in differing if shapes.get(name) == shape},
                fix="use the configuration that the state was saved under",
            )
        for name, tensor in named:
            value = self._own_value(name, tensor, state)
            with torch.no_grad(), self._whole(tensor, writes=True):
                if value is not None:
                    tensor.copy_(value)
                self._broadcast(tensor)
        self._refresh()

    def rewrite(self, change: Callable[[torch.Tensor], None]) -> None:
        """Change parameters in place, each while this rank has all that it ever holds of it.

        Collective: every rank calls it, and makes the same of the same parameter.
        """
        for _, tensor in self._named_tensors():
            with torch.no_grad(), self._whole(tensor, writes=True):
                change(tensor)
        self._refresh()

    def _refresh(self) -> None:
        """Tell the optimizer's master copy, where there is one, of changed parameters."""
        refresh = getattr(self._engine.optimizer, "refresh_fp32_params", None)
        if refresh is not None:
            refresh()

    def _named_tensors(self) -> list[tuple[str, torch.Tensor]]:
        # A tied parameter appears under each of its names, as in a plain state dict.
        return list(self.module.state_dict(keep_vars=True).items())

    def _whole(self, tensor: torch.Tensor, writes: bool = False) -> Any:
        sharded = [tensor] if hasattr(tensor, "ds_id") else []
        return deepspeed.zero.GatheredParameters(
            sharded, modifier_rank=0 if writes else None, enabled=bool(sharded)
        )

    def _whole_shape(self, name: str, tensor: torch.Tensor) -> tuple[int, ...]:
        shape = tuple(getattr(tensor, "ds_shape", tensor.shape))
        return self.splits[name].whole_shape(shape) if name in self.splits else shape

    def _joined(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """A tensor whole, of which each rank of the node axis may hold a part."""
        if name not in self.splits:
            return tensor
        parts = collectives.axes(self.mesh).node.all_gather(tensor.contiguous())
        return torch.cat(list(parts), self.splits[name].dim)

    def _own_value(
        self, name: str, tensor: torch.Tensor, state: dict[str, torch.Tensor]
    ) -> torch.Tensor | None:
        """What rank 0's `state` holds for this rank; None: rank 0 hands on what it has written."""
        if self.mesh.node_parallel == 1:
            return state[name] if self.mesh.is_main else None
        whole = tensor.new_empty(self._whole_shape(name, tensor))
        if self.mesh.is_main:
            whole.copy_(state[name])
        torch.distributed.broadcast(whole, src=0)
        split = self.splits.get(name)
        return whole if split is None else split.part(whole, self.mesh.node_rank)

    def _broadcast(self, tensor: torch.Tensor) -> None:
        alone = self.mesh.world_size == 1 or self.mesh.node_parallel > 1
        if not alone and not hasattr(tensor, "ds_id"):
            torch.distributed.broadcast(tensor.data, src=0)


class Shards:
    """Leaves of parameters what ZeRO 3 gives this rank, a module at a time, before an `Engine`.

    So a model larger than one process can be made: fill a module, call this, fill the next one.

    Args:
        mesh, reduce_bucket, offload: as for the engine.
    """

    def __init__(self, mesh: Mesh, *, reduce_bucket: int = MOST_BUCKET, offload: bool = False):
        collectives.start(mesh)
        self._config = deepspeed_config(3, reduce_bucket, offload=offload)
        self._mpu = ModelParallelUnit(mesh) if mesh.node_parallel > 1 else None
        self._first: Any = None

    def __call__(self, module: nn.Module) -> None:
        """Shard a module's parameters; a collective of the data axis, whose values are equal."""
        whole = [parameter for parameter in module.parameters() if not hasattr(parameter, "ds_id")]
        if self._first is not None:
            self._first.convert_to_zero_parameters(param_list=whole)
        elif whole:
            # In the words in which DeepSpeed's own optimizer asks for it.
            deepspeed.zero.Init(
                module=module,
                data_parallel_group=self._mpu and self._mpu.get_data_parallel_group(),
                dtype=torch.float32,
                config_dict_or_path=self._config,
                mpu=self._mpu,
            )
            self._first = whole[0]
            collectives.bound_waits()


class ModelParallelUnit:
    """The mesh in the words in which DeepSpeed asks for it: its "model" axis is our node axis."""

    def __init__(self, mesh: Mesh) -> None:
        self._node, self._data = collectives.axes(mesh)

    def get_model_parallel_rank(self) -> int:
        """Place on the node axis."""
        return self._node.rank

    def get_model_parallel_world_size(self) -> int:
        """Ranks of the node axis."""
        return self._node.size

    def get_model_parallel_group(self) -> Any:
        """Ranks of the node axis, as a group."""
        return self._node.group

    get_tensor_model_parallel_rank = get_model_parallel_rank
    get_tensor_model_parallel_world_size = get_model_parallel_world_size
    get_tensor_model_parallel_group = get_model_parallel_group

    def get_data_parallel_rank(self) -> int:
        """Place on the data axis."""
        return self._data.rank

    def get_data_parallel_world_size(self) -> int:
        """Ranks of the data axis, over which ZeRO shards."""
        return self._data.size

    def get_data_parallel_group(self) -> Any:
        """Ranks of the data axis, as a group."""
        return self._data.group

    def get_data_parallel_group_ranks(self) -> list[int]:
        """Their numbers in the world."""
        return list(self._data.ranks)


def deepspeed_config(
    zero_stage: int, reduce_bucket: int, *, offload: bool = False
) -> dict[str, Any]:
    """DeepSpeed's JSON for a float32 engine whose caller scales losses and owns the boundary."""
    place = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
    offloaded = {"offload_optimizer": place} if offload and zero_stage > 0 else {}
    if offload and zero_stage == 3:
        offloaded["offload_param"] = place
    return {
        # Nominal: `backward` divides by the true global count, `step` ends the global batch.
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "managed_gradient_accumulation": False,
        # Absent would mean 1.0, and clipping would rescale the flows of expectation maximisation.
        "gradient_clipping": 0.0,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 1_000_000_000,
        "wall_clock_breakdown": False,
        "zero_optimization": {
            "stage": zero_stage,
            "reduce_bucket_size": reduce_bucket,
            "allgather_bucket_size": reduce_bucket,
            "overlap_comm": False,
            # The defaults of the following keep a whole circuit of 1e9 parameters on every rank,
            # and copy all flows of a rank before the optimizer steps.
            "sub_group_size": reduce_bucket,
            "stage3_prefetch_bucket_size": reduce_bucket,
            "stage3_max_live_parameters": reduce_bucket,
            "stage3_max_reuse_distance": reduce_bucket,
            "stage3_param_persistence_threshold": min(10_000, reduce_bucket),
            **offloaded,
        },
    }
