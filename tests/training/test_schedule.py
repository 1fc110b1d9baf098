from distpc.training.schedule import LinearSchedule


def test_falls_linearly_with_samples() -> None:
    schedule = LinearSchedule(0.4, 0.1, 300)
    assert [round(schedule(n), 6) for n in (0, 100, 200, 300)] == [0.4, 0.3, 0.2, 0.1]


def test_stays_at_its_last_value() -> None:
    assert LinearSchedule(0.4, 0.1, 300)(1000) == 0.1
    assert LinearSchedule(0.4, 0.1, 0)(0) == 0.1
