"""How the ranks make one checkpoint together, through nothing but files in a shared folder.

Each rank leaves its shard and then a receipt for it; rank 0, once all receipts are there, writes
the manifest and renames the folder. No collective: it happens beside the training.
"""

from __future__ import annotations

import shutil
import threading
import time
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from distpc.artifacts.files import is_disk_full, no_space, read_json, write_json
from distpc.errors import ResourceError
from distpc.training.checkpoint.facts import TrainingFacts
from distpc.training.checkpoint.folder import Checkpoints, step_name
from distpc.training.checkpoint.manifest import FORMAT_VERSION, merge, write_manifest
from distpc.training.checkpoint.shard import Piece, write_shard

_POLL_SECONDS = 0.005


class Draft:
    """A checkpoint in the making.

    Args:
        checkpoints: where it will be one.
        facts: where training stands.
        attempt: the same on every rank and never used before, so that a folder which an earlier
            attempt left cannot be taken for this one's.
        num_shards: files that make it complete, one a rank.
    """

    def __init__(
        self, checkpoints: Checkpoints, facts: TrainingFacts, attempt: str, num_shards: int
    ) -> None:
        self.checkpoints = checkpoints
        self.facts = facts
        self.num_shards = num_shards
        self.path = checkpoints.folder / f".{step_name(facts.step)}.{attempt}"

    def write(self, number: int, pieces: Sequence[Piece]) -> None:
        """Write shard `number`, and the receipt for it.

        Raises:
            ResourceError: the disk is full.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            receipt = write_shard(self.path / _shard(number), pieces)
            write_json(self.path / _receipt(number), receipt)
        except OSError as error:
            if is_disk_full(error):
                raise no_space(self.path) from error
            raise

    def publish(self, cancelled: threading.Event) -> None:
        """Wait for all shards, then make this the checkpoint of its step; for one process alone.

        Args:
            cancelled: set, it ends the waiting, and nothing is published.

        Raises:
            ArtifactError: the shards do not make up the circuit.
            ResourceError: the disk is full; or cancelled, with which shards had been seen.
        """
        while missing := self._missing():
            if cancelled.is_set():
                raise self._incomplete(missing)
            time.sleep(_POLL_SECONDS)
        receipts = {
            _shard(number): read_json(self.path / _receipt(number))
            for number in range(self.num_shards)
        }
        manifest: dict[str, Any] = {
            "format_version": FORMAT_VERSION,
            "identity": self.checkpoints.identity,
            "facts": asdict(self.facts),
            **merge(receipts, self.path),
        }
        write_manifest(self.path, manifest)
        for number in range(self.num_shards):
            (self.path / _receipt(number)).unlink()
        self.checkpoints.adopt(self.path, self.facts.step)

    def remove(self) -> None:
        """Give the disk back what an attempt that failed has taken."""
        shutil.rmtree(self.path, ignore_errors=True)

    def _missing(self) -> list[int]:
        return [n for n in range(self.num_shards) if not (self.path / _receipt(n)).is_file()]

    def _incomplete(self, missing: list[int]) -> ResourceError:
        return ResourceError(
            "a checkpoint was not finished: shards of other ranks cannot be seen from rank 0",
            where=self.path,
            found=f"{self.num_shards - len(missing)} of {self.num_shards} shards; "
            f"none of rank {', '.join(map(str, missing))}",
            expected="a folder that all hosts share",
            fix="put the run's folder (--out) on a disk that every host mounts at the same path",
        )


def _shard(number: int) -> str:
    return f"shard-{number:05d}.safetensors"


def _receipt(number: int) -> str:
    return f"receipt-{number:05d}.json"
