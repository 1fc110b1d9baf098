"""Tar archives, taken for hostile: members are looked at, never unpacked by their own names."""

from __future__ import annotations

import gzip
import os
import tarfile
import tempfile
import zlib
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import IO, cast

from distpc.artifacts.files import is_disk_full, no_space
from distpc.errors import DataError

BLOCK = 512
END_OF_ARCHIVE = bytes(2 * BLOCK)
MAX_EXPANSION = 100
"""Images hardly shrink; a .tar.gz that unpacks to more than this many times its size is refused."""


def regular_members(handle: IO[bytes], path: Path | str) -> Iterator[tarfile.TarInfo]:
    """The regular files of an uncompressed tar, in order; folders are passed over.

    Args:
        handle: the archive, seekable.
        path: names it in errors.

    Raises:
        DataError: the tar is cut or broken, or a member is a link, a device, or leaves its folder.
    """
    size = handle.seek(0, os.SEEK_END)
    handle.seek(0)
    end = 0
    try:
        with tarfile.open(fileobj=handle, mode="r:") as archive:
            for member in archive:
                _check_member(member, path)
                end = member.offset_data + -(-member.size // BLOCK) * BLOCK
                if end > size:
                    raise _cut(path, f"{size} bytes", f"{end} bytes for member {member.name}")
                if member.isreg():
                    yield member
                # tarfile keeps every header it has seen, which millions of members make large.
                archive.members = []  # type: ignore[attr-defined]
    except (tarfile.TarError, OSError, ValueError, OverflowError, MemoryError) as error:
        raise _cut(path, error, "an uncompressed tar archive") from error
    handle.seek(end)
    if handle.read(len(END_OF_ARCHIVE)) != END_OF_ARCHIVE:
        raise _cut(path, f"no end mark after byte {end} of {size}", "two blocks of zeros")


def _check_member(member: tarfile.TarInfo, path: Path | str) -> None:
    where = f"{path}, member {member.name!r}"
    parts = PurePosixPath(member.name)
    if parts.is_absolute() or ".." in parts.parts or "\\" in member.name or "\0" in member.name:
        raise DataError(
            "an archive's member would leave the target folder",
            where=where,
            expected="relative names without '..'",
            fix="do not trust this archive; pack the files anew",
        )
    if member.issparse() or not (member.isreg() or member.isdir()):
        kind = "link" if member.issym() or member.islnk() else f"member of type {member.type!r}"
        raise DataError(
            "an archive's member is no plain file",
            where=where,
            found=f"a {kind}",
            expected="plain files and folders",
            fix="pack the files themselves (tar --dereference --hard-dereference)",
        )


def _cut(path: Path | str, found: object, expected: str) -> DataError:
    return DataError(
        "a tar archive is cut or broken",
        where=path,
        found=found,
        expected=expected,
        fix="bring or make the archive again",
    )


def open_tar(path: Path, scratch: Path) -> IO[bytes]:
    """A seekable, uncompressed view of a .tar or .tar.gz; a gzip is unpacked into a nameless file.

    Args:
        path: the archive.
        scratch: folder on whose disk the unpacked bytes may lie until the handle is closed.

    Raises:
        DataError: broken gzip, or it unpacks to an absurd size.
        ResourceError: no space for the unpacked bytes.
    """
    raw = path.open("rb")
    is_gzip = raw.read(2) == b"\x1f\x8b"
    raw.seek(0)
    if not is_gzip:
        return raw
    limit = MAX_EXPANSION * path.stat().st_size
    unpacked = cast("IO[bytes]", tempfile.TemporaryFile(dir=scratch))  # noqa: SIM115 - returned
    try:
        with raw, gzip.GzipFile(fileobj=raw) as stream:
            while block := stream.read(1 << 20):
                unpacked.write(block)
                if unpacked.tell() > limit:
                    raise _too_large(path, limit)
    except BaseException as error:
        unpacked.close()
        if isinstance(error, EOFError | zlib.error | gzip.BadGzipFile):
            raise _cut(path, error, "a whole gzip stream") from error
        if isinstance(error, OSError) and is_disk_full(error):
            raise no_space(scratch) from error
        raise
    return unpacked


def _too_large(path: Path, limit: int) -> DataError:
    return DataError(
        "a compressed archive unpacks to an absurd size",
        where=path,
        found=f"more than {limit} bytes",
        expected=f"at most {MAX_EXPANSION} times its own size",
        fix="unpack it yourself and give the folder, if you trust it",
    )
