"""Pictures of what a masked autoencoder makes of hidden patches.

Shapes: B images, Z patches, P values in a patch, V variables.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from distpc.data.pictures import GREY_FRAME, three_channels, to_display, to_grid
from distpc.data.spec import DatasetSpec
from distpc.teachers.mae import MaskedAutoencoder

_SIDE = 56
_GAP = 2


@torch.no_grad()
def reconstruction_grid(teacher: MaskedAutoencoder, x: Tensor, visible: Tensor) -> np.ndarray:
    """Originals, the same with hidden patches grey, and reconstructions, one row each.

    Args:
        teacher: on the device of its weights.
        x: (B, V) integers.
        visible: (B, n) indices of the patches that the teacher sees.

    Returns:
        (height, width, 3) uint8.
    """
    values = teacher.patches(x)
    visible = visible.to(values.device)
    rebuilt = teacher.reconstruct(values, visible).clamp(0, 1)
    seen = torch.zeros(values.shape[:2], dtype=torch.bool, device=values.device)
    seen.scatter_(1, visible, True)
    hidden = ~np.repeat(seen.cpu().numpy(), values.shape[2], axis=1)
    originals = _pictures(teacher, values)
    mask = np.zeros_like(hidden)
    mask[:, teacher.grid.variables().ravel()] = hidden
    masked = np.where(_pixels(mask, teacher.spec), np.uint8(GREY_FRAME), originals)
    rows = np.concatenate([originals, masked, _pictures(teacher, rebuilt)])
    return to_grid(rows, columns=len(x), gap=_GAP, min_side=_SIDE)


def _pictures(teacher: MaskedAutoencoder, values: Tensor) -> np.ndarray:
    """(B, Z, P) in [0, 1] -> (B, height, width, 3) uint8."""
    flat = torch.empty(len(values), teacher.spec.num_variables, device=values.device)
    flat[:, teacher.patch_variables] = values
    x = (flat * teacher.largest_values).round().long().cpu().numpy()
    return three_channels(to_display(x, teacher.spec))


def _pixels(mask: np.ndarray, spec: DatasetSpec) -> np.ndarray:
    """(B, V) bool -> (B, height, width, 1): pixels any of whose channels is set."""
    assert spec.image_shape is not None
    return np.any(mask.reshape(-1, *spec.image_shape), axis=-1, keepdims=True)
