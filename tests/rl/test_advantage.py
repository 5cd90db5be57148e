"""Advantages against closed forms."""

from __future__ import annotations

import math

import pytest

from ossia.rl.advantage import SPREAD_EPS, group_advantages, overlong_penalty


def test_an_advantage_is_the_reward_less_the_mean_of_its_group() -> None:
    assert group_advantages([1.0, 0.0, 0.0, 0.0], divide_by_spread=False) == [0.75, -0.25, -0.25, -0.25]


def test_the_spread_is_that_of_a_sample() -> None:
    spread = math.sqrt((0.75**2 + 3 * 0.25**2) / 3)
    found = group_advantages([1.0, 0.0, 0.0, 0.0], divide_by_spread=True)
    assert found == pytest.approx([0.75 / (spread + SPREAD_EPS)] + 3 * [-0.25 / (spread + SPREAD_EPS)], rel=1e-12)


@pytest.mark.parametrize("reward", [0.1, 1 / 3, -2.7e8])
def test_equal_rewards_give_exact_zeros(reward: float) -> None:
    for divide in (False, True):
        assert group_advantages([reward] * 7, divide_by_spread=divide) == [0.0] * 7


def test_a_sample_without_a_reward_counts_for_nothing() -> None:
    assert group_advantages([1.0, None, 0.0], divide_by_spread=False) == [0.5, None, -0.5]


def test_one_reward_alone_has_no_baseline() -> None:
    assert group_advantages([1.0, None, None], divide_by_spread=False) == [None, None, None]


def test_overlong_answers_lose_up_to_one() -> None:
    found = [overlong_penalty(tokens, 100, 20) for tokens in (1, 80, 85, 90, 100, 120)]
    assert found == pytest.approx([0.0, 0.0, -0.25, -0.5, -1.0, -1.0])
    assert overlong_penalty(100, 100, 0) == 0.0
