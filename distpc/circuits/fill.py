"""Gives the parameters of a circuit their values, a bank at a time, and to each rank only its own.

A circuit made with `device="meta"` takes no memory, whatever its size. `share_units_` cuts it to a
rank's units as it cuts any other; then this rank's values are asked of a source by name, so that
nothing whole ever exists: random ones (`random_start`), those of a model folder (`io.ModelFile`) or
of a checkpoint. What a source gives does not depend on the layout of ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor, nn

from distpc.parallel.places import Split

if TYPE_CHECKING:
    from distpc.circuits.circuit import Circuit


class Source(Protocol):
    """Where values come from."""

    def part(self, name: str, split: Split | None, number: int) -> Tensor | None:
        """One part of a parameter or buffer, in memory of its own.

        Args:
            name: in the circuit's state dict.
            split: how ranks share it; None: the whole tensor.
            number: of the part.

        Returns:
            the part; None where the source has no say in that tensor.
        """


@torch.no_grad()
def fill_(
    circuit: Circuit,
    source: Source,
    *,
    splits: Mapping[str, Split] | None = None,
    number: int = 0,
    device: torch.device | str = "cpu",
    then: Callable[[nn.Module], None] = lambda bank: None,
) -> None:
    """Set all parameters, and those buffers that the source knows.

    Args:
        circuit: whole, or cut to part `number`.
        source: of the values.
        splits: of the tensors that are cut, by name.
        number: of this rank's part.
        device: where the values are put.
        then: called with each bank when it is full, for instance to shard it before the next one.
    """
    for bank_name, bank in circuit.banks.items():
        values = {}
        for tensor in bank.state_dict():
            name = f"banks.{bank_name}.{tensor}"
            value = source.part(name, (splits or {}).get(name), number)
            if value is not None:
                values[tensor] = value.to(device)
        bank.load_state_dict(values, strict=False, assign=True)
        then(bank)
