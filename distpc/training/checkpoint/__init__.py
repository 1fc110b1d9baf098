"""Checkpoints: written by every rank in shares, complete or absent, read on any number of ranks."""

from __future__ import annotations

from distpc.training.checkpoint.facts import TrainingFacts
from distpc.training.checkpoint.folder import Checkpoint, Checkpoints
from distpc.training.checkpoint.saver import Saver
from distpc.training.checkpoint.shard import Piece
from distpc.training.checkpoint.snapshot import (
    check_shapes,
    load_optimizer,
    take_snapshot,
)

__all__ = [
    "Checkpoint",
    "Checkpoints",
    "Piece",
    "Saver",
    "TrainingFacts",
    "check_shapes",
    "load_optimizer",
    "take_snapshot",
]
