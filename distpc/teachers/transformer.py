"""Pre-norm transformer blocks and fixed positions on a grid, for teachers that see images.

Shapes: N sequences, L tokens, W width.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, scaled_dot_product_attention


class Block(nn.Module):
    """Self-attention and a two-layer perceptron, each after a layer norm and with a residual.

    Args:
        width: W, a multiple of `num_heads`.
        num_heads: attention heads.
        expansion: hidden width of the perceptron in units of W.
        causal: whether a token attends to itself and those before it only (then all are present).
    """

    def __init__(
        self, width: int, num_heads: int, expansion: int = 2, causal: bool = False
    ) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.causal = causal
        self.attention_norm = nn.LayerNorm(width)
        self.query_key_value = nn.Linear(width, 3 * width)
        self.attention_out = nn.Linear(width, width)
        self.perceptron_norm = nn.LayerNorm(width)
        self.expand = nn.Linear(width, expansion * width)
        self.contract = nn.Linear(expansion * width, width)

    def forward(
        self, tokens: Tensor, rotation: Tensor | None = None, present: Tensor | None = None
    ) -> Tensor:
        """tokens (N, L, W) -> (N, L, W).

        `rotation` (N, L, W / num_heads, 2): rows of `grid_rotations`; without it the
        block knows no positions. `present` (N, L) bool: tokens that may be attended to.
        """
        tokens = tokens + self._attend(self.attention_norm(tokens), rotation, present)
        hidden = gelu(self.expand(self.perceptron_norm(tokens)))
        return tokens + self.contract(hidden)

    def _attend(self, tokens: Tensor, rotation: Tensor | None, present: Tensor | None) -> Tensor:
        projected = self.query_key_value(tokens)
        if tokens.shape[1] == 1:
            # A token alone attends to itself: its own value. Encoding single patches lives on it.
            return self.attention_out(projected.chunk(3, dim=-1)[2])
        heads = projected.unflatten(-1, (3, self.num_heads, -1))
        query, key, value = heads.permute(2, 0, 3, 1, 4)
        if rotation is not None:
            query, key = _rotated(query, rotation), _rotated(key, rotation)
        mask = None if present is None else present[:, None, None, :]
        mixed = scaled_dot_product_attention(
            query, key, value, attn_mask=mask, is_causal=self.causal
        )
        return self.attention_out(mixed.transpose(1, 2).flatten(2))


def grid_positions(rows: int, columns: int, width: int) -> Tensor:
    """(rows * columns, width) sinusoidal positions: a quarter of the width each for sine and
    cosine of row and column, at wavelengths from 2 pi to 10,000 (Vaswani et al. 2017, in 2D)."""
    quarter = width // 4
    frequencies = 10000.0 ** (-torch.arange(quarter, dtype=torch.float64) / max(1, quarter))
    row, column = torch.meshgrid(
        torch.arange(rows, dtype=torch.float64),
        torch.arange(columns, dtype=torch.float64),
        indexing="ij",
    )
    angles = [axis.flatten()[:, None] * frequencies for axis in (row, column)]
    waves = [wave for angle in angles for wave in (angle.sin(), angle.cos())]
    waves.append(torch.zeros(rows * columns, width - 4 * quarter, dtype=torch.float64))
    return torch.cat(waves, dim=1).float()


def grid_rotations(rows: int, columns: int, width: int) -> Tensor:
    """(rows * columns, width, 2) cosines and sines that turn pairs (i, i + width / 2) of a query or
    key by angles proportional to row (even i) and column (odd i), so that attention depends on
    differences of positions only (Su et al. 2021, in 2D). Widths below 4 know rows only."""
    half = width // 2
    number = torch.arange(half)
    frequencies = 100.0 ** (-(number // 2).double() / max(1, (half + 1) // 2))
    place = torch.arange(rows * columns)[:, None]
    coordinate = torch.where(number % 2 == 0, place // columns, place % columns)
    angle = coordinate * frequencies
    angle = torch.cat([angle, angle, angle.new_zeros(len(place), width - 2 * half)], dim=1)
    return torch.stack([angle.cos(), angle.sin()], dim=-1).float()


def _rotated(heads: Tensor, rotation: Tensor) -> Tensor:
    """heads (N, heads, L, width) turned by rotation (N, L, width, 2)."""
    cosine, sine = rotation[:, None].unbind(-1)
    half = heads.shape[-1] // 2
    first, second, rest = heads.split([half, half, heads.shape[-1] - 2 * half], dim=-1)
    return heads * cosine + torch.cat([-second, first, rest], dim=-1) * sine
