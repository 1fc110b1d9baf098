"""Places outside of the run folder: where finished stages are published and taken from."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from distpc.config.sources import Section
from distpc.config.urls import require_place

StageName = Literal[
    "shards",
    "index",
    "teacher",
    "features",
    "fit",
    "assign",
    "structure",
    "distill",
    "finetune",
    "evaluate",
]


class ArtifactsConfig(Section):
    """Places besides the run folder for finished stages, and the cache of object stores. None of
    these fields changes a result; see docs/places.md."""

    url: str | None = None
    """Folder or s3://bucket/prefix to which finished stages are copied, under their fingerprints;
    default: nowhere."""
    publish: list[StageName] | None = None
    """Stages that are copied there; default: all."""
    reuse: list[str] = Field(default=[])
    """Folders, run folders or URLs that finished stages are taken from, where fingerprints agree,
    instead of being computed; the first that has one counts."""
    cache_folder: str | None = None
    """Folder on a disk of each machine for copies of what is read by URL; default: distpc in
    XDG_CACHE_HOME or ~/.cache."""
    cache_bytes: int = Field(default=10 * 2**30, ge=1)
    """Bound on these copies of one machine, least recently used dropped first; best as large as
    the shards that the machine reads."""

    @model_validator(mode="after")
    def _places(self) -> ArtifactsConfig:
        for place in [*self.reuse, *([] if self.url is None else [self.url])]:
            require_place(place)
        return self
