"""Samples out of whatever holds them, and how the array that held them looked.

Read so that a lossless coder can give back what there was: a file whose values the model's
categories cannot say exactly is refused.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from distpc.circuits.evidence import MISSING
from distpc.data.index import ShardIndex
from distpc.data.pictures import from_display, to_display
from distpc.data.reader import iterate_split
from distpc.data.sources.idx import read_idx_images
from distpc.data.spec import DatasetSpec
from distpc.errors import DataError, EvidenceError
from distpc.inference.evidence import check_values
from distpc.inference.model import image_shape
from distpc.inference.pictures import read_pictures
from distpc.inference.tables import read_rows

SPLITS = ("train", "valid", "test")
BATCH = 1024


def read_samples(
    data: str, spec: DatasetSpec, model_dir: Path, num: int | None = None
) -> tuple[torch.Tensor, dict[str, Any]]:
    """Samples, and the type and shape of the array of them.

    Args:
        data: a .npy or .csv, an IDX file (gzipped or not), a .png or a folder of them; or the name
            of a split of the run in whose folder the model lies.
        spec: of the model's data.
        model_dir: the model's folder.
        num: samples, the first ones; None: all.

    Returns:
        (N, V) int64 with MISSING, or float32 where a variable is real; {"dtype", "shape"} of the
        array as numpy spells them.

    Raises:
        EvidenceError: no such file or split, or values that do not fit the model or could not be
            given back exactly.
    """
    if num is not None and num < 1:
        raise EvidenceError("too few samples are asked for", found=num, expected="at least 1")
    path = Path(data)
    if not path.exists():
        if data in SPLITS:
            return _of_split(data, spec, model_dir, num)
        raise EvidenceError(
            "there are no such data",
            where=data,
            expected=f"a file, a folder of .png files, or a split: {', '.join(SPLITS)}",
        )
    if path.suffix == ".npy":
        return _of_array(path, spec, num)
    if path.suffix == ".csv":
        return _plain(check_values(read_rows(path, spec), spec, path)[:num], spec)
    if path.is_dir() or path.suffix == ".png":
        x = read_pictures(path, spec)[:num]
        return _plain(check_values(x.astype(np.float64), spec, path), spec)
    return _of_idx(path, spec, num)


def restore(x: np.ndarray, source: dict[str, Any]) -> np.ndarray:
    """The array that (N, V) values came from: its type, its shape, its mark of missing values.

    Raises:
        DataError: there is no such type, or the shape is one of other values.
    """
    try:
        dtype = np.dtype(source["dtype"])
        values = x.astype(dtype)
        if np.issubdtype(dtype, np.floating):
            values[x == MISSING] = np.nan
        return values.reshape(source["shape"])
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(
            "values do not fit the array that they are said to come from",
            found=f"{source}: {error}",
            expected=f"a type of numbers, and a shape of {x.size} values",
        ) from error


def _of_array(
    path: Path, spec: DatasetSpec, num: int | None
) -> tuple[torch.Tensor, dict[str, Any]]:
    x = check_values(read_rows(path, spec), spec, path)[:num]
    array = np.load(path, allow_pickle=False)[:num]
    source = {"dtype": array.dtype.str, "shape": list(array.shape)}
    if not x.is_floating_point() and restore(x.numpy(), source).tobytes() != array.tobytes():
        raise EvidenceError(
            "some values could not be given back bit for bit",
            where=path,
            found="values that equal a category and are written otherwise: -0.0, another NaN",
            expected="categories as whole numbers, NaN or -1 where missing",
        )
    return x, source


def _of_idx(path: Path, spec: DatasetSpec, num: int | None) -> tuple[torch.Tensor, dict[str, Any]]:
    images = read_idx_images(path)[:num]
    if images.shape[1:] != image_shape(spec):
        raise EvidenceError(
            "the images have another size than the model's",
            where=path,
            found=images.shape[1:],
            expected=f"{image_shape(spec)} (height, width, channels)",
        )
    x = from_display(images, spec)
    if not np.array_equal(to_display(x, spec), images):
        raise EvidenceError(
            "the model's values cannot say these pixels exactly",
            where=path,
            found=f"a model of {spec.num_categories[0]} categories, colours '{spec.color}'",
            fix="give a .npy of values in the model's categories",
        )
    # Without the axis of channels where the file has none.
    shape = images.shape if images.shape[-1] > 1 else images.shape[:-1]
    return torch.from_numpy(x), {"dtype": "|u1", "shape": list(shape)}


def _of_split(
    split: str, spec: DatasetSpec, model_dir: Path, num: int | None
) -> tuple[torch.Tensor, dict[str, Any]]:
    for run in (*model_dir.absolute().parents[:3], *model_dir.resolve().parents[:3]):
        if (run / "shards").is_dir() and (run / "index" / "index.json").is_file():
            break
    else:
        raise EvidenceError(
            "the model does not lie in a run folder whose samples could be taken",
            where=model_dir,
            expected="RUN/finetune/model beside RUN/shards and RUN/index",
            fix="name a file of samples",
        )
    index = ShardIndex.load(run / "index")
    wanted = index.num_samples(split) if num is None else num
    parts: list[np.ndarray] = []
    for part in iterate_split(index, index.spec, split, BATCH):
        parts.append(part[: wanted - sum(map(len, parts))])
        if sum(map(len, parts)) >= wanted:
            break
    if not parts:
        raise EvidenceError("the split has no samples", where=f"{run}, split '{split}'")
    return _plain(torch.from_numpy(np.concatenate(parts)), spec)


def _plain(x: torch.Tensor, spec: DatasetSpec) -> tuple[torch.Tensor, dict[str, Any]]:
    """An array as small as its values allow, images in their shape."""
    if x.is_floating_point():
        return x, {}
    low, high = int(x.min()), int(x.max())
    dtype = (
        np.min_scalar_type(high)
        if low >= 0
        else np.promote_types(np.min_scalar_type(high), np.int8)
    )
    shape = (len(x), *(spec.image_shape or (spec.num_variables,)))
    return x.long(), {"dtype": dtype.str, "shape": list(shape)}
