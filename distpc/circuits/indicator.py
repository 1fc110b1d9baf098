"""Indicator units: unit k is the point mass on category k. There is nothing to learn.

They make circuits whose latents are observed, deterministic circuits, and categoricals that are
written as a sum over point masses.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from distpc.circuits.inputs import TableBank
from distpc.circuits.look_up import scaled_rows_
from distpc.circuits.lost import new_scale


class IndicatorBank(TableBank):
    """Identity tables, which are never stored; no parameters, so no smoothing either.

    Attributes:
        statistics: empty (0, K), a buffer that is not saved.
    """

    def __init__(self, sizes: Sequence[int], num_units: int) -> None:
        super().__init__(sizes, num_units)
        self.register_buffer("statistics", torch.empty(0, num_units), persistent=False)

    def forward(
        self, index: Tensor, mask: Tensor | None, in_logs: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        units = torch.arange(self.num_units, device=index.device)
        # Every table has K rows, so that a row's category is what its tables leave.
        codes = torch.where(index == self.num_rows, -1, index % self.num_units).unsqueeze(-1)
        allowed = ((codes < 0) | (codes == units)).all(-2)
        if mask is not None:
            allowed &= mask
        if in_logs:
            return torch.where(allowed, 0.0, -torch.inf).double(), None
        # Zeros are exact here: nothing is lost.
        log_scale = torch.where(allowed.any(-1), 0.0, -torch.inf).double()
        return allowed.to(self.statistics.dtype), new_scale(log_scale, torch.zeros_like(log_scale))

    def weights(self, dtype: torch.dtype = torch.float32) -> Tensor:
        return self.weights_of(0, dtype).repeat(len(self.sizes), 1)

    def weights_of(self, table: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.eye(self.num_units, dtype=dtype, device=self.statistics.device)

    def statistics_of(self, table: int) -> Tensor:
        """Empty, (K, 0)."""
        return self.statistics.T

    def totals(self, values: Tensor) -> Tensor:
        return values

    def pseudo_samples(self, pseudocount: float) -> Tensor:
        return self.statistics

    def start_near_(self, table: int, shares: Tensor) -> None:
        pass

    def rescale_(self, uses: Sequence[Tensor]) -> None:
        pass

    def set_smoothing(self, pseudocount: float, num_samples: int) -> None:
        pass


def weighted(logs: Tensor, mask: Tensor | None, in_logs: bool) -> tuple[Tensor, Tensor | None]:
    """The message of indicator units under soft evidence: unit k is as likely as category k.

    Args:
        logs: (E, B, K) float32 log-likelihoods.
        mask: of units that latent evidence leaves, if any.
        in_logs: the domain.
    """
    if mask is not None:
        logs = torch.where(mask, logs, -torch.inf)
    if in_logs:
        return logs.double(), None
    return scaled_rows_(logs.clone(), is_log=True, mask=mask)
