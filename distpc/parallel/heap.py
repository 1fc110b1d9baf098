"""Settings of a process that does the same work over and over: keep memory, collect less.

A training step allocates and frees the same tensors every time. By default the C library returns
freed memory to the system and gets it back page by page, which here took a tenth to a quarter of a
step of a small circuit; and Python's collector walks again and again through modules that live
as long as the process.
"""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Iterator
from contextlib import contextmanager

M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD = -1, -2, -3
"""From glibc's malloc.h."""

KEPT_BYTES = 2**30
"""Freed memory that stays with the process."""

MMAP_BYTES = 2**25
"""Larger tensors are mapped and unmapped one by one; it is the most that glibc takes."""


@contextmanager
def steady() -> Iterator[None]:
    """Enter once all long-lived objects exist; harmless where the C library is another one.

    The C library goes on keeping memory afterwards.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        mallopt = None
    if mallopt is not None:
        mallopt(M_MMAP_THRESHOLD, MMAP_BYTES)
        mallopt(M_TRIM_THRESHOLD, KEPT_BYTES)
        mallopt(M_TOP_PAD, MMAP_BYTES)
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()
