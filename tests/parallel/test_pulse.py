"""A rank's signs of life keep nothing of the rank alive."""

import gc
import time
import weakref
from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist

from distpc.parallel.pulse import Pulse

INTERVAL = 0.02


@pytest.fixture
def uncollected() -> Iterator[None]:
    """Python's collector of cycles stands still."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


@pytest.mark.usefixtures("uncollected")
def test_what_a_function_held_goes_with_it() -> None:
    def hold() -> weakref.ref[torch.Tensor]:
        held = torch.ones(10)
        # Looked at several times while the tensor is among this frame's variables.
        time.sleep(5 * INTERVAL)
        return weakref.ref(held)

    store = dist.HashStore()
    with Pulse(store, 0, lost_seconds=8 * INTERVAL):
        held = hold()
        assert store.check(["pulse/0"])
    assert held() is None
