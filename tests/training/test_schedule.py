import pytest

from distpc.errors import ConfigError
from distpc.training.schedule import LinearSchedule, PiecewiseSchedule, WarmUp, make_schedule


def test_falls_linearly_with_samples() -> None:
    schedule = LinearSchedule(0.4, 0.1, 300)
    assert [round(schedule(n), 6) for n in (0, 100, 200, 300)] == [0.4, 0.3, 0.2, 0.1]


def test_stays_at_its_last_value() -> None:
    assert LinearSchedule(0.4, 0.1, 300)(1000) == 0.1
    assert LinearSchedule(0.4, 0.1, 0)(0) == 0.1


def test_piecewise_is_linear_between_milestones_and_constant_outside() -> None:
    # PyJuice's benchmarks: 0.9 -> 0.1 -> 0.05 at steps 0, 20k and 100k.
    schedule = PiecewiseSchedule([(0, 0.9), (20_000, 0.1), (100_000, 0.05)])
    found = [schedule(n) for n in (0, 10_000, 20_000, 60_000, 100_000, 10**6)]
    assert found == pytest.approx([0.9, 0.5, 0.1, 0.075, 0.05, 0.05])
    jump = PiecewiseSchedule([(10, 0.5), (20, 0.5), (20, 0.1)])
    assert [jump(n) for n in (0, 19, 20, 21)] == pytest.approx([0.5, 0.5, 0.1, 0.1])


def test_cosine_is_half_way_at_half_time() -> None:
    schedule = make_schedule("cosine", 0.5, 0.1, 100)
    assert [schedule(n) for n in (0, 50, 100, 200)] == pytest.approx([0.5, 0.3, 0.1, 0.1])
    assert schedule(25) == pytest.approx(0.1 + 0.4 * (1 + 0.5**0.5) / 2)


def test_warm_up_rises_to_the_schedule() -> None:
    schedule = make_schedule("constant", 0.4, 0.1, 100, warmup_samples=20)
    assert isinstance(schedule, WarmUp)
    assert [schedule(n) for n in (0, 10, 20, 90)] == pytest.approx([0.04, 0.22, 0.4, 0.4])


def test_refuses_what_is_no_schedule() -> None:
    with pytest.raises(ConfigError, match="no such schedule") as caught:
        make_schedule("quadratic", 0.4, 0.1, 100)
    assert caught.value.expected == "constant, linear, cosine, piecewise"
    for milestones in ([], [(10, 0.1), (5, 0.2)]):
        with pytest.raises(ConfigError, match="not in order"):
            make_schedule("piecewise", 0.4, 0.1, 100, milestones=milestones)
