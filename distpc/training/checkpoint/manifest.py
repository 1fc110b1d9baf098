"""What a checkpoint says of itself: which elements lie in which file, written last of all."""

from __future__ import annotations

import json
import math
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from distpc.artifacts.files import write_bytes
from distpc.errors import ArtifactError

FORMAT_VERSION = 3
MANIFEST = "state.json"


class Range(NamedTuple):
    """Elements start .. stop - 1 of a flattened tensor, and the file that holds them."""

    start: int
    stop: int
    file: str


def merge(shards: Mapping[str, Mapping[str, Any]], where: Path) -> dict[str, Any]:
    """The parts of a manifest that say what is where: `tensors` and `files`.

    Args:
        shards: by file name, what `write_shard` returned.
        where: of the checkpoint, for errors.

    Raises:
        ArtifactError: two files disagree on a tensor's shape or type, or together they do not
            hold each element once.
    """
    tensors: dict[str, Any] = {}
    for file, shard in shards.items():
        for key, kind in shard["tensors"].items():
            if tensors.setdefault(key, kind) != kind:
                raise ArtifactError(
                    "the ranks of a training hold different circuits",
                    where=f"{where / file}, '{key}'",
                    found=kind,
                    expected=tensors[key],
                    fix="start every rank with the same configuration and the same code",
                )
    files = {
        file: {name: shard[name] for name in ("bytes", "sha256", "ranges")}
        for file, shard in shards.items()
    }
    check_ranges(tensors, table_of(files), where)
    return {"tensors": tensors, "files": files}


def table_of(files: Mapping[str, Mapping[str, Any]]) -> dict[str, list[Range]]:
    """The ranges of every tensor by key, in the order of their elements."""
    table: dict[str, list[Range]] = {}
    for file, facts in files.items():
        for key, start, stop in facts["ranges"]:
            table.setdefault(key, []).append(Range(start, stop, file))
    return {key: sorted(ranges) for key, ranges in table.items()}


def check_ranges(
    tensors: Mapping[str, Any], table: Mapping[str, Sequence[Range]], where: Path
) -> None:
    """Refuse files that together do not hold each element of each tensor once.

    Raises:
        ArtifactError: naming the first tensor concerned, what there is and what there should be.
    """
    for key, kind in tensors.items():
        end = 0
        for start, stop, file in table.get(key, ()):
            if start != end:
                what = "lacks elements" if start > end else "holds elements twice"
                _refuse(what, where / file, key, f"elements {start}:{stop} after 0:{end}", kind)
            end = stop
        if end != math.prod(kind["shape"]):
            _refuse("lacks elements", where, key, f"elements 0:{end}", kind)


def overlapping(ranges: Sequence[Range], start: int, stop: int) -> list[Range]:
    """Those of gapless sorted ranges that hold some of the elements start .. stop - 1."""
    first = bisect_right(ranges, start, key=lambda r: r.start) - 1
    found = []
    for part in ranges[max(first, 0) :]:
        if part.start >= stop:
            break
        found.append(part)
    return found


def write_manifest(folder: Path, manifest: Mapping[str, Any]) -> None:
    """Vouch for the files of a folder.

    Raises:
        ResourceError: the disk is full.
    """
    # Not indented: a range a line would be most of a large checkpoint's manifest.
    write_bytes(folder / MANIFEST, (json.dumps(manifest) + "\n").encode())


def _refuse(what: str, where: Path, key: str, found: str, kind: Mapping[str, Any]) -> None:
    raise ArtifactError(
        f"a checkpoint {what} of '{key}'",
        where=where,
        found=found,
        expected=f"elements 0:{math.prod(kind['shape'])} of shape {kind['shape']}, each once",
        fix="remove this checkpoint and run the same command again: the one before continues",
    )
