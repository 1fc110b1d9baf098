"""When fine-tuning takes the fused step of `circuits.kernels` in place of the ordinary one."""

from __future__ import annotations

from distpc.circuits.integral.circuit import IntegralCircuit
from distpc.circuits.kernels.plan import why_not
from distpc.circuits.kernels.step import FastStep
from distpc.config.schema import RunConfig
from distpc.errors import ConfigError
from distpc.parallel.mesh import Mesh
from distpc.training.integral import Model
from distpc.training.rules.online_em import OnlineEM


def fused_step(config: RunConfig, mesh: Mesh, circuit: Model) -> FastStep | None:
    """The fused step for batches of `finetune.batch_size`; None: train by the ordinary one.

    Args:
        config: of the run; `finetune.fused` None asks for it on a GPU, where it can be had.
        mesh: of this rank.
        circuit: where it is trained, its smoothing set.

    Raises:
        ConfigError: `finetune.fused` is true and something stands against it.
    """
    wanted = config.finetune.fused
    if wanted is False or (wanted is None and circuit.device.type != "cuda"):
        return None
    if isinstance(circuit, IntegralCircuit):
        reason: str | None = "weights that networks write (integral.enabled)"
    else:
        reason = _why_not(config, mesh) or why_not(circuit)
        if reason is None:
            return FastStep(circuit, config.finetune.batch_size)
    if wanted:
        raise ConfigError(
            "the fused step does not cover this training",
            where="finetune.fused",
            found=reason,
            expected="one rank, online EM, a tree of dense sums over categorical leaves",
            fix="leave finetune.fused out: it is then used where it can be",
        )
    return None


def _why_not(config: RunConfig, mesh: Mesh) -> str | None:
    """What of a training it does not cover."""
    finetune, parallel = config.finetune, config.parallel
    if mesh.world_size > 1:
        return f"{mesh.world_size} ranks"
    if finetune.rule != OnlineEM.name:
        return f"the rule {finetune.rule}"
    if finetune.micro_batch_size < finetune.batch_size:
        return (
            f"batches of {finetune.batch_size} in pieces of {finetune.micro_batch_size} "
            "(micro_batch_size)"
        )
    if finetune.reseed_every_epochs:
        return "dead states that are started again (reseed_every_epochs)"
    for name in ("zero_stage", "offload", "recompute_messages"):
        if getattr(parallel, name):
            return f"parallel.{name}"
    return None
