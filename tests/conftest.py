"""What all tests share: one math thread, no process group left over, the repository's root."""

import os
import sys
from collections.abc import Iterator
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest


@pytest.fixture(autouse=True)
def no_process_group_left() -> Iterator[None]:
    """A test that opens a process group closes it, or the next one would join it."""
    yield
    if "torch.distributed" in sys.modules:
        distributed = sys.modules["torch.distributed"]
        left = distributed.is_available() and distributed.is_initialized()
        if left:
            distributed.destroy_process_group()
        assert not left, "this test left its process group open: call collectives.finish()"


@pytest.fixture(scope="session")
def repository() -> Path:
    """The root of the source tree."""
    return Path(__file__).parent.parent
