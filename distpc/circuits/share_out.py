"""Applies a table of `sharding` to a circuit that was written, and made, for one device."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import nn

from distpc.circuits.circuit import Circuit
from distpc.circuits.inputs import TableBank
from distpc.circuits.sharding import NodeTable, node_table
from distpc.circuits.sums import SumBank
from distpc.circuits.unit_exchange import NodeExchange
from distpc.parallel.axis import Axis
from distpc.parallel.places import Split

_OF_UNITS = ("statistics", "mask")
"""Parameters and buffers of a bank that have a row a unit."""


@torch.no_grad()
def share_units_(circuit: Circuit, axis: Axis) -> NodeTable:
    """Keep this rank's units of a circuit, and let it exchange messages with the others.

    Likelihoods and flows stay what they were; every pass becomes a collective of the axis, whose
    ranks must give it the same samples. Training works on such a circuit; queries (samples,
    conditionals, uses) need a whole one.

    Args:
        circuit: whole, and the same on every rank; with smoothing and kernels as they are.
        axis: the ranks that share the units.

    Returns:
        what lives where.
    """
    table = node_table(circuit.schedule, axis.size)
    for line, bank in zip(table.banks, circuit.bank_list, strict=True):
        if line.split is None:
            continue
        bank.statistics = nn.Parameter(line.split.part(bank.statistics, axis.rank).clone())
        if isinstance(bank, SumBank):
            bank.blocks = line.blocks
            if bank.mask is not None:
                bank.mask = line.split.part(bank.mask, axis.rank).clone()
        if isinstance(bank, TableBank):
            bank.num_units = len(line.units(axis.rank))
    for step, (units, is_split) in enumerate(zip(circuit.units, table.is_split, strict=True)):
        if is_split:
            size = len(units) // axis.size
            circuit.units[step] = range(axis.rank * size, (axis.rank + 1) * size)
    # Log-scales differ between ranks until messages are gathered: they travel with them.
    circuit.schedule = replace(circuit.schedule, reads_once=False)
    circuit.exchange = NodeExchange(table, axis)
    return table


def splits_of(circuit: Circuit, table: NodeTable) -> dict[str, Split]:
    """The parameters and buffers of which a rank holds a part, by their names in the circuit."""
    names = circuit.state_dict().keys()
    return {
        name: line.split
        for line in table.banks
        for name in (f"banks.{line.name}.{tensor}" for tensor in _OF_UNITS)
        if line.split is not None and name in names
    }
