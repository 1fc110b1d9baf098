"""Networks of autoencoders with a likelihood: convolutions, and an independent patch decoder.

The decoder sees the code of one patch only, p(x | code) = prod over patches, as a circuit's leaves
do; a value is a mixture of discretised logistics (Salimans et al. 2017, without their conditioning
of channels). Shapes: B batch, Z patches, P values in a patch, W width, D code width, M mixtures.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, logsigmoid

_LEAST_LOG_SCALE = -6.0


class Residual(nn.Module):
    """x + 1x1(gelu(3x3(gelu(norm x)))): it sees one patch further on every side."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.spread = nn.Conv2d(width, width, 3, padding=1)
        self.mix = nn.Conv2d(width, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        """x (B, W, rows, columns) -> the same shape."""
        # Normalised place by place: a norm over the map would see all of the image.
        normal = self.norm(x.movedim(1, -1)).movedim(-1, 1)
        mixed: Tensor = self.mix(gelu(self.spread(gelu(normal))))
        return x + mixed


class PatchEncoder(nn.Module):
    """Values of patches -> a map over the patch grid.

    Args:
        num_values: P.
        width: W of the map.
        num_blocks: residual blocks.
    """

    def __init__(self, num_values: int, width: int, num_blocks: int) -> None:
        super().__init__()
        self.embed = nn.Linear(num_values, width)
        self.blocks = nn.Sequential(*(Residual(width) for _ in range(num_blocks)))

    def forward(self, values: Tensor, rows: int, columns: int) -> Tensor:
        """values (B, Z, P) in [0, 1] -> (B, W, rows, columns)."""
        tokens = self.embed(2 * values - 1)
        maps: Tensor = self.blocks(tokens.transpose(1, 2).unflatten(2, (rows, columns)))
        return maps


class PatchDecoder(nn.Module):
    """Code of a patch -> mixtures of discretised logistics of its values.

    Args:
        code_width: D.
        width: W of the hidden layers.
        num_values: P.
        num_mixtures: M.
    """

    def __init__(self, code_width: int, width: int, num_values: int, num_mixtures: int) -> None:
        super().__init__()
        self.num_values, self.num_mixtures = num_values, num_mixtures
        self.net = nn.Sequential(
            nn.Linear(code_width, 2 * width),
            nn.GELU(),
            nn.Linear(2 * width, 2 * width),
            nn.GELU(),
            last := nn.Linear(2 * width, num_values * num_mixtures * 3),
        )
        # Means that are alike would stay alike.
        bias = torch.zeros(num_values, num_mixtures, 3)
        bias[:, :, 1] = torch.linspace(-0.7, 0.7, num_mixtures) if num_mixtures > 1 else 0.0
        bias[:, :, 2] = -1.5
        last.bias.data.copy_(bias.flatten())

    def mixtures(self, codes: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """codes (..., D) -> logits, means, log scales, each (..., P, M); values are in [-1, 1]."""
        parts = self.net(codes).unflatten(-1, (self.num_values, self.num_mixtures, 3))
        logits, means, log_scales = parts.unbind(-1)
        return logits, means, log_scales.clamp(min=_LEAST_LOG_SCALE)

    def nats(self, codes: Tensor, values: Tensor, largest: Tensor) -> Tensor:
        """-log p(values | codes): codes (..., D), values (..., P) in [0, 1], largest (..., P)
        integers that 1 stands for -> (..., P)."""
        return -logistic_mixture_log_prob(values, largest, *self.mixtures(codes))

    def means(self, codes: Tensor) -> Tensor:
        """codes (..., D) -> (..., P) means of the mixtures, in [0, 1]."""
        logits, means, _ = self.mixtures(codes)
        return ((logits.softmax(-1) * means).sum(-1) + 1) / 2


def logistic_mixture_log_prob(
    values: Tensor, largest: Tensor, logits: Tensor, means: Tensor, log_scales: Tensor
) -> Tensor:
    """Log probability of discretised values under mixtures of logistics; it sums to 1 over values.

    With a and b the standardised upper and lower edge of a value's bin, log(s(a) - s(b)) =
    log s(a) + log s(-b) + log(1 - exp(b - a)) holds exactly; the outer bins reach to infinity.

    Args:
        values: (..., P) in [0, 1], multiples of 1 / largest.
        largest: (..., P) number of a variable's largest value.
        logits, means, log_scales: (..., P, M), in the scale of values stretched to [-1, 1].

    Returns:
        (..., P) nats.
    """
    places, largest = (2 * values - 1)[..., None], largest[..., None]
    half, inverse = 1 / largest, torch.exp(-log_scales)
    upper = (places + half - means) * inverse
    lower = (places - half - means) * inverse
    inside = torch.log(-torch.expm1(-2 * half * inverse))
    is_first, is_last = values[..., None] <= 0.5 * half, values[..., None] >= 1 - 0.5 * half
    zero = torch.zeros_like(upper)
    log_prob = torch.where(is_last, zero, logsigmoid(upper))
    log_prob = log_prob + torch.where(is_first, zero, logsigmoid(-lower))
    log_prob = log_prob + torch.where(is_first | is_last, zero, inside)
    return torch.logsumexp(logits.log_softmax(-1) + log_prob, dim=-1)


def bits(nats: Tensor) -> Tensor:
    """Nats in bits."""
    return nats / math.log(2)
