"""`distpc index --check`: whether shards and finished stages are what they were when finished."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from distpc.artifacts.catalogue import Entry, check, entries, read
from distpc.artifacts.manifest import MANIFEST
from distpc.artifacts.place import Place
from distpc.config import load_config
from distpc.data.existing import SUFFIX
from distpc.data.index import INDEX, ShardEntry, ShardIndex
from distpc.errors import ArtifactError, ConfigError, DataError, DistpcError
from distpc.parallel.progress import Progress
from distpc.pipeline.runner import RESOLVED, Pipeline

_CHANGED = "a shard has changed since it was indexed"


def check_command(
    target: Path | str, overrides: Sequence[str] = (), out: Path | None = None
) -> None:
    """Check everything of a run or at a place, and name every file that is not as it was.

    Args:
        target: a run's config file or folder; or a place of published stages, folder or URL.
        overrides: of the config.
        out: the run's folder, if the config's name does not tell.

    Raises:
        ArtifactError: something does not hold; the files have been named on stderr.
        ConfigError: there is nothing at `target`.
    """
    num_bad = 0
    for error in _errors(target, overrides, out):
        num_bad += 1
        print(f"[distpc] BAD: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
    if num_bad:
        raise ArtifactError(
            f"{num_bad} checks failed, each named above",
            where=target,
            fix="remove the folders of the stages named and run again: they and what depends on "
            "them are redone",
        )
    print(f"all of {target} holds")


def _errors(
    target: Path | str, overrides: Sequence[str], out: Path | None
) -> Iterator[DistpcError]:
    path = Path(target)
    if "://" not in str(target) and path.is_file():
        config = load_config(path, overrides)
        yield from check_run(Pipeline(config, out or Path("runs") / config.name))
    elif "://" not in str(target) and (path / RESOLVED).is_file():
        yield from check_run(Pipeline(load_config(path / RESOLVED, overrides), path))
    else:
        yield from check_place(Place.of(target))


def check_run(pipeline: Pipeline) -> Iterator[DistpcError]:
    """Yield an error for every file of a run's shards and finished stages that does not hold.

    Stages without a manifest are said to be missing, which is no error.
    """
    num_found = 0
    for step in pipeline.steps():
        name = step.stage.name
        if not (step.folder / MANIFEST).is_file():
            _say(f"{name}: {step.state}, nothing to check")
            continue
        num_found += 1
        entry = read(Place.of(step.folder))
        bad = list(check(entry))
        if entry.artifact.fingerprint != step.fingerprint:
            why = step.differs(entry.artifact.made_from)
            bad.append(
                ArtifactError(
                    "a stage's result belongs to another config or other inputs",
                    where=step.folder / MANIFEST,
                    found=f"fingerprint {entry.artifact.fingerprint}; {why}",
                    expected=f"fingerprint {step.fingerprint}",
                )
            )
        _say(f"{name}: {len(entry.artifact.files)} files, {len(bad)} bad")
        yield from bad
    if not num_found:
        raise ConfigError("no stage has finished yet", where=pipeline.folder)
    if (pipeline.folder / "index" / INDEX).is_file():
        yield from check_shards(ShardIndex.load(pipeline.folder / "index"))


def check_shards(index: ShardIndex) -> Iterator[DistpcError]:
    """Yield an error for every shard that is not the one that was indexed."""
    bad = 0
    with Progress("shards against the index", len(index.entries), "shards") as progress:
        for entry in index.entries:
            error = _shard_error(entry)
            if error is not None:
                bad += 1
                yield error
            progress.advance()
    _say(f"shards against the index: {len(index.entries)} shards, {bad} bad")


def _shard_error(entry: ShardEntry) -> DistpcError | None:
    try:
        found = entry.place.digest(f"{entry.name}{SUFFIX}")
    except DistpcError as error:
        return error
    if found == entry.sha256:
        return None
    return DataError(
        _CHANGED,
        where=entry.where,
        found=f"SHA-256 {found}",
        expected=f"SHA-256 {entry.sha256}",
    )


def check_place(place: Place) -> Iterator[DistpcError]:
    """Yield an error for every file of the finished stages at a place that does not hold, and for
    every shard there that is not the one in its index."""
    found = list(entries(place))
    for entry in found:
        bad = list(check(entry))
        name = f"{entry.artifact.stage} {entry.artifact.fingerprint}"
        _say(f"{name}: {len(entry.artifact.files)} files, {len(bad)} bad")
        yield from bad
    if not found:
        raise ConfigError(
            "nothing to check",
            where=place,
            expected="a config file, a run folder, or a place of published stages",
        )
    for entry in found:
        if entry.artifact.stage == "index":
            yield from _check_indexed(entry, found)


def _check_indexed(index: Entry, found: Sequence[Entry]) -> Iterator[DistpcError]:
    """Yield an error for every shard of a published index that is missing or another one."""
    name = f"shards against index {index.artifact.fingerprint}"
    made_of = (index.artifact.made_from or {}).get("inputs", {}).get("shards")
    of_stage = [entry for entry in found if entry.artifact.stage == "shards"]
    shards = next((one for one in of_stage if one.artifact.fingerprint == made_of), None)
    if shards is None:
        _say(f"{name}: the shards are not at this place, not compared")
        return
    try:
        described = json.loads(index.place.read(INDEX))["shards"]
    except (DistpcError, ValueError, KeyError, TypeError):
        _say(f"{name}: the index cannot be read, not compared")
        return
    elsewhere = shards.artifact.metadata.get("source", {}).get("shards")
    bad = []
    for shard in described:
        if elsewhere is not None:
            entry = ShardEntry(**shard, place=Place.of(elsewhere), table_path=Path())
            error = _shard_error(entry)
        else:
            error = _recorded_error(shards, f"{shard['name']}{SUFFIX}", shard["sha256"])
        bad += [] if error is None else [error]
    _say(f"{name}: {len(described)} shards, {len(bad)} bad")
    yield from bad


def _recorded_error(shards: Entry, file: str, indexed: str) -> DistpcError | None:
    """The error of a shard whose content has been compared with its own stage's manifest."""
    recorded = shards.artifact.sha256.get(file)
    if recorded == indexed:
        return None
    return DataError(
        "a shard of the index is missing" if recorded is None else _CHANGED,
        where=shards.place.at(file),
        found="no such shard in the manifest beside it"
        if recorded is None
        else f"SHA-256 {recorded}, by the manifest beside it",
        expected=f"SHA-256 {indexed}",
    )


def _say(text: str) -> None:
    print(f"[distpc] {text}", file=sys.stderr, flush=True)
