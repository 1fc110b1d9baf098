from pathlib import Path

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from distpc.parallel.event_files import open_writer


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
