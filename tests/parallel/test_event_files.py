import errno
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from distpc.errors import ResourceError, TrainingError
from distpc.parallel import event_files
from distpc.parallel.event_files import Curves, open_writer
from distpc.training.monitor import note_stop


def test_attempts_in_quick_succession_make_one_curve(tmp_path: Path) -> None:
    for attempt, first in enumerate((0, 4, 7)):
        writer = open_writer(tmp_path, first)
        for step in range(first, first + 5):
            writer.add_scalar("value", 100 * attempt + step, step)
        writer.close()
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    curve = [(event.step, event.value) for event in events.Scalars("value")]
    values = [0, 1, 2, 3, 104, 105, 106, *range(207, 212)]
    assert curve == list(enumerate(map(float, values)))


def test_a_full_disk_is_told_and_hides_no_other_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    curves = Curves(tmp_path)
    curves.close()
    monkeypatch.setattr(curves._writer, "close", full)
    with pytest.raises(ResourceError, match="no space"), curves:
        pass
    with pytest.raises(TrainingError, match="the cause"), curves:
        raise TrainingError("the cause")
    monkeypatch.setattr(event_files, "open_writer", full)
    note_stop(tmp_path, TrainingError("the cause"))
