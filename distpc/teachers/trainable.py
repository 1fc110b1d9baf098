"""What a teacher that is trained here adds: a loss, what is random in it, and a constant's score.

Shapes: B batch, V variables.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import Any, ClassVar, Self

import numpy as np
import torch
from torch import Tensor

from distpc.config.teachers import TeacherConfig
from distpc.data.spec import DatasetSpec
from distpc.teachers.base import Teacher


class Trainable(Teacher):
    """A teacher with a loss.

    Attributes:
        figure: name of the reported figure: `mse`, `bpd` (bits a dimension), `bpt` (bits a token).
        baseline_name: name of the figure of the best constant prediction.
        sizes: fields of the kind's section of the configuration that its constructor takes.
    """

    figure: ClassVar[str]
    baseline_name: ClassVar[str] = "constant"
    sizes: ClassVar[tuple[str, ...]]
    _settings: dict[str, Any]

    @classmethod
    def from_config(
        cls, config: TeacherConfig, spec: DatasetSpec, patch_size: int, seed: int
    ) -> Self:
        """Sizes from the kind's section; `seed` draws the initial weights."""
        section = getattr(config, cls.kind)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            sizes: dict[str, Any] = {name: getattr(section, name) for name in cls.sizes}
            return cls(spec, patch_size, **sizes)  # type: ignore[arg-type]

    @property
    def settings(self) -> dict[str, Any]:
        """Sizes of the network, and what else its section chose."""
        return dict(self._settings)

    @abstractmethod
    def draw(
        self, num_samples: int, generator: torch.Generator, section: Any, training: bool
    ) -> tuple[Tensor, ...]:
        """What is random in the loss of a global batch: tensors with a row for each sample.

        Args:
            num_samples: in the global batch; every rank draws for all and takes its share.
            generator: seeded by the step.
            section: the kind's section of the configuration.
            training: whether to train; otherwise draws are comparable from call to call.
        """

    @abstractmethod
    def forward(self, x: Tensor, *drawn: Tensor) -> Tensor:
        """x (B, V) integers, drawn: rows of `draw` -> (B, 3): each sample's loss, its figure and
        the figure's weight: what is reported is the sum of figures over the sum of weights."""

    @abstractmethod
    def statistics(self, x: Tensor, *drawn: Tensor) -> Tensor:
        """Sums over x (B, V) from which `baseline` is made: (F,) float64."""

    @abstractmethod
    def baseline(self, sums: Tensor) -> float:
        """The figure of the best constant prediction, from (F,) sums over the validation split."""

    def after_step(self, progress: float, section: Any) -> None:
        """Called on every rank after a step; `progress` rises from 0 to 1."""
        return None

    def picture(self, x: Tensor, generator: torch.Generator) -> np.ndarray | None:
        """(height, width, 3) uint8 that shows what the model makes of x (B, V), if it can."""
        return None


def histogram(x: Tensor, num_values: int) -> Tensor:
    """(num_values,) float64 counts of the values in x; what is missing is left out."""
    return torch.bincount(x[x >= 0].flatten().cpu().long(), minlength=num_values).double()


def entropy_bits(counts: Tensor) -> float:
    """Bits a value that the best constant distribution needs: counts (C,)."""
    share = counts[counts > 0] / counts.sum()
    return float(-(share * share.log2()).sum())


def masking_ratio(generator: torch.Generator, section: Any, training: bool) -> float:
    """A masking ratio between the section's limits: drawn, or the middle outside of training."""
    low, high = section.mask_ratio_min, section.mask_ratio_max
    if not training:
        return float((low + high) / 2)
    return float(low + (high - low) * float(torch.rand((), generator=generator)))
