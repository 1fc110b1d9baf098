"""Finished stages at a place, found by their fingerprints: published, listed, taken, checked.

    PLACE/STAGE/FINGERPRINT/manifest.json            written last: what it names is there, whole
    PLACE/STAGE/FINGERPRINT/CONTENT/...              the stage's files

CONTENT is made of the files' digests. Two runs that publish one fingerprint at a time can thus
never mix their files, and an upload that was broken off goes on where it stopped: an object that
is there is whole, and has the content that its name says. Run folders (PLACE/STAGE/manifest.json)
are catalogues, too.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import zip_longest
from pathlib import Path, PurePosixPath
from typing import Any

from distpc.artifacts.fields import called
from distpc.artifacts.files import atomic_path, file_digest, fingerprint, write_json
from distpc.artifacts.manifest import MANIFEST, Artifact
from distpc.artifacts.place import Listed, Place
from distpc.errors import ArtifactError, DistpcError

CONTENT = "content"
_NOTHING = object()
_MOST_DIFFERENCES = 5
_MOST_SHOWN = 80
THREADS = 4
"""Files that are brought or taken at once."""


@dataclass(frozen=True)
class Entry:
    """A finished stage at a place.

    Attributes:
        artifact: as its manifest describes it; its `path` means nothing.
        place: where its files lie.
    """

    artifact: Artifact
    place: Place

    @property
    def num_bytes(self) -> int:
        """Of all its files."""
        return sum(self.artifact.files.values())


def entries(place: Place) -> Iterator[Entry]:
    """All finished stages below a place, stages of one name together, oldest first.

    Raises:
        PlaceError: it cannot be read.
        FormatVersionError: another version of distpc wrote there.
    """
    manifests = [name for name in place.list() if name.rpartition("/")[2] == MANIFEST]
    folders = [name.removesuffix(MANIFEST).rstrip("/") for name in manifests]
    with ThreadPoolExecutor(THREADS) as pool:
        found = list(pool.map(lambda folder: read(place, folder), folders))
    yield from sorted(found, key=lambda entry: (entry.artifact.stage, entry.artifact.created))


def find(place: Place, stage: str, wanted: str) -> Entry | None:
    """The stage's result with fingerprint `wanted`; None where there is none.

    Raises:
        As `entries`.
    """
    for folder in (f"{stage}/{wanted}", stage):
        if place.size(f"{folder}/{MANIFEST}") is not None:
            entry = read(place, folder)
            if entry.artifact.fingerprint == wanted:
                return entry
    return None


def publish(
    artifact: Artifact, place: Place, advance: Callable[[int], object] = lambda count: None
) -> bool:
    """Copy a finished stage to a place, unless it is there; whether it was not.

    Args:
        advance: told the bytes of each file that has arrived.

    Raises:
        ArtifactError: the artifact has no digests, or a file has changed since it was sealed.
        PlaceError, ResourceError: the place cannot be written.
    """
    if find(place, artifact.stage, artifact.fingerprint) is not None:
        return False
    if set(artifact.sha256) != set(artifact.files):
        raise ArtifactError(
            "an artifact of an older version of distpc has no checksums to publish it with",
            where=artifact.path,
            fix="remove the stage's folder and run the same command again",
        )
    folder = place.child(f"{artifact.stage}/{artifact.fingerprint}")
    content = fingerprint(artifact.sha256)
    files = folder.child(content)
    there = files.list()

    def bring(name: str) -> None:
        size = artifact.files[name]
        if name not in there or there[name].bytes != size:
            if file_digest(artifact.path / name) != artifact.sha256[name]:
                raise _changed(artifact.path / name, artifact.sha256[name])
            files.put(name, artifact.path / name)
        advance(size)

    _each(bring, artifact.files)
    manifest = {**artifact.to_json(), CONTENT: content}
    folder.write(MANIFEST, (json.dumps(manifest, indent=2, default=str) + "\n").encode())
    return True


def take(
    entry: Entry, folder: Path, advance: Callable[[int], object] = lambda count: None
) -> Artifact:
    """Copy a finished stage from a place into `folder`; whole files of an earlier try are kept.

    Args:
        advance: told the bytes of each file that has arrived.

    Raises:
        ArtifactError: a file is missing, cut, or has another content than its manifest says.
        PlaceError, ResourceError: the place cannot be read, the disk is full.
    """
    artifact = entry.artifact
    there = entry.place.list()

    def bring(name: str) -> None:
        _require(entry, name, there)
        target, digest = folder / name, artifact.sha256.get(name)
        if digest is None:
            raise ArtifactError("an artifact has no checksums", where=entry.place.at(MANIFEST))
        if not target.is_file() or file_digest(target) != digest:
            with atomic_path(target) as partial:
                entry.place.fetch(name, partial)
                if file_digest(partial) != digest:
                    raise _changed(entry.place.at(name), digest)
        advance(artifact.files[name])

    _each(bring, artifact.files)
    taken = replace(artifact, path=folder, taken_from=str(entry.place))
    write_json(folder / MANIFEST, taken.to_json())
    return taken


def check(entry: Entry) -> Iterator[DistpcError]:
    """Read all files of an entry; yield an error for each that is missing, cut or changed, and
    one where its fingerprint is not that of what it was made from."""
    there = entry.place.list()
    made_from = entry.artifact.made_from
    if made_from is not None and fingerprint(made_from) != entry.artifact.fingerprint:
        yield ArtifactError(
            "a manifest's fingerprint does not follow from what it was made from",
            where=entry.place.at(MANIFEST),
            found=entry.artifact.fingerprint,
            expected=fingerprint(made_from),
        )
    for name in entry.artifact.files:
        digest = entry.artifact.sha256.get(name)
        try:
            _require(entry, name, there)
            if digest is None:
                raise ArtifactError("a file has no checksum", where=entry.place.at(name))
            if entry.place.digest(name) != digest:
                raise _changed(entry.place.at(name), digest)
        except DistpcError as error:
            yield error


def difference(
    there: Any,
    here: Any,
    names: Mapping[str, str] | None = None,
    words: tuple[str, str] = ("there", "here"),
) -> str:
    """Where two results' `made_from` differ, in words.

    Args:
        names: of the values in `here`, by where they stand (`fields.names_in`).
        words: for the one and the other.
    """
    if there is None:
        return "it does not say what it was made from"
    found = [
        f"{called(path, names or {})} is {_shown(one)} {words[0]}, {_shown(other)} {words[1]}"
        for path, one, other in _differing(there, here, "")
    ]
    more = len(found) - _MOST_DIFFERENCES
    last = [f"{more} more differences"] if more > 0 else []
    return "; ".join([*found[:_MOST_DIFFERENCES], *last]) or "no difference"


def _shown(value: Any) -> str:
    text = "absent" if value is _NOTHING else json.dumps(value, default=str)
    return text if len(text) <= _MOST_SHOWN else f"{text[:_MOST_SHOWN]}..."


def _are_alike(there: dict[str, Any], here: dict[str, Any]) -> bool:
    """Whether they are of one kind: then most keys are those of both."""
    return 2 * len(there.keys() & here.keys()) >= len(there.keys() | here.keys())


def _differing(there: Any, here: Any, path: str) -> Iterator[tuple[str, Any, Any]]:
    if isinstance(there, dict) and isinstance(here, dict) and _are_alike(there, here):
        for key in sorted({*there, *here}, key=str):
            one, other = there.get(key, _NOTHING), here.get(key, _NOTHING)
            yield from _differing(one, other, f"{path}.{key}".lstrip("."))
    elif isinstance(there, list | tuple) and isinstance(here, list | tuple):
        for number, (one, other) in enumerate(zip_longest(there, here, fillvalue=_NOTHING)):
            yield from _differing(one, other, f"{path}[{number}]")
    elif there != here:
        yield path, there, here


def read(place: Place, folder: str = "") -> Entry:
    """The finished stage whose manifest lies in a folder of a place.

    Raises:
        As `entries`; ArtifactError: the manifest is no JSON.
    """
    where = place.child(folder) if folder else place
    try:
        manifest = json.loads(where.read(MANIFEST))
    except ValueError as error:
        raise ArtifactError(
            "a manifest is not valid JSON", where=where.at(MANIFEST), found=error
        ) from error
    artifact = Artifact.from_json(Path(where.root), manifest, where.at(MANIFEST))
    return Entry(artifact, where.child(manifest[CONTENT]) if CONTENT in manifest else where)


def _require(entry: Entry, name: str, there: Mapping[str, Listed]) -> None:
    parts = PurePosixPath(name).parts
    if ".." in parts or name.startswith("/"):
        raise ArtifactError("a manifest names a file outside of its folder", where=name)
    expected = entry.artifact.files[name]
    found = there[name].bytes if name in there else None
    if found != expected:
        raise ArtifactError(
            "a file is missing or cut",
            where=entry.place.at(name),
            found="no file" if found is None else f"{found} bytes",
            expected=f"{expected} bytes",
            fix="remove the stage's result there, and run the command that made it again",
        )


def _each(work: Callable[[str], None], names: Iterable[str]) -> None:
    with ThreadPoolExecutor(THREADS) as pool:
        try:
            list(pool.map(work, names))
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def _changed(where: Any, expected: str) -> ArtifactError:
    return ArtifactError(
        "a file has another content than when it was finished",
        where=where,
        expected=f"SHA-256 {expected}",
        fix="remove the stage's result there, and run the command that made it again",
    )
