"""Credit assignment: the rewards of a sampled group -> one advantage per sample.

Own code because it is short and every RL bug hides here. Oracle: closed forms, and TRL, in the tests.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import fmean

SPREAD_EPS = 1e-4  # as in TRL, so that a group whose rewards differ by a rounding doesn't explode


def group_advantages(rewards_G: Sequence[float | None], *, divide_by_spread: bool) -> list[float | None]:
    """Each sample's reward minus the mean of its group.

    rewards_G         finite, in the reward's own unit; None: this sample has none (its reward failed) and counts for
                      nothing
    divide_by_spread  by the sample standard deviation + 1e-4; the unit is gone then
    Returns           as many; None where there was no reward, and everywhere if fewer than two had one: no baseline.
                      Equal rewards give exact zeros
    Source            GRPO, arXiv:2402.03300; without division by the spread: Dr. GRPO, arXiv:2503.20783
    """
    known = [reward for reward in rewards_G if reward is not None]
    assert all(map(math.isfinite, known)), known
    if len(known) < 2:
        return [None] * len(rewards_G)
    if min(known) == max(known):  # the mean of equal numbers may differ from them by a rounding
        return [None if reward is None else 0.0 for reward in rewards_G]
    mean = fmean(known)
    scale = 1.0
    if divide_by_spread:
        scale = 1.0 / (math.sqrt(math.fsum((x - mean) ** 2 for x in known) / (len(known) - 1)) + SPREAD_EPS)
    return [None if reward is None else (reward - mean) * scale for reward in rewards_G]


def overlong_penalty(num_tokens: int, max_new: int, last: int) -> float:
    """What an answer's length costs: 0 up to max_new - last tokens, from there in a straight line to -1 at max_new.

    last     tokens over which it falls; 0: it never does
    Source   DAPO, arXiv:2503.14476, equation 13
    """
    over = num_tokens - (max_new - last)
    return 0.0 if last == 0 or over <= 0 else -min(1.0, over / last)
