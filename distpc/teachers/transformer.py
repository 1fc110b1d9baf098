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
    """

    def __init__(self, width: int, num_heads: int, expansion: int = 2) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.attention_norm = nn.LayerNorm(width)
        self.query_key_value = nn.Linear(width, 3 * width)
        self.attention_out = nn.Linear(width, width)
        self.perceptron_norm = nn.LayerNorm(width)
        self.expand = nn.Linear(width, expansion * width)
        self.contract = nn.Linear(expansion * width, width)

    def forward(self, tokens: Tensor, present: Tensor | None = None) -> Tensor:
        """tokens (N, L, W) -> (N, L, W); `present` (N, L) bool: tokens that may be attended to."""
        tokens = tokens + self._attend(self.attention_norm(tokens), present)
        hidden = gelu(self.expand(self.perceptron_norm(tokens)))
        return tokens + self.contract(hidden)

    def _attend(self, tokens: Tensor, present: Tensor | None) -> Tensor:
        heads = self.query_key_value(tokens).unflatten(-1, (3, self.num_heads, -1))
        query, key, value = heads.permute(2, 0, 3, 1, 4)
        mask = None if present is None else present[:, None, None, :]
        mixed = scaled_dot_product_attention(query, key, value, attn_mask=mask)
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
