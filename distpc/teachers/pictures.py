"""Pictures of what a masked autoencoder makes of hidden patches.

Shapes: B images, Z patches, P values in a patch, V variables.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from distpc.data.color import ycocg_lossy_inverse, ycocg_r_inverse
from distpc.data.spec import DatasetSpec
from distpc.teachers.mae import MaskedAutoencoder

_SMALLEST_SIDE = 48
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
    rows = [_to_rgb(_flat(teacher, values), teacher.spec)]
    mask = np.zeros_like(hidden)
    mask[:, teacher.grid.variables().ravel()] = hidden
    rows.append(np.where(_pixels(mask, teacher.spec), 128, rows[0]))
    rows.append(_to_rgb(_flat(teacher, rebuilt), teacher.spec))
    return _tile(np.stack(rows).astype(np.uint8))


def _flat(teacher: MaskedAutoencoder, values: Tensor) -> np.ndarray:
    """(B, Z, P) in [0, 1] -> (B, V) integers."""
    flat = torch.empty(len(values), teacher.spec.num_variables, device=values.device)
    flat[:, teacher.patch_variables] = values
    return (flat * teacher.largest_values).round().long().cpu().numpy()


def _pixels(mask: np.ndarray, spec: DatasetSpec) -> np.ndarray:
    """(B, V) bool -> (B, height, width, 1): pixels any of whose channels is set."""
    assert spec.image_shape is not None
    return np.any(mask.reshape(-1, *spec.image_shape), axis=-1, keepdims=True)


def _to_rgb(x: np.ndarray, spec: DatasetSpec) -> np.ndarray:
    """(B, V) integers -> (B, height, width, 3) in 0 .. 255."""
    assert spec.image_shape is not None
    images = x.reshape(-1, *spec.image_shape)
    if spec.color == "ycocg_r":
        images = ycocg_r_inverse(images)
    elif spec.color == "ycocg_lossy":
        images = ycocg_lossy_inverse(images)
    else:
        largest = np.array([(count or 2) - 1 for count in spec.num_categories])
        images = images * 255 // largest.clip(1).reshape(spec.image_shape)
    return np.broadcast_to(images.clip(0, 255), (*images.shape[:3], 3))


def _tile(images: np.ndarray) -> np.ndarray:
    """(rows, columns, height, width, 3) -> one picture with white gaps, small images enlarged."""
    scale = -(-_SMALLEST_SIDE // min(images.shape[2:4]))
    images = images.repeat(scale, axis=2).repeat(scale, axis=3)
    margin = ((0, 0), (0, 0), (0, _GAP), (0, _GAP), (0, 0))
    images = np.pad(images, margin, constant_values=255)
    rows, columns, height, width, _ = images.shape
    tiled = images.transpose(0, 2, 1, 3, 4).reshape(rows * height, columns * width, 3)
    return tiled[:-_GAP, :-_GAP]
