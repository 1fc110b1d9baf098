"""What every source of samples offers to the shard writer."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from distpc.data.spec import DatasetSpec
from distpc.errors import DataError


class BadSampleError(Exception):
    """One sample cannot be decoded; the writer leaves it out if the budget allows.

    Args:
        name: the file or row concerned.
        reason: why, in a few words.
    """

    def __init__(self, name: str, reason: str) -> None:
        super().__init__(name, reason)
        self.name = name
        self.reason = reason


TrainingGroups = Callable[[int], np.ndarray]
"""From the number of groups to the numbers of those in the training split."""


class Source(ABC):
    """Samples with random access, as they are stored: no split, no colour space yet.

    Attributes:
        spec: of the samples; images in grey or RGB (color as_is).
        num_samples: all samples, published test samples included.
        num_published_test: how many at the end are the source's own test set.
        groups: (num_samples - num_published_test,) int; samples of one group (the chunks of a
            document) go into the same split. None: every sample is its own.
        group_name: what a group is called in errors.
    """

    spec: DatasetSpec
    num_samples: int
    num_published_test: int = 0
    groups: np.ndarray | None = None
    group_name: str = "samples"

    @abstractmethod
    def read(self, position: int) -> np.ndarray:
        """(V,) values of the sample at `position`, 0 .. num_samples - 1.

        Raises:
            BadSampleError: it cannot be decoded.
        """

    @abstractmethod
    def identity(self) -> dict[str, Any]:
        """JSON facts that change when the content does (names, sizes, digests)."""

    def facts(self) -> dict[str, Any]:
        """JSON facts for the report, such as what was ignored."""
        return {}

    def write_beside(self, folder: Path) -> None:  # noqa: B027 - most samples need no tables
        """Write what goes beside the shards, such as a tokenizer, into `folder`."""

    def close(self) -> None:  # noqa: B027 - most sources hold nothing open
        """Release what is held open."""


def existing(path: str, field: str) -> Path:
    """The path of a source, checked to exist.

    Raises:
        DataError: naming the config field.
    """
    found = Path(path).expanduser()
    if not found.exists():
        raise DataError(
            "the source does not exist",
            where=f"data.source.{field}",
            found=found,
            expected=f"a file or folder (relative paths start at {Path.cwd()})",
            fix="correct the path; public sets: tools/get_data.py NAME",
        )
    return found
