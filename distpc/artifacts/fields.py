"""What a result depends on, with the names that the configuration has for it.

Fingerprints are of the values alone: calling a field otherwise redoes nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

ABSENT = object()
"""Value of a `Named` in a list that is left out there, but keeps its name, for comparisons with
results that have it."""


@dataclass(frozen=True)
class Named:
    """A value, or a section of values, of the configuration.

    Attributes:
        name: of the field or section.
        value: of JSON, in which other values may be named.
    """

    name: str
    value: Any


def plain(value: Any) -> Any:
    """`value` without the names in it."""
    if isinstance(value, Named):
        return plain(value.value)
    if isinstance(value, dict):
        return {key: plain(part) for key, part in value.items()}
    return [plain(part) for part in _there(value)] if isinstance(value, list | tuple) else value


def names_in(value: Any, path: str) -> dict[str, str]:
    """The names in `value`, by where they stand: `path`, `path[0]`, `path[1].key` ..."""
    if isinstance(value, Named):
        return {path: value.name, **names_in(value.value, path)}
    found: dict[str, str] = {}
    if isinstance(value, dict):
        for key, part in value.items():
            found |= names_in(part, f"{path}.{key}")
    elif isinstance(value, list | tuple):
        there = _there(value)
        # Of the places behind the last, the first that is left out is told of.
        left_out = [part for part in value if _is_absent(part)][:1]
        for number, part in enumerate([*there, *left_out]):
            found |= names_in(part, f"{path}[{number}]")
    return found


def _is_absent(value: Any) -> bool:
    return isinstance(value, Named) and value.value is ABSENT


def _there(values: Sequence[Any]) -> list[Any]:
    return [value for value in values if not _is_absent(value)]


def called(path: str, names: Mapping[str, str]) -> str:
    """What to call the value at `path`: by the innermost name around it."""
    around = [
        known for known in names if path == known or path.startswith((f"{known}.", f"{known}["))
    ]
    known = max(around, key=len, default=None)
    return path if known is None else names[known] + path[len(known) :]
