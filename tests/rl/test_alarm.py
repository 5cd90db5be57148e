"""The alarm of runs from rewards."""

from __future__ import annotations

import pytest

from ossia.rl.alarm import Alarm, failing

Step = tuple[list[list[float]], float]


def step(mean: float, *, equal: int = 0, length: float = 50.0, low: float = 0.0, high: float = 1.0) -> Step:
    """Ten groups of ten samples that get `low` or `high`, `mean` of them high; `equal` groups get low throughout."""
    right = round(10 * mean)
    mixed = [high] * right + [low] * (10 - right)
    return [[low] * 10] * equal + [mixed] * (10 - equal), length


def told(steps: list[Step]) -> str:
    alarm = Alarm()
    return " ".join(f"{warned.kind}: {warned.words}" for one in steps if (warned := alarm.see(*one)) is not None)


def test_a_run_that_learns_raises_none() -> None:
    assert told([step(0.1 + 0.02 * number) for number in range(40)]) == ""


def test_a_run_that_has_learnt_everything_raises_none() -> None:
    assert told([step(0.5)] * 4 + [step(1.0)] * 20) == ""


@pytest.mark.parametrize(("low", "high"), [(0.0, 1.0), (-5.0, -1.0), (100.0, 300.0)])
def test_a_collapse_is_told_on_any_scale(low: float, high: float) -> None:
    found = told([step(0.5, low=low, high=high)] * 10 + [step(0.1, low=low, high=high)] * 10)
    assert "collapsing" in found
    assert "lower learning rate" in found
    assert "stuck" not in found
    assert told([step(0.5, low=low, high=high)] * 10 + [step(0.4, low=low, high=high)] * 10) == ""


def test_a_collapse_to_nothing_is_called_one_although_nothing_is_left_to_learn_from() -> None:
    assert Alarm(best=(0.2, 0.01), seen=(0.0, 1.0), history=[(0.0, 1.0, 50.0)] * 8).see(*step(0.0)).kind == "collapse"


def test_a_mean_that_falls_by_chance_is_no_collapse() -> None:
    lucky = [step(0.1)] + [step(0.0)] * 14 + [step(0.1)] * 2
    assert "collapsing" not in told(lucky)


def test_too_few_groups_with_a_signal_are_told() -> None:
    assert "nothing to learn from" in told([step(0.2, equal=8)] * 10)
    assert told([step(0.2, equal=6)] * 10) == ""


def test_rewards_that_never_differ_are_told() -> None:
    assert "nothing to learn from" in told([step(0.0)] * 8)


def test_a_jump_with_shorter_answers_is_told() -> None:
    assert "may be being cheated" in told([step(0.2, length=100.0)] * 8 + [step(0.9, length=20.0)] * 8)
    assert told([step(0.2, length=100.0)] * 8 + [step(0.9, length=90.0)] * 8) == ""


def test_what_it_remembers_goes_on() -> None:
    whole, first = Alarm(), Alarm()
    steps = [step(0.4)] * 10 + [step(0.1)] * 8
    for one in steps[:12]:
        whole.see(*one)
        first.see(*one)
    second = Alarm(**first.state())
    assert [second.see(*one) for one in steps[12:]] == [whole.see(*one) for one in steps[12:]]


def test_rewards_that_fail_are_told_once_they_are_too_many_to_overlook() -> None:
    assert failing(["a"] * 4, 16) is None
    warned = failing(["a", "b", "b", "c", "b"], 16)
    assert warned is not None
    assert warned.kind == "failing"
    assert "5 of 16 samples" in warned.words
    assert "3 of them: b" in warned.words
