"""Settings of a process that repeats its work."""

from __future__ import annotations

import gc
import resource

import torch

from distpc.parallel.heap import steady


def _faults_of(repeats: int) -> int:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(repeats):
        torch.ones(2**19)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


def test_freed_memory_is_used_again_without_the_system() -> None:
    with steady():
        # The C library finds a place that stays only after some of them: up to seven were seen.
        _faults_of(20)
        # 2 MiB are 512 pages; without the setting every repeat may fault them in anew.
        assert _faults_of(20) < 512


def test_long_lived_objects_are_left_alone_inside_only() -> None:
    before = gc.get_freeze_count()
    with steady():
        assert gc.get_freeze_count() > before
    assert gc.get_freeze_count() == 0
