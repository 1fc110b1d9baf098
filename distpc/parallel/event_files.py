"""TensorBoard writers that continue the curves of an interrupted attempt."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter


def open_writer(folder: Path, first_step: int = 0) -> SummaryWriter:
    """A writer of event files in `folder`.

    Args:
        folder: of one training alone.
        first_step: what an earlier attempt logged from this step on is dropped; 0 drops nothing.
    """
    from torch.utils.tensorboard import SummaryWriter

    # Files are read in the order of their names, which begin with the second of their making:
    # two attempts in one second could be read in the wrong order, and the later one purged.
    newest = max(folder.glob("events.out.tfevents.*"), default=None)
    if newest is not None:
        made = int(newest.name.split(".")[3])
        time.sleep(max(0.0, made + 1 - time.time()))
    return SummaryWriter(str(folder), purge_step=first_step if first_step > 0 else None)
