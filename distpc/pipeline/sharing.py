"""Finished stages shared between runs: what a run says while it takes and publishes them."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

from distpc.artifacts import Artifact
from distpc.artifacts.catalogue import entries, find, publish, take
from distpc.artifacts.manifest import MANIFEST
from distpc.artifacts.place import Place
from distpc.config.places import ArtifactsConfig
from distpc.errors import ArtifactError
from distpc.parallel.progress import Progress

if TYPE_CHECKING:
    from distpc.pipeline.runner import Step


def check_places(places: ArtifactsConfig, folder: Path) -> None:
    """Refuse places that cannot be reached, before a stage has run for hours.

    Raises:
        PlaceError: a bucket is missing, or its server does not answer or refuses.
        ArtifactError: stages were to be published into the run folder itself.
    """
    for place in [*places.reuse, *([places.url] if places.url else [])]:
        Place.of(place).size(MANIFEST)
    if places.url and Place.of(places.url) == Place.of(folder):
        raise ArtifactError(
            "a run cannot publish into its own run folder",
            where="artifacts.url",
            found=places.url,
            fix="name another folder; a run folder can be reused as it is (--reuse)",
        )


def where_finished(places: ArtifactsConfig, step: Step) -> str | None:
    """The place that a stage would be taken from, should it have to run; None where it is computed.

    Raises:
        PlaceError: a place cannot be read.
    """
    for place in places.reuse:
        entry = find(Place.of(place), step.stage.name, step.fingerprint)
        if entry is not None:
            return str(entry.place)
    return None


def take_from(place: Place, stage: str, step: Step) -> Artifact | None:
    """Copy a stage's result into its folder, if a place has one with the step's fingerprint.

    Raises:
        ArtifactError: it has one that is damaged.
        PlaceError: the place cannot be read.
    """
    entry = find(place, stage, step.fingerprint)
    if entry is None:
        for other in reversed(list(entries(place.child(stage)))):
            why = step.differs(other.artifact.made_from)
            _say(f"{stage}: not taken from {other.place}, another result: {why}")
            break
        return None
    with Progress(f"{stage} from {place}", entry.num_bytes, "bytes") as progress:
        artifact = take(entry, step.folder, progress.advance)
    _say(f"{stage}: taken from {entry.place}, skipped")
    return artifact


def publish_to(place: Place, artifact: Artifact) -> None:
    """Copy a finished stage to a place unless it is there.

    Raises:
        PlaceError, ResourceError: the place cannot be written.
    """
    size = sum(artifact.files.values())
    if find(place, artifact.stage, artifact.fingerprint) is None:
        with Progress(f"{artifact.stage} to {place}", size, "bytes") as progress:
            publish(artifact, place, progress.advance)
        _say(f"{artifact.stage}: published, {size:,} bytes in {place}")


def _say(text: str) -> None:
    print(f"[distpc] {text}", file=sys.stderr, flush=True)
