"""A folder or tar archive of image files, cropped and resized where asked."""

from __future__ import annotations

import struct
import warnings
import zlib
from pathlib import Path
from typing import Any

import numpy as np

from distpc.config.sources import ImageFolderSource
from distpc.data.sources.base import BadSampleError, Source
from distpc.data.sources.image_files import ImageFile, ImageFiles, identity_of
from distpc.data.spec import DatasetSpec
from distpc.errors import DataError

FORMATS = ("PNG", "JPEG", "WEBP", "BMP")
"""The decoders that may see these files, whatever a file claims to be."""

MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr")
"""Pillow's modes with at most 8 bits a channel; others would be clipped, not converted."""


class ImageFolder(Source):
    """Images in order of name, each `crops_per_image` times, and the published test images.

    Args:
        config: paths, colour mode, crops and resize.
        scratch: folder on whose disk compressed archives are unpacked while they are open.
    """

    group_name = "images"

    def __init__(self, config: ImageFolderSource, scratch: Path) -> None:
        self._config = config
        self._sets = [ImageFiles(config.path, "path", scratch)]
        if config.test_path is not None:
            self._sets.append(ImageFiles(config.test_path, "test_path", scratch))
            self.num_published_test = len(self._sets[1].files)
        num_own = len(self._sets[0].files) * config.crops_per_image
        self.num_samples = num_own + self.num_published_test
        # The crops of an image overlap: one split has all of them.
        self.groups = np.arange(num_own) // config.crops_per_image
        shape = self._first_shape()
        self.spec = DatasetSpec(
            name=self._sets[0].root.name.split(".")[0],
            kind="image",
            num_variables=int(np.prod(shape)),
            num_categories=(256,) * int(np.prod(shape)),
            image_shape=shape,
        )

    def read(self, position: int) -> np.ndarray:
        """(V,) uint8."""
        num_own = self.num_samples - self.num_published_test
        if position < num_own:
            number, crop = divmod(position, self._config.crops_per_image)
            files = self._sets[0]
        else:
            number, crop, files = position - num_own, 0, self._sets[1]
        file = files.files[number]
        pixels = self._decode(files, file, crop)
        if pixels.shape != self.spec.image_shape:
            raise DataError(
                "images differ in size",
                where=f"{files.root}, {file.name}",
                found=f"{pixels.shape[0]} x {pixels.shape[1]} pixels",
                expected="{} x {} as the first image".format(*self.spec.image_shape or ()),
                fix="set data.source.resize_pixels, or crop_size_pixels where all are large enough",
            )
        return pixels.reshape(-1)

    def identity(self) -> dict[str, Any]:
        """See `image_identity`."""
        return image_identity(self._config)

    def facts(self) -> dict[str, Any]:
        """How many files are no images by their name."""
        return {"ignored_files": sum(files.num_ignored for files in self._sets)}

    def close(self) -> None:
        """Close the archives."""
        for files in self._sets:
            files.close()

    def _first_shape(self) -> tuple[int, int, int]:
        """(height, width, channels) of the first image that can be decoded."""
        reasons = []
        files = self._sets[0]
        for file in files.files[:100]:
            try:
                height, width, channels = self._decode(files, file, 0).shape
            except BadSampleError as error:
                reasons.append(f"{error.name}: {error.reason}")
                continue
            return height, width, channels
        raise DataError(
            "none of the first images can be decoded",
            where=files.root,
            found="; ".join(reasons[:3]),
            expected="PNG, JPEG, WebP or BMP images",
        )

    def _decode(self, files: ImageFiles, file: ImageFile, number: int) -> np.ndarray:
        """(height, width, channels) uint8 after mode, crop `number` and resize.

        Raises:
            BadSampleError: no image, cut, or of more pixels than Pillow thinks safe.
        """
        from PIL import Image

        try:
            with warnings.catch_warnings(), files.open(file) as handle:
                # Pillow only warns at its limit of pixels and refuses at twice that.
                warnings.simplefilter("error", Image.DecompressionBombWarning)
                with Image.open(handle, formats=FORMATS) as image:
                    return self._prepare(image, f"{files.root}, {file.name}", file.name, number)
        except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
            raise BadSampleError(file.name, f"too many pixels to be safe: {error}") from error
        except (OSError, SyntaxError, ValueError, EOFError, zlib.error, struct.error) as error:
            raise BadSampleError(file.name, str(error) or type(error).__name__) from error

    def _prepare(self, image: Any, where: str, name: str, number: int) -> np.ndarray:
        from PIL import Image

        crop, side = self._config.crop_size_pixels, self._config.resize_pixels
        if crop is not None and min(image.size) < crop:
            raise DataError(
                "an image is smaller than the crop",
                where=where,
                found="{} x {} pixels".format(*image.size[::-1]),
                expected=f"at least {crop} x {crop}",
                fix="set a smaller data.source.crop_size_pixels, or resize_pixels instead",
            )
        if image.mode not in MODES:
            raise BadSampleError(name, f"pixels of mode {image.mode}, not of 8 bits")
        picture = image
        if image.has_transparency_data:
            # What lies under transparent pixels is arbitrary: show them on white.
            picture = image.convert("RGBA")
            picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
        picture = picture.convert("L" if self._config.mode == "grey" else "RGB")
        if crop is not None:
            left, top = self._corner(picture.width - crop, picture.height - crop, name, number)
            picture = picture.crop((left, top, left + crop, top + crop))
        if side is not None and picture.size != (side, side):
            picture = picture.resize((side, side), Image.Resampling.BOX)
        pixels = np.asarray(picture)
        return pixels.reshape(*pixels.shape[:2], -1)

    def _corner(self, spare_x: int, spare_y: int, name: str, number: int) -> tuple[int, int]:
        """Left and top of a crop, of which `spare` + 1 positions are possible."""
        if self._config.crop_at == "centre":
            return spare_x // 2, spare_y // 2
        # From the name, so that a crop depends on nothing but its image.
        generator = np.random.default_rng([zlib.crc32(name.encode(errors="replace")), number])
        step = self._config.crop_step_pixels
        left, top = generator.integers([spare_x // step + 1, spare_y // step + 1])
        return int(left) * step, int(top) * step


def image_identity(config: ImageFolderSource) -> dict[str, Any]:
    """Of the images, and of the test images if there are any; see `identity_of`.

    Raises:
        DataError: nothing there.
    """
    train = identity_of(config.path, "path")
    if config.test_path is None:
        return train
    return {"train": train, "test": identity_of(config.test_path, "test_path")}
