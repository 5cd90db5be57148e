"""What a person would want to be woken for: a run from rewards that is collapsing, or that is being cheated."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from statistics import fmean
from typing import Any

WINDOW = 8
LOST = 0.5  # of the best mean reward
FEW_SIGNALS = 0.25
JUMP, SHORTER = 0.3, 0.6


class Alarm:
    """Looks at every step's mean reward, the share of groups with any signal, and the mean length of answers."""

    def __init__(self, history: Iterable[Sequence[float]] = (), best: float = 0.0) -> None:
        """Anew, or with what `state` gave."""
        self._history: deque[Sequence[float]] = deque(history, maxlen=2 * WINDOW)
        self._best = best

    def state(self) -> dict[str, Any]:
        """What it remembers, as JSON."""
        return {"history": list(self._history), "best": self._best}

    def see(self, reward: float, signal_share: float, length: float) -> str | None:
        """Note a step; what is wrong, in words, or None.

        reward        mean of the step, in the reward's unit; signal_share: of the groups, those whose rewards differ
        length        mean sampled tokens of a sample
        """
        self._history.append((reward, signal_share, length))
        if len(self._history) < WINDOW:
            return None
        last = list(self._history)[-WINDOW:]
        now = fmean(row[0] for row in last)
        self._best = max(self._best, now)
        if fmean(row[1] for row in last) < FEW_SIGNALS and now < 0.9:
            share = fmean(row[1] for row in last)
            return (
                f"only {share:.0%} of the groups of the last {WINDOW} steps had rewards that differ: there is nearly "
                "nothing to learn from. Try easier tasks, a better start, a larger rl.group, or a lower learning rate"
            )
        if self._best > 0 and now < LOST * self._best:
            return (
                f"the mean reward of the last {WINDOW} steps, {now:.3f}, is below half of the best, {self._best:.3f}: "
                "the policy is collapsing. Go back to an earlier checkpoint with a lower learning rate"
            )
        return self._hacked(last)

    def _hacked(self, last: Sequence[Sequence[float]]) -> str | None:
        before = list(self._history)[:-WINDOW]
        if len(before) < WINDOW:
            return None
        (then, _, long), (now, _, short) = ((fmean(c) for c in zip(*rows, strict=True)) for rows in (before, last))
        if now - then > JUMP and short < SHORTER * long:
            return (
                f"the mean reward rose from {then:.2f} to {now:.2f} within {WINDOW} steps while answers became shorter "
                f"({long:.0f} to {short:.0f} tokens): read the best samples; the reward may be being cheated"
            )
        return None
