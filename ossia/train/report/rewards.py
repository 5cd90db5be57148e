"""What the report of a run from rewards shows beside that of fine-tuning: its curves and its samples."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby
from typing import Any

from ossia.train.report.chart import Series, chart_html

_SHOWN = 4  # samples of each kind
_APART = 8  # steps without an alarm, after which the same one is another
Event = Mapping[str, Any]
Record = Mapping[str, Any]


def is_rewarded(steps: Sequence[Event]) -> bool:
    """Whether these are the steps of a run from rewards."""
    return any("answer_tokens" in event for event in steps[:1])


def reward_charts(steps: Sequence[Event], evals: Sequence[Event]) -> list[str]:
    """Reward, its parts, and what tells whether learning is sound."""

    def points(key: str, events: Iterable[Event] = steps) -> list[tuple[int, float]]:
        return [(e["step"], e[key]) for e in events if key in e]

    parts = sorted({key for event in steps for key in event if key.startswith("part_")})
    rewards = [
        Series("sampled", points("reward")),
        Series("held-out, greedy", points("eval_reward", evals), sparse=True),
    ]
    charts = [
        ("Reward", "mean of a step's samples", rewards),
        *(("Part of it: " + key.removeprefix("part_"), "mean", [Series(key, points(key))]) for key in parts),
        ("Length of answers", "sampled tokens", [Series("tokens", points("answer_tokens"))]),
        ("Entropy", "nats a token, from the sampled ones", [Series("entropy", points("entropy"))]),
        ("Sampler against trainer", "log10 of nats a token", [Series("divergence", in_powers(points("mismatch")))]),
        ("From the reference policy", "nats a token", [Series("divergence", points("kl"))]),
        ("Clipped", "share of the sampled tokens", [Series("share", points("clip_share"))]),
        ("Sampling speed", "tokens/s", [Series("tokens/s", points("sampled_per_s"))]),
    ]
    known = [chart for chart in charts if any(one.points for one in chart[2])]
    return [chart_html(name, unit, series, from_zero="log10" not in unit) for name, unit, series in known]


def alarms(steps: Iterable[Event]) -> dict[str, str]:
    """What the run warned of: from when to when, and what it said last."""
    found: list[tuple[str, int, int, str]] = []
    for event in steps:
        if "alarm" not in event:
            continue
        kind, step, words = event["alarm_kind"], event["step"], event["alarm"]
        before = next((at for at in reversed(range(len(found))) if found[at][0] == kind), None)
        if before is not None and step - found[before][2] <= _APART:
            found[before] = (kind, found[before][1], step, words)
        else:
            found.append((kind, step, step, words))
    return {
        f"{kind}, {f'step {first:,}' if first == last else f'steps {first:,} to {last:,}'}": words
        for kind, first, last, words in found
    }


def in_powers(points: Sequence[tuple[int, float]]) -> list[tuple[int, float]]:
    """Points whose values go over many sizes, as powers of ten; nothing at all counts as 1e-16."""
    return [(step, math.log10(max(value, 1e-16))) for step, value in points]


class Kept:
    """Of the lines of a samples.jsonl those that a report may show: few, however long the run was."""

    def __init__(self) -> None:
        self._others: list[Record] = []
        self._last_step: list[Record] = []
        self._evals: dict[str, list[Record]] = {}

    def add(self, record: Record) -> None:
        """Take the next line."""
        split = record.get("split")
        if split == "train":
            if self._last_step and self._last_step[0]["step"] != record["step"]:
                self._last_step = []
            self._last_step.append(record)
        elif split == "eval":
            mine = self._evals.setdefault(str(record["task"]), [])
            mine[1:] = [record] if mine else []
            if not mine:
                mine.append(record)
        else:
            self._others.append(record)

    def sections(self) -> list[tuple[str, list[Record]]]:
        """Headings and what stands under them, in order."""
        judged = sorted((r for r in self._last_step if r["reward"] is not None), key=lambda r: -r["reward"])
        changed = sorted(self._evals.values(), key=_change, reverse=True)
        return [
            ("Samples", self._others),
            ("Most changed of the held-out tasks", [record for pair in changed[:_SHOWN] for record in pair]),
            ("Best of the last step", _different(judged)),
            ("Worst of the last step", _different(judged[::-1])),
            ("Failed in the last step", [r for r in self._last_step if r["reward"] is None][:_SHOWN]),
        ]


def _change(records: Sequence[Record]) -> float:
    first, last = records[0]["reward"] or 0.0, records[-1]["reward"] or 0.0
    return abs(last - first)


def _different(records: Sequence[Record]) -> list[Record]:
    """The first few, one a task."""
    found: dict[str, Record] = {}
    for task, mine in groupby(records, key=lambda record: str(record["task"])):
        found.setdefault(task, next(mine))
    return list(found.values())[:_SHOWN]
