"""The light networks: functions of a few latents with shared insides and heads of their own."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from distpc.circuits.integral.layout import Layout
from distpc.circuits.integral.leaves import leaf_writer
from distpc.circuits.integral.settings import IntegralSettings

Slots = dict[tuple[str, int, int], int]
"""Of each function (group, region, alternative) its number in its group."""


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
        has_bias: whether heads have one.
        width: H of the trunk.
        num_layers: of the trunk.
        num_frequencies, frequency_scale: see `FourierFeatures`.
        generator: of the initial parameters.

    Attributes:
        weight: (S, O, H) of the heads.
        bias: (S, O); zeros that stay where heads have none.
    """

    bias: Tensor

    def __init__(
        self,
        num_axes: int,
        num_functions: int,
        num_outputs: int,
        has_bias: bool,
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
        bias = torch.zeros(num_functions, num_outputs)
        if has_bias:
            self.bias = nn.Parameter(bias)
        else:
            self.register_buffer("bias", bias, persistent=False)

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


def slots_of(layout: Layout, settings: IntegralSettings) -> Slots:
    """Which functions are one: sums that share all of it have one for each alternative."""
    slots: Slots = {}
    for group, functions in layout.functions.items():
        is_shared = group.startswith("sum") and settings.sum_sharing == "full"
        for number, (region, alternative) in enumerate(functions):
            slots[group, region, alternative] = alternative if is_shared else number
    return slots


def build_networks(layout: Layout, settings: IntegralSettings, seed: int) -> dict[str, nn.Module]:
    """The networks of a layout's functions, by group.

    Raises:
        StructureError: inputs that no network writes.
    """
    generator = torch.Generator().manual_seed(seed)
    inputs = {use.group: use for use in layout.inputs}
    axes = {grid.group: len(grid.sizes) for grid, _ in layout.sums}
    # Where there is one alternative a bias cancels: it would only follow the noise of rounding.
    biased = {g.group for g, uses in layout.sums if not all(use.is_whole for use in uses)}
    counts: dict[str, int] = {}
    for (group, _, _), slot in slots_of(layout, settings).items():
        counts[group] = max(counts.get(group, 0), slot + 1)
    networks: dict[str, nn.Module] = {}
    for group, count in counts.items():
        use = inputs.get(group)
        networks[group] = FunctionGroup(
            axes[group] if use is None else int(use.num_units > 1),
            count,
            1 if use is None else leaf_writer(use.kind).num_outputs(use.size),
            use is not None or group in biased,
            width=settings.width,
            num_layers=settings.num_layers if use is None else 1,
            num_frequencies=settings.num_frequencies,
            frequency_scale=settings.frequency_scale,
            generator=generator,
        )
    return networks
