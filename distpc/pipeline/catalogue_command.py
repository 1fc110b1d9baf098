"""`distpc catalogue`: the finished stages at a place, as a table or as JSON."""

from __future__ import annotations

import json
from typing import Any

from distpc.artifacts.catalogue import Entry, entries
from distpc.artifacts.place import Place
from distpc.errors import ArtifactError


def catalogue(place: str, stage: str | None = None, *, as_json: bool = False) -> str:
    """Text that lists the finished stages at a place.

    Args:
        place: folder or URL.
        stage: list this one alone.
        as_json: all that the manifests say of each, but for metadata and files.

    Raises:
        ArtifactError: there are none.
        PlaceError: it cannot be read.
    """
    found = [entry for entry in entries(Place.of(place)) if stage in (None, entry.artifact.stage)]
    if not found:
        raise ArtifactError(
            "no finished stages" if stage is None else f"no finished stage '{stage}'",
            where=place,
            expected="a run folder, or a place that runs publish to (artifacts.url)",
        )
    if as_json:
        return json.dumps([_facts(entry) for entry in found], indent=2, default=str)
    head = ["stage", "fingerprint", "bytes", "finished (UTC)", "made from"]
    rows = [
        [
            entry.artifact.stage,
            entry.artifact.fingerprint,
            f"{entry.num_bytes:,}",
            entry.artifact.created.removesuffix("+00:00"),
            _made_from(entry),
        ]
        for entry in found
    ]
    widths = [max(len(row[column]) for row in [head, *rows]) for column in range(len(head))]
    return "\n".join(
        "  ".join(
            text.rjust(width) if number == 2 else text.ljust(width)
            for number, (text, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in [head, *rows]
    )


def _facts(entry: Entry) -> dict[str, Any]:
    artifact = entry.artifact
    return {
        "stage": artifact.stage,
        "fingerprint": artifact.fingerprint,
        "bytes": entry.num_bytes,
        "num_files": len(artifact.files),
        "created": artifact.created,
        "seconds": artifact.seconds,
        "place": str(entry.place),
        "made_from": artifact.made_from,
    }


def _made_from(entry: Entry) -> str:
    """The config fields and inputs that the result depends on, in one line."""
    made_from = entry.artifact.made_from or {}
    parts = [f"{name} {mark}" for name, mark in made_from.get("inputs", {}).items()]
    if made_from.get("fields") is not None:
        parts.insert(0, json.dumps(made_from["fields"]))
    return "; ".join(parts) or "-"
