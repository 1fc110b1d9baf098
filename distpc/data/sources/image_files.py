"""The image files of a folder or tar archive: which there are, and their bytes."""

from __future__ import annotations

import hashlib
import io
import os
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO, Any

from distpc.data.archive import open_tar, regular_members
from distpc.data.sources.base import existing
from distpc.errors import DataError

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")


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


class ImageFiles:
    """Image files in order of name.

    Args:
        path: folder (searched recursively) or tar archive, compressed or not.
        field: of the source's configuration that holds it, for errors.
        scratch: folder on whose disk a compressed archive is unpacked while it is open.

    Attributes:
        root: the folder or archive.
        files: the images.
        num_ignored: other files.

    Raises:
        DataError: nothing there, no images, or an archive that holds a name twice.
    """

    def __init__(self, path: str, field: str, scratch: Path) -> None:
        self.root = existing(path, field)
        self.num_ignored = 0
        self._archive: IO[bytes] | None = None
        if self.root.is_dir():
            self.files, self.num_ignored = _list_folder(self.root)
        else:
            self._archive = open_tar(self.root, scratch)
            files = self._list_archive(self._archive)
            self.files = sorted(files, key=lambda file: file.name)
        if not self.files:
            raise DataError(
                "the source holds no images",
                where=self.root,
                found=f"{self.num_ignored} other files",
                expected=f"files named {', '.join('*' + suffix for suffix in SUFFIXES)}",
            )

    def open(self, file: ImageFile) -> IO[bytes]:
        """The bytes of an image."""
        if file.offset is None:
            return (self.root / file.name).open("rb")
        assert self._archive is not None
        self._archive.seek(file.offset)
        return io.BytesIO(self._archive.read(file.size))

    def close(self) -> None:
        """Close the archive; one that was unpacked disappears."""
        if self._archive is not None:
            self._archive.close()

    def _list_archive(self, archive: IO[bytes]) -> list[ImageFile]:
        files: dict[str, ImageFile] = {}
        for member in regular_members(archive, self.root):
            if not _is_image(PurePosixPath(member.name).name):
                self.num_ignored += 1
                continue
            if member.name in files:
                raise DataError(
                    "an archive holds a name twice",
                    where=f"{self.root}, member {member.name!r}",
                    fix="pack the files anew",
                )
            modified = int(member.mtime * 1_000_000_000)
            files[member.name] = ImageFile(member.name, member.size, modified, member.offset_data)
        return list(files.values())


def identity_of(path: str, field: str) -> dict[str, Any]:
    """JSON facts that change when images at `path` do: names, sizes and times of change.

    Not their content: a run asks at each start, and the images may fill a disk. Of an archive only
    its own size and time: listing a compressed one means unpacking it.

    Raises:
        DataError: nothing there.
    """
    root = existing(path, field)
    if not root.is_dir():
        status = root.stat()
        return {"bytes": status.st_size, "modified_ns": status.st_mtime_ns}
    files, _ = _list_folder(root)
    digest = hashlib.sha256()
    for file in files:
        facts = f"{file.name}\0{file.size}\0{file.modified}\0"
        digest.update(facts.encode(errors="surrogateescape"))
    return {"num_images": len(files), "names_sizes_and_times": digest.hexdigest()}


def _list_folder(root: Path) -> tuple[list[ImageFile], int]:
    """The images in order of name, and how many other files there are."""
    files, seen, ignored = [], set(), 0
    for folder, _, names in os.walk(root):
        for name in names:
            path = Path(folder, name)
            real = path.resolve()
            # Sets that link each picture under several names would count it several times.
            if not _is_image(name) or not path.is_file() or real in seen:
                ignored += 1
                continue
            seen.add(real)
            status = path.stat()
            name = str(path.relative_to(root))
            files.append(ImageFile(name, status.st_size, status.st_mtime_ns))
    return sorted(files, key=lambda file: file.name), ignored


def _is_image(name: str) -> bool:
    """By suffix; hidden files such as ._photo.jpg are none."""
    return name.lower().endswith(SUFFIXES) and not name.startswith(".")
