"""Arrays in memory as samples of a circuit."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from distpc.circuits.circuit import Circuit
from distpc.data.spec import MISSING
from distpc.errors import DataError

Array = np.ndarray | Tensor


def as_samples(circuit: Circuit, data: Array, name: str) -> Tensor:
    """An array as samples of a circuit: (N, V) on the CPU, int64 with -1, or float32 with NaN,
    where missing.

    Floats stay floats, and circuits with real variables get them; -1 is missing in categorical
    columns of either kind, and a number in real ones.

    Raises:
        DataError: no rows, no values, another number of variables, or an impossible value.
    """
    x = torch.as_tensor(data).cpu()
    if x.dim() != 2 or x.shape[1] != circuit.num_variables or not len(x):
        raise DataError(
            "the array does not fit the circuit",
            where=name,
            found=f"shape {tuple(x.shape)}",
            expected=f"(samples, {circuit.num_variables})",
        )
    x = x.float() if x.is_floating_point() else x.long()
    for variable, count in enumerate(circuit.num_categories):
        values = x[:, variable]
        # NaN is a missing value and compares as within.
        if count is None:
            outside = torch.isinf(values)
        else:
            outside = (values >= count) | ((values < 0) & (values != MISSING))
        if outside.any():
            raise DataError(
                "a value is infinite or outside a variable's categories",
                where=f"{name}, row {int(outside.nonzero()[0])}, column {variable}",
                found=values[outside][0].item(),
                expected="a finite number"
                if count is None
                else f"0 .. {count - 1}, or {MISSING} where missing",
            )
    is_real = torch.tensor([count is None for count in circuit.num_categories])
    if x.is_floating_point() or is_real.any():
        x = torch.where((x == MISSING) & ~is_real, torch.nan, x.float())
    if bool((x.isnan() if x.is_floating_point() else x == MISSING).all()):
        raise DataError(
            "the array holds no value at all",
            where=name,
            found=f"{x.numel()} missing values",
            expected="at least one observed value",
        )
    return x
