"""A place that holds named files: a folder, or a prefix in an object store (s3://bucket/prefix).

Whatever is put there appears whole or not at all: in a folder by renaming, in an object store
because that is how it stores objects (an upload that was broken off leaves nothing that can be
read). Credentials and the server's address come from the environment of the process
(AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_ENDPOINT_URL ...) and are never written down.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any
from urllib.parse import quote

from distpc.artifacts.files import PARTIAL_SUFFIX, atomic_path, is_disk_full, no_space
from distpc.config.urls import SCHEME, require_place
from distpc.errors import ConfigError, DistpcError, PlaceError

CONNECT_SECONDS = 5
"""Time that a server has to accept a connection."""
ANSWER_SECONDS = 30
"""Time that a server may stay silent within an answer."""
ATTEMPTS = 2
NO_BUCKET = "bucket does not exist"
_SHORTEST_SECRET, _LONG_SECRET = 4, 16
"""Characters of a credential: no server takes fewer; no word has as many."""
_SECRETS = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN")


@dataclass(frozen=True)
class Listed:
    """A file as a place lists it.

    Attributes:
        bytes: its length.
        stamp: changes when its content does: an object's ETag, a file's time of change.
    """

    bytes: int
    stamp: str


@dataclass(frozen=True)
class Place:
    """A folder or a prefix in an object store.

    Attributes:
        root: absolute path, or URL without a slash at its end; make one with `Place.of`.
    """

    root: str

    @classmethod
    def of(cls, text: str | Path) -> Place:
        """The place that a path or URL names.

        Raises:
            ConfigError: a URL of another kind, without a bucket, or with credentials in it.
        """
        name = str(text)
        try:
            require_place(name)
        except ValueError as error:
            raise ConfigError(f"no place to read or write: {error}") from None
        if "://" in name:
            return cls(name.rstrip("/"))
        return cls(str(Path(name).absolute()))

    @property
    def is_local(self) -> bool:
        """Whether its files are files of this machine."""
        return "://" not in self.root

    def __str__(self) -> str:
        return self.root

    def at(self, name: str) -> str:
        """Path or URL of a file in it."""
        return f"{self.root}/{name}" if name else self.root

    def child(self, name: str) -> Place:
        """The place below it."""
        return Place(self.at(name))

    def list(self) -> dict[str, Listed]:
        """All files in it and below, by name relative to it, in order; none where it is missing.

        Raises:
            PlaceError: the bucket is missing, or the server does not answer or refuses.
        """
        with self._errors(""):
            files = _filesystem(self.is_local).find(self.root, detail=True)
            if not files:
                self._require_bucket()
        start = len(self.root.removeprefix(f"{SCHEME}://")) + 1
        return {
            path[start:]: Listed(facts["size"], str(facts.get("ETag", facts.get("mtime"))))
            for path, facts in sorted(files.items())
            if not path.endswith(PARTIAL_SUFFIX)
        }

    def size(self, name: str) -> int | None:
        """Bytes of a file; None where there is none.

        Raises:
            PlaceError: as `list`.
        """
        with self._errors(name):
            try:
                return int(_filesystem(self.is_local).size(self.at(name)))
            except FileNotFoundError:
                self._require_bucket()
                return None

    def read(self, name: str) -> bytes:
        """The content of a file.

        Raises:
            PlaceError: it is missing, or as `list`.
        """
        with self._errors(name):
            content: bytes = _filesystem(self.is_local).cat_file(self.at(name))
            return content

    def digest(self, name: str) -> str:
        """SHA-256 of a file's content, which is read but not kept, in hexadecimal digits.

        Raises:
            PlaceError: it is missing, or as `list`.
        """
        with self._errors(name), _filesystem(self.is_local).open(self.at(name), "rb") as handle:
            sha256 = hashlib.sha256()
            while block := handle.read(1 << 22):
                sha256.update(block)
            return sha256.hexdigest()

    def fetch(self, name: str, target: Path) -> None:
        """Copy a file of it to `target`, which the caller keeps aside until it is whole.

        Raises:
            PlaceError: it is missing, or as `list`.
            ResourceError: the disk is full.
        """
        with self._errors(name):
            try:
                _filesystem(self.is_local).get_file(self.at(name), str(target))
            except OSError as error:
                if is_disk_full(error):
                    raise no_space(target) from error
                raise

    def put(self, name: str, source: Path) -> None:
        """Publish a copy of the file `source` under `name`, whole or not at all.

        Raises:
            PlaceError: as `list`.
            ResourceError: the disk is full.
        """
        if self.is_local:
            with atomic_path(Path(self.at(name))) as partial:
                shutil.copyfile(source, partial)
            return
        with self._errors(name):
            _filesystem(False).put_file(str(source), self.at(name))

    def write(self, name: str, content: bytes) -> None:
        """Publish `content` under `name`, whole or not at all.

        Raises:
            As `put`.
        """
        if self.is_local:
            with atomic_path(Path(self.at(name))) as partial:
                partial.write_bytes(content)
            return
        with self._errors(name):
            _filesystem(False).pipe_file(self.at(name), content)

    def _require_bucket(self) -> None:
        if self.is_local:
            return
        bucket = self.root.removeprefix(f"{SCHEME}://").partition("/")[0]
        try:
            _filesystem(False).call_s3("head_bucket", Bucket=bucket)
        except FileNotFoundError as error:
            raise FileNotFoundError(f"{bucket}: {NO_BUCKET}") from error

    @contextlib.contextmanager
    def _errors(self, name: str) -> Iterator[None]:
        """Turn what the libraries raise into an error that names the file and the cause."""
        try:
            yield
        except Exception as error:
            if isinstance(error, DistpcError) or (self.is_local and not _is_missing(error)):
                raise
            raise self._explain(name, error) from error

    def _explain(self, name: str, error: Exception) -> PlaceError:
        kinds = {kind.__name__ for kind in type(error).__mro__}
        found = without_secrets(f"{type(error).__name__}: {error}")
        what, fix = "an object store refused or failed", "see what it answered, then run again"
        if kinds & {"NoCredentialsError", "PartialCredentialsError"}:
            what = "there are no credentials for the object store"
            fix = "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY (or AWS_PROFILE) in the "
            fix += "environment of every process, workers' machines included"
        elif isinstance(error, PermissionError):
            what, fix = "the object store refuses access", "check the credentials and their rights"
        elif NO_BUCKET in str(error):
            what, fix = "the bucket does not exist", "make it, or name another"
        elif isinstance(error, FileNotFoundError):
            what, fix = "a file is missing", "check the name, or publish it again"
        elif kinds & {"ConnectionError", "HTTPClientError", "TimeoutError", "FSTimeoutError"}:
            what = "the object store does not answer"
            fix = "check AWS_ENDPOINT_URL and the network, then run the same command again"
        return PlaceError(what, where=self.at(name), found=found, fix=fix)


def without_secrets(text: str) -> str:
    """`text` with whatever the environment holds as credentials taken out.

    What is as long as real ones are is taken out wherever it stands. Shorter ones may be parts of
    ordinary words and are taken out where they stand alone; a letter or three are no secret.
    """
    held = {name: os.environ.get(name, "") for name in _SECRETS}
    # The longest first: one may be a part of another.
    for name, value in sorted(held.items(), key=lambda pair: -len(pair[1])):
        if len(value) < _SHORTEST_SECRET:
            break
        # As it is, and as it stands in a URL.
        pattern = f"(?:{re.escape(value)}|{re.escape(quote(value, safe=''))})"
        if len(value) < _LONG_SECRET:
            pattern = rf"(?<!\w){pattern}(?!\w)"
        text = re.sub(pattern, f"<{name}>", text)
    return text


def _is_missing(error: Exception) -> bool:
    return isinstance(error, FileNotFoundError | NotADirectoryError)


def _filesystem(is_local: bool) -> Any:
    """The file system, made once a process for one server and one set of credentials."""
    if is_local:
        return _local()
    names = ("AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "AWS_PROFILE", *_SECRETS)
    return _object_store(os.getpid(), hash(tuple(os.environ.get(name) for name in names)))


@lru_cache(maxsize=1)
def _local() -> Any:
    import fsspec

    return fsspec.filesystem("file")


@lru_cache(maxsize=1)
def _object_store(process: int, environment: int) -> Any:
    try:
        from s3fs import S3FileSystem
    except ImportError as error:
        raise PlaceError(
            "object stores need a package that is not installed",
            found=error,
            fix="pip install 'distpc[objects]'",
        ) from error

    class Bounded(S3FileSystem):
        # Besides botocore's own attempts; few, so that the time to an error is bounded.
        retries = ATTEMPTS

    return Bounded(
        skip_instance_cache=True,
        use_listings_cache=False,
        config_kwargs={
            "connect_timeout": CONNECT_SECONDS,
            "read_timeout": ANSWER_SECONDS,
            "retries": {"total_max_attempts": ATTEMPTS, "mode": "standard"},
        },
    )
