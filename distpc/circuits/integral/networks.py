"""The light networks: functions of a few latents with shared insides and heads of their own."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn


class FourierFeatures(nn.Module):
    """cos and sin of 2 pi z B with random frequencies B that stay (Tancik et al., NeurIPS 2020).

    Args:
        num_axes: d, coordinates of a point z.
        num_frequencies: F; there are 2 F features.
        scale: standard deviation of the frequencies, in cycles per unit of z.
        generator: of the frequencies.
    """

    frequencies: Tensor

    def __init__(
        self, num_axes: int, num_frequencies: int, scale: float, generator: torch.Generator
    ) -> None:
        super().__init__()
        drawn = torch.randn(num_axes, num_frequencies, generator=generator) * scale
        self.register_buffer("frequencies", drawn)

    def forward(self, points: Tensor) -> Tensor:
        """(P, d) -> (P, 2 F)."""
        angles = (2.0 * math.pi) * points @ self.frequencies
        return torch.cat([angles.cos(), angles.sin()], dim=1)


class FunctionGroup(nn.Module):
    """S functions of d latents with O outputs each.

    All of them share a trunk (Fourier features and tanh layers) and have a linear head of their
    own. Heads start equal, as in the paper's code; the data tell them apart.

    Args:
        num_axes: d; functions of no latent are constants.
        num_functions: S.
        num_outputs: O.
        width: H of the trunk.
        num_layers: of the trunk.
        num_frequencies, frequency_scale: see `FourierFeatures`.
        generator: of the initial parameters.

    Attributes:
        weight: (S, O, H) of the heads.
        bias: (S, O).
    """

    def __init__(
        self,
        num_axes: int,
        num_functions: int,
        num_outputs: int,
        *,
        width: int,
        num_layers: int,
        num_frequencies: int,
        frequency_scale: float,
        generator: torch.Generator,
    ) -> None:
        super().__init__()
        self.num_axes = num_axes
        layers: list[nn.Module] = []
        if num_axes:
            layers.append(FourierFeatures(num_axes, num_frequencies, frequency_scale, generator))
            fan_in = 2 * num_frequencies
            for _ in range(num_layers):
                layers += [_linear(fan_in, width, generator), nn.Tanh()]
                fan_in = width
        self.trunk = nn.Sequential(*layers)
        features = width if num_axes else 1
        head = _uniform((1, num_outputs, features), features, generator)
        self.weight = nn.Parameter(head.repeat(num_functions, 1, 1))
        self.bias = nn.Parameter(torch.zeros(num_functions, num_outputs))

    def features(self, points: Tensor) -> Tensor:
        """(P, d) -> (P, H)."""
        if not self.num_axes:
            return points.new_ones(len(points), 1)
        features: Tensor = self.trunk(points)
        return features


def _linear(fan_in: int, fan_out: int, generator: torch.Generator) -> nn.Linear:
    layer = nn.Linear(fan_in, fan_out)
    layer.weight.data = _uniform((fan_out, fan_in), fan_in, generator)
    layer.bias.data = _uniform((fan_out,), fan_in, generator)
    return layer


def _uniform(shape: tuple[int, ...], fan_in: int, generator: torch.Generator) -> Tensor:
    """Uniform within 1 / sqrt(fan-in) of 0."""
    return (2.0 * torch.rand(shape, generator=generator) - 1.0) / math.sqrt(fan_in)
