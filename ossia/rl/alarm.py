"""What a person would want to be woken for: a run from rewards that is collapsing, or that is being cheated.

Rewards have no scale of their own, so each is looked at within the lowest and highest that the run has seen.
"""

from __future__ import annotations

import math
from collections import Counter, deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import Any, Literal

WINDOW = 8
LOST = 0.5  # of what the best mean was above the lowest reward
ERRORS = 1.5  # standard errors that a loss has to have, so that few samples a step don't make one by chance
STUCK = 0.75  # of the groups
JUMP, SHORTER = 0.3, 0.6
FAILED = 0.25  # of a step's samples


@dataclass(frozen=True, slots=True)
class Warned:
    """What is wrong.

    kind   collapse, stuck (hardly a group has a signal), cheat (a jump with shorter answers), or failing (many samples
           got no reward)
    words  what was seen, and what to do
    """

    kind: Literal["collapse", "stuck", "cheat", "failing"]
    words: str


def failing(failures: Sequence[str], num_samples: int) -> Warned | None:
    """Whether the environment failed at more of a step's samples than can be overlooked: a mistake in the reward.

    failures  why, of each sample that got no reward
    """
    if len(failures) <= FAILED * num_samples:
        return None
    why, times = Counter(failures).most_common(1)[0]
    return Warned(
        "failing",
        f"{len(failures)} of {num_samples} samples got no reward and teach nothing; {times} of them: {why}",
    )


class Alarm:
    """Looks at every step's rewards, group by group, and at the mean length of answers."""

    def __init__(
        self,
        history: Iterable[Sequence[float]] = (),
        best: Sequence[float] | None = None,
        seen: Sequence[float] | None = None,
    ) -> None:
        """Anew, or with what `state` gave."""
        self._history: deque[Sequence[float]] = deque(history, maxlen=2 * WINDOW)
        # the best mean of a window with its standard error; the lowest and highest reward of a sample
        self._best, self._seen = best, seen

    def state(self) -> dict[str, Any]:
        """What it remembers, as JSON."""
        return {"history": list(self._history), "best": self._best, "seen": self._seen}

    def see(self, rewards: Sequence[Sequence[float]], length: float) -> Warned | None:
        """Note a step; what is wrong, or None.

        rewards  of each group's samples, in the reward's unit; a group may be empty
        length   mean sampled tokens of a sample
        """
        groups = [group for group in rewards if group]
        if not groups:
            return None
        low, high = min(map(min, groups)), max(map(max, groups))
        low, high = (low, high) if self._seen is None else (min(low, self._seen[0]), max(high, self._seen[1]))
        self._seen = (low, high)
        # a group that got the highest reward there is throughout is solved, not stuck
        stuck = fmean(min(group) == max(group) and (max(group) < high or low == high) for group in groups)
        self._history.append((fmean(x for group in groups for x in group), stuck, length))
        if len(self._history) < WINDOW:
            return None
        last = list(self._history)[-WINDOW:]
        return self._collapsed(last, low) or self._stuck(last) or self._hacked(last, JUMP * (high - low))

    def _collapsed(self, last: Sequence[Sequence[float]], low: float) -> Warned | None:
        means = [row[0] for row in last]
        now, error = fmean(means), stdev(means) / math.sqrt(WINDOW)
        if self._best is None or now > self._best[0]:
            self._best = (now, error)
        best, its_error = self._best
        lost = best - now
        if lost <= LOST * (best - low) or lost < ERRORS * math.hypot(error, its_error):
            return None
        return Warned(
            "collapse",
            f"the mean reward of the last {WINDOW} steps is {now:.3g}, after {best:.3g}: the policy is collapsing. Go "
            "back to an earlier checkpoint, with a lower learning rate or more samples a step (rl.prompts, rl.group)",
        )

    def _stuck(self, last: Sequence[Sequence[float]]) -> Warned | None:
        share = fmean(row[1] for row in last)
        if share <= STUCK:
            return None
        return Warned(
            "stuck",
            f"{share:.0%} of the groups of the last {WINDOW} steps had equal rewards, and not the highest: there is "
            "nearly nothing to learn from. Try easier tasks, a better start, a larger rl.group, or a lower learning "
            "rate",
        )

    def _hacked(self, last: Sequence[Sequence[float]], jump: float) -> Warned | None:
        before = list(self._history)[:-WINDOW]
        if len(before) < WINDOW:
            return None
        (then, _, long), (now, _, short) = ((fmean(c) for c in zip(*rows, strict=True)) for rows in (before, last))
        if now - then <= jump or short >= SHORTER * long:
            return None
        return Warned(
            "cheat",
            f"the mean reward rose from {then:.3g} to {now:.3g} within {WINDOW} steps while answers became shorter "
            f"({long:.0f} to {short:.0f} tokens): read the best samples; the reward may be being cheated",
        )
