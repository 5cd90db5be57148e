"""The alarm of runs from rewards."""

from __future__ import annotations

from ossia.rl.alarm import Alarm


def told(rows: list[tuple[float, float, float]]) -> str:
    alarm = Alarm()
    return " ".join(filter(None, (alarm.see(*row) for row in rows)))


def test_a_run_that_learns_raises_none() -> None:
    assert told([(0.1 + 0.02 * step, 0.8, 50.0) for step in range(40)]) == ""


def test_a_run_that_has_learnt_everything_raises_none() -> None:
    assert told([(0.99, 0.05, 50.0)] * 20) == ""


def test_a_collapse_is_told() -> None:
    assert "collapsing" in told([(0.4, 0.8, 50.0)] * 10 + [(0.1, 0.6, 50.0)] * 10)


def test_too_few_groups_with_a_signal_are_told() -> None:
    assert "nothing to learn from" in told([(0.02, 0.1, 50.0)] * 10)


def test_a_jump_with_shorter_answers_is_told() -> None:
    assert "may be being cheated" in told([(0.2, 0.8, 100.0)] * 8 + [(0.9, 0.5, 20.0)] * 8)


def test_what_it_remembers_goes_on() -> None:
    whole, first = Alarm(), Alarm()
    rows = [(0.4, 0.8, 50.0)] * 10 + [(0.1, 0.6, 50.0)] * 8
    for row in rows[:12]:
        whole.see(*row)
        first.see(*row)
    second = Alarm(**first.state())
    assert [second.see(*row) for row in rows[12:]] == [whole.see(*row) for row in rows[12:]]
