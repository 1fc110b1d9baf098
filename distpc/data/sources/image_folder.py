"""A folder or tar archive of image files, optionally cropped and resized."""

from __future__ import annotations

import hashlib
import io
import os
import struct
import warnings
import zlib
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO, Any

import numpy as np

from distpc.config.sources import ImageFolderSource
from distpc.data.archive import open_tar, regular_members
from distpc.data.sources.base import BadSampleError, Source, existing
from distpc.data.spec import DatasetSpec
from distpc.errors import DataError

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
FORMATS = ("PNG", "JPEG", "WEBP", "BMP")
"""The decoders that may see these files, whatever a file claims to be."""

MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr")
"""Pillow's modes with at most 8 bits a channel; others would be clipped, not converted."""


@dataclass(frozen=True)
class ImageFile:
    """Where an image's bytes lie.

    Attributes:
        name: path inside the folder or archive.
        size: in bytes.
        modified: when, in nanoseconds since 1970; in an archive, of its member.
        offset: into the archive; None for a file of its own.
    """

    name: str
    size: int
    modified: int
    offset: int | None = None


class ImageFolder(Source):
    """Image files in order of name.

    Args:
        config: path, colour mode, crop and resize.
        scratch: folder on whose disk a compressed archive is unpacked while it is open.
    """

    group_name = "images"

    def __init__(self, config: ImageFolderSource, scratch: Path) -> None:
        self._config = config
        self._root = existing(config.path, "path")
        self._archive: IO[bytes] | None = None
        self._ignored = 0
        if self._root.is_dir():
            files = self._list_folder()
        else:
            self._archive = open_tar(self._root, scratch)
            files = self._list_archive(self._archive)
        self._files = sorted(files, key=lambda file: file.name)
        self.num_samples = len(self._files)
        if not self._files:
            raise DataError(
                "the source holds no images",
                where=self._root,
                found=f"{self._ignored} other files",
                expected=f"files named {', '.join('*' + suffix for suffix in SUFFIXES)}",
            )
        shape = self._first_shape()
        self.spec = DatasetSpec(
            name=self._root.name.split(".")[0],
            kind="image",
            num_variables=int(np.prod(shape)),
            num_categories=(256,) * int(np.prod(shape)),
            image_shape=shape,
        )

    def read(self, position: int) -> np.ndarray:
        """(V,) uint8."""
        file = self._files[position]
        pixels = self._decode(file)
        if pixels.shape != self.spec.image_shape:
            raise DataError(
                "images differ in size",
                where=f"{self._root}, {file.name}",
                found=f"{pixels.shape[0]} x {pixels.shape[1]} pixels",
                expected="{} x {} as the first image".format(*self.spec.image_shape or ()),
                fix="set data.source.resize_pixels, or crop_size_pixels where all are large enough",
            )
        return pixels.reshape(-1)

    def identity(self) -> dict[str, Any]:
        """Digest over names, sizes and times of change of all images, and of their archive."""
        # Not over their content: a run asks at each start, and the images may fill a disk.
        digest = hashlib.sha256()
        if self._archive is not None:
            status = self._root.stat()
            digest.update(f"{status.st_size}\0{status.st_mtime_ns}\0".encode())
        for file in self._files:
            facts = f"{file.name}\0{file.size}\0{file.modified}\0"
            digest.update(facts.encode(errors="surrogateescape"))
        return {"num_images": len(self._files), "names_sizes_and_times": digest.hexdigest()}

    def facts(self) -> dict[str, Any]:
        """How many files are no images by their name."""
        return {"ignored_files": self._ignored}

    def close(self) -> None:
        """Close the archive; one that was unpacked disappears."""
        if self._archive is not None:
            self._archive.close()

    def _list_folder(self) -> list[ImageFile]:
        files, seen = [], set()
        for folder, _, names in os.walk(self._root):
            for name in names:
                path = Path(folder, name)
                real = path.resolve()
                # Sets that link each picture under several names would count it several times.
                if not _is_image(name) or not path.is_file() or real in seen:
                    self._ignored += 1
                    continue
                seen.add(real)
                status = path.stat()
                name = str(path.relative_to(self._root))
                files.append(ImageFile(name, status.st_size, status.st_mtime_ns))
        return files

    def _list_archive(self, archive: IO[bytes]) -> list[ImageFile]:
        files: dict[str, ImageFile] = {}
        for member in regular_members(archive, self._root):
            if not _is_image(PurePosixPath(member.name).name):
                self._ignored += 1
                continue
            if member.name in files:
                raise DataError(
                    "an archive holds a name twice",
                    where=f"{self._root}, member {member.name!r}",
                    fix="pack the files anew",
                )
            modified = int(member.mtime * 1_000_000_000)
            files[member.name] = ImageFile(member.name, member.size, modified, member.offset_data)
        return list(files.values())

    def _bytes_of(self, file: ImageFile) -> IO[bytes]:
        if file.offset is None:
            return (self._root / file.name).open("rb")
        assert self._archive is not None
        self._archive.seek(file.offset)
        return io.BytesIO(self._archive.read(file.size))

    def _first_shape(self) -> tuple[int, int, int]:
        """(height, width, channels) of the first image that can be decoded."""
        reasons = []
        for file in self._files[:100]:
            try:
                height, width, channels = self._decode(file).shape
            except BadSampleError as error:
                reasons.append(f"{error.name}: {error.reason}")
                continue
            return height, width, channels
        raise DataError(
            "none of the first images can be decoded",
            where=self._root,
            found="; ".join(reasons[:3]),
            expected="PNG, JPEG, WebP or BMP images",
        )

    def _decode(self, file: ImageFile) -> np.ndarray:
        """(height, width, channels) uint8 after mode, crop and resize.

        Raises:
            BadSampleError: no image, cut, or of more pixels than Pillow thinks safe.
        """
        from PIL import Image

        try:
            with warnings.catch_warnings(), self._bytes_of(file) as handle:
                # Pillow only warns at its limit of pixels and refuses at twice that.
                warnings.simplefilter("error", Image.DecompressionBombWarning)
                with Image.open(handle, formats=FORMATS) as image:
                    return self._prepare(image, file)
        except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
            raise BadSampleError(file.name, f"too many pixels to be safe: {error}") from error
        except (OSError, SyntaxError, ValueError, EOFError, zlib.error, struct.error) as error:
            raise BadSampleError(file.name, str(error) or type(error).__name__) from error

    def _prepare(self, image: Any, file: ImageFile) -> np.ndarray:
        from PIL import Image

        crop, side = self._config.crop_size_pixels, self._config.resize_pixels
        if crop is not None and min(image.size) < crop:
            raise DataError(
                "an image is smaller than the crop",
                where=f"{self._root}, {file.name}",
                found="{} x {} pixels".format(*image.size[::-1]),
                expected=f"at least {crop} x {crop}",
                fix="set a smaller data.source.crop_size_pixels, or resize_pixels instead",
            )
        if image.mode not in MODES:
            raise BadSampleError(file.name, f"pixels of mode {image.mode}, not of 8 bits")
        picture = image
        if image.has_transparency_data:
            # What lies under transparent pixels is arbitrary: show them on white.
            picture = image.convert("RGBA")
            picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
        picture = picture.convert("L" if self._config.mode == "grey" else "RGB")
        if crop is not None:
            left, top = (picture.width - crop) // 2, (picture.height - crop) // 2
            picture = picture.crop((left, top, left + crop, top + crop))
        if side is not None and picture.size != (side, side):
            picture = picture.resize((side, side), Image.Resampling.BOX)
        pixels = np.asarray(picture)
        return pixels.reshape(*pixels.shape[:2], -1)


def _is_image(name: str) -> bool:
    """By suffix; hidden files such as ._photo.jpg are none."""
    return name.lower().endswith(SUFFIXES) and not name.startswith(".")
