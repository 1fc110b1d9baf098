"""Completions of partly hidden images: conditional samples, the most probable values or the means,
and the exact uncertainty."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from distpc.circuits.circuit import Circuit
from distpc.data.index import ShardIndex
from distpc.data.pictures import three_channels
from distpc.data.reader import iterate_split
from distpc.data.spec import DatasetSpec
from distpc.errors import EvidenceError
from distpc.inference.evidence import check_values, is_missing
from distpc.inference.masks import observed_mask
from distpc.inference.model import image_shape, open_model
from distpc.inference.pictures import (
    heat_map,
    read_pictures,
    save_png,
    tile,
    tint_hidden,
    to_pictures,
)
from distpc.inference.tables import read_rows, write_npy

FILLS = ("samples", "mpe", "mean")
DEFAULT_IMAGES = 8
CONDITIONAL_CELLS = 2**24
"""Probabilities held at once while entropies are computed (64 MiB in float32)."""


@dataclass(frozen=True)
class Completions:
    """Images with hidden parts, and what the circuit makes of them.

    Attributes:
        x: (B, V) int64 originals, MISSING where even they have no value.
        observed: (B, V) bool, the evidence.
        values: (B, n, V) int64 completions given the evidence; observed values are copied.
        entropy_bits: (B, V) entropy of each variable given the evidence; 0 where observed.
    """

    x: torch.Tensor
    observed: torch.Tensor
    values: torch.Tensor
    entropy_bits: torch.Tensor


def complete(
    circuit: Circuit,
    x: torch.Tensor,
    observed: torch.Tensor,
    n: int,
    seed: int,
    fill: str = "samples",
) -> Completions:
    """Completions and the uncertainty of each image in `x` (B, V), given what is `observed`.

    Args:
        observed: (V,) or (B, V) bool; missing values of `x` are hidden as well.
        n: completions an image, where they are samples; else there is one.
        seed: of the samples.
        fill: "samples" given the evidence, "mpe" for the jointly most probable values and
            latents, or "mean" for every variable's mean, rounded where it has categories.

    Raises:
        EvidenceError: an unknown `fill`, or evidence of probability 0.
    """
    observed = observed.expand(x.shape) & ~is_missing(x)
    if fill == "samples":
        values = circuit.sample(n, seed=seed, x=x, observed=observed).cpu()
    elif fill == "mpe":
        values = circuit.mpe(x, observed).x.cpu().unsqueeze(1)
    elif fill == "mean":
        means = circuit.expectation(x, observed).mean.cpu().unsqueeze(1)
        is_real = torch.tensor([count is None for count in circuit.num_categories])
        values = torch.where(is_real, means, means.round())
        values = values if is_real.any() else values.long()
    else:
        raise EvidenceError(
            "an unknown completion", where="fill", found=fill, expected=" or ".join(FILLS)
        )
    return Completions(x, observed, values, entropy_bits(circuit, x, observed))


def entropy_bits(circuit: Circuit, x: torch.Tensor, observed: torch.Tensor) -> torch.Tensor:
    """(B, V) float32 entropy in bits of p(variable | observed values); 0 where observed."""
    entropy = torch.zeros(x.shape)
    variables = torch.nonzero((~observed).any(dim=0)).flatten().tolist()
    categories = max((count or 1 for count in circuit.num_categories), default=1)
    rows = max(1, CONDITIONAL_CELLS // max(1, len(variables) * categories))
    for start in range(0, len(x) if variables else 0, rows):
        part = slice(start, start + rows)
        p = circuit.conditional(x[part], observed[part], variables).cpu()
        bits = torch.special.entr(p).sum(dim=-1) / np.log(2)
        entropy[part, variables] = torch.where(observed[part][:, variables], 0.0, bits.float())
    return entropy


def completion_grid(result: Completions, spec: DatasetSpec) -> np.ndarray:
    """One (height, width, 3) picture: a row an image, of which the columns are the original, the
    original with its hidden part tinted, the completions, and the entropy of every hidden pixel
    (summed over channels; the brightest colour is the largest in the picture).
    """
    height, width, channels = image_shape(spec)
    count, per_image = result.values.shape[:2]
    shape = (count, height, width, channels)
    originals = to_pictures(result.x.numpy(), spec)
    absent = is_missing(result.x).reshape(shape).any(dim=-1).numpy()
    hidden = (~result.observed).reshape(shape).any(dim=-1).numpy()
    completions = to_pictures(result.values.numpy().reshape(count * per_image, -1), spec)
    bits = result.entropy_bits.numpy().reshape(shape).sum(axis=-1)
    columns = [
        tint_hidden(originals, absent)[:, None],
        tint_hidden(originals, hidden)[:, None],
        three_channels(completions).reshape(count, per_image, height, width, 3),
        heat_map(bits, float(bits.max()))[:, None],
    ]
    headers = [(0, "original"), (1, "masked"), (2, "completions"), (2 + per_image, "uncertainty")]
    cells = np.concatenate(columns, axis=1)
    return tile(cells.reshape(-1, height, width, 3), columns=per_image + 3, headers=headers)


def inpaint_command(
    model_dir: Path,
    images: Path | None = None,
    mask: str = "right",
    n: int | None = None,
    num_completions: int = 4,
    seed: int = 0,
    out: Path = Path("completions.png"),
    fill: str = "samples",
) -> Path:
    """Hide a part of images and complete it.

    Args:
        model_dir: the model's folder.
        images: .npy of values in the model's categories, (B, V) or (B, height, width, channels),
            -1 or NaN where missing; or a .png or a folder of them; or None for the test images of
            the run that the model belongs to.
        mask: the part that is hidden: left, right, top, bottom, centre or random.
        n: images, the first ones; None: 8, or all if there are fewer.
        num_completions: completions an image, where they are samples.
        seed: of the completions and of a random mask.
        out: where the picture goes; a name in .npy gets (B, num_completions, V) values.
        fill: what completions are: samples, mpe or mean, see `complete`.

    Raises:
        EvidenceError: images that do not fit the model, fewer than `n`, an unknown mask, fill or
            suffix.
        ModelFileError: the model cannot be read.
    """
    out = Path(out)
    if out.suffix not in (".png", ".npy"):
        raise EvidenceError(
            "the output is of an unknown kind",
            where=out,
            found=out.suffix or "no suffix",
            expected=".png or .npy",
        )
    if (n is not None and n < 1) or num_completions < 1:
        raise EvidenceError(
            "too few images or completions are asked for",
            found=f"{n} images, {num_completions} completions",
            expected="at least 1 of each",
        )
    circuit, spec = open_model(Path(model_dir))
    observed = observed_mask(mask, spec, seed)
    count = DEFAULT_IMAGES if n is None else n
    x = _test_images(Path(model_dir), count) if images is None else _read(Path(images), spec, count)
    if n is not None and len(x) < n:
        raise EvidenceError(
            "there are fewer images than are asked for",
            where=model_dir if images is None else images,
            found=f"{len(x)} images",
            expected=f"{n} (--num)",
        )
    result = complete(circuit, x, observed, num_completions, seed, fill)
    if out.suffix == ".npy":
        write_npy(out, result.values.numpy())
    else:
        save_png(out, completion_grid(result, spec))
    return out


def first_samples(index: ShardIndex, split: str, n: int) -> torch.Tensor:
    """(n, V) the first `n` samples of a split, or all if it has fewer."""
    first = next(iterate_split(index, index.spec, split, n), None)
    if first is None:
        raise EvidenceError("the split has no samples", where=split)
    x = torch.as_tensor(first)
    return x if x.is_floating_point() else x.long()


def _read(path: Path, spec: DatasetSpec, n: int) -> torch.Tensor:
    if path.suffix == ".npy":
        return check_values(read_rows(path, spec), spec, path)[:n]
    if not path.exists():
        raise EvidenceError("the images do not exist", where=path)
    return check_values(read_pictures(path, spec)[:n].astype(np.float64), spec, path)


def _test_images(model_dir: Path, n: int) -> torch.Tensor:
    """The first test images of the run in whose folder the model lies."""
    folders = [*model_dir.absolute().parents[:3], *model_dir.resolve().parents[:3]]
    for run in folders:
        if (run / "shards").is_dir() and (run / "index" / "index.json").is_file():
            index = ShardIndex.load(run / "index")
            return first_samples(index, "test" if index.num_samples("test") else "valid", n)
    raise EvidenceError(
        "the model does not lie in a run folder whose test images could be taken",
        where=model_dir,
        expected="RUN/finetune/model beside RUN/shards and RUN/index",
        fix="name images: a .npy of values, a .png or a folder of .png files",
    )
