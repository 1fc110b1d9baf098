"""Lays a circuit over the ranks, each of which makes its own share of the values and no more."""

from __future__ import annotations

from distpc.circuits.fill import Source, fill_
from distpc.circuits.integral.circuit import IntegralCircuit
from distpc.circuits.share_out import share_units_, splits_of
from distpc.parallel.collectives import axes
from distpc.parallel.engine import Shards
from distpc.parallel.memory import MOST_BUCKET
from distpc.parallel.mesh import Mesh
from distpc.parallel.places import Split
from distpc.training.integral import Model


def lay_out_(
    circuit: Model,
    source: Source | None,
    mesh: Mesh,
    *,
    zero_stage: int = 0,
    reduce_bucket: int = MOST_BUCKET,
    offload: bool = False,
) -> dict[str, Split]:
    """Cut a circuit to this rank's units and give it values; a collective of all ranks.

    Under ZeRO 3 a bank is sharded before the next one is filled: a rank never holds more than its
    share and one bank.

    Args:
        circuit: whole, without values. Networks are whole on every rank, which cut what they write.
        source: of the values; None: it has them.
        mesh: this process among the ranks.
        zero_stage, reduce_bucket, offload: of the engine that will train it.

    Returns:
        which tensors ranks share, for the engine.
    """
    splits: dict[str, Split] = {}
    if isinstance(circuit, IntegralCircuit):
        if mesh.node_parallel > 1:
            circuit.share_units_(axes(mesh).node)
        return splits
    if mesh.node_parallel > 1:
        splits = splits_of(circuit, share_units_(circuit, axes(mesh).node))
    if source is None:
        return splits
    if zero_stage < 3:
        fill_(circuit, source, splits=splits, number=mesh.node_rank)
        return splits
    shards = Shards(mesh, reduce_bucket=reduce_bucket, offload=offload)
    fill_(circuit, source, splits=splits, number=mesh.node_rank, device=mesh.device, then=shards)
    return splits
