"""Shards that exist already, in a folder or an object store: read where they lie.

Stage `shards` then keeps no tars. Its folder holds dataset.json and, beside the result, a note of
the place, which is renewed whenever a run begins: the same shards may have moved.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from distpc.artifacts.files import read_json, write_bytes, write_json
from distpc.artifacts.manifest import MANIFEST
from distpc.artifacts.place import Place
from distpc.artifacts.stage import StageContext
from distpc.config import RunConfig
from distpc.config.sources import ShardsSource
from distpc.data.spec import DATASET, DatasetSpec
from distpc.data.tokenizers import CHARACTERS_FILE, DOCUMENTS, FOLDER, LIBRARY_FILE
from distpc.errors import ConfigError, DataError

NOTE = ".place.json"
SUFFIX = ".tar"
BESIDE = (f"{FOLDER}/{LIBRARY_FILE}", f"{FOLDER}/{CHARACTERS_FILE}", DOCUMENTS)
"""What shards of text may have beside them."""


def take_over(ctx: StageContext, source: ShardsSource) -> None:
    """Write dataset.json, what text has beside it, and the note; the shards stay where they are.

    Raises:
        ConfigError: the colour space contradicts theirs.
        DataError: there are none, or no dataset.json.
        PlaceError: the place cannot be read.
    """
    spec = load_spec(source, ctx.config.data.color)
    facts: dict[str, Any] = {"dataset": spec.name, "identity": identity(source)}
    if counts := num_samples(source):
        facts["num_samples"] = counts
    spec.save(ctx.out)
    place = Place.of(source.url)
    for name in BESIDE:
        if place.size(name) is not None:
            write_bytes(ctx.out / name, place.read(name))
    ctx.metadata.update(facts, bad_samples=[], source={"shards": source.url})
    note_place(ctx.config, ctx.out)


def note_place(config: RunConfig, folder: Path) -> None:
    """Note in the shards stage's folder where the shards are now, unless it holds them itself."""
    if isinstance(config.data.source, ShardsSource):
        write_json(folder / NOTE, {"url": str(Place.of(config.data.source.url))})


def shards_place(folder: Path) -> Place:
    """Where the shards of the stage with this folder lie."""
    note = folder / NOTE
    return Place.of(read_json(note)["url"]) if note.is_file() else Place.of(folder)


def load_spec(source: ShardsSource, color: str) -> DatasetSpec:
    """What the samples are, as the loader gives them in colour space `color`.

    Raises:
        As `take_over`.
    """
    from distpc.data.shards import colored

    place = Place.of(source.url)
    if place.size(DATASET) is None:
        raise DataError(
            "there is no description of the data set beside the shards",
            where=place.at(DATASET),
            expected="dataset.json as stage `shards` writes it",
            fix="copy it from the run that wrote the shards; docs/places.md says what it holds",
        )
    try:
        spec = DatasetSpec.from_json(json.loads(place.read(DATASET)))
    except ValueError as error:
        raise DataError("not valid JSON", where=place.at(DATASET), found=error) from error
    if color in ("as_is", spec.color):
        return spec
    if spec.color != "as_is":
        raise ConfigError(
            "the shards' data set has another colour space",
            where="data.color",
            found=color,
            expected=f"as_is or {spec.color}",
        )
    return colored(replace(spec, color="as_is"), color)


def identity(source: ShardsSource) -> dict[str, Any]:
    """What changes when the shards do: their digests, if the stage that wrote them recorded them.

    Else the place with lengths and ETags (in a folder: times of change), which a copy elsewhere
    does not share.

    Raises:
        DataError: there are no shards.
        PlaceError: the place cannot be read.
    """
    place = Place.of(source.url)
    listed = {name: facts for name, facts in place.list().items() if name.endswith(SUFFIX)}
    if not listed:
        raise DataError(
            "there are no shards",
            where=place,
            expected="train-000000.tar ..., valid-..., test-... and dataset.json",
        )
    digests = _manifest(place).get("sha256", {})
    if set(listed) <= set(digests):
        return {"sha256": {name: digests[name] for name in listed}}
    stamps = {name: [facts.bytes, facts.stamp] for name, facts in listed.items()}
    return {"place": str(place), "stamps": stamps}


def known_digests(identity: Any) -> dict[str, str]:
    """SHA-256 of the shards by name, as far as a shards stage's `identity` tells."""
    digests = identity.get("sha256") if isinstance(identity, dict) else None
    return digests if isinstance(digests, dict) else {}


def num_samples(source: ShardsSource) -> dict[str, int]:
    """Samples of each split, if the stage that wrote the shards recorded them; else empty."""
    counts = _manifest(Place.of(source.url)).get("metadata", {}).get("num_samples")
    return counts if isinstance(counts, dict) else {}


def _manifest(place: Place) -> dict[str, Any]:
    if place.size(MANIFEST) is None:
        return {}
    try:
        manifest = json.loads(place.read(MANIFEST))
    except ValueError:
        return {}
    return manifest if isinstance(manifest, dict) else {}
