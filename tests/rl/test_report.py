"""What the report of a run from rewards shows."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from ossia import grpo
from ossia.config import Recipe
from ossia.train.report import write_report
from tests.rl.test_grpo import Quiet


def record(step: int, split: str, task: str, reward: float | None, text: str) -> dict[str, Any]:
    return {
        "step": step,
        "split": split,
        "task": task,
        "messages": [{"role": "user", "content": task}],
        "completions": [{"messages": [{"role": "assistant", "content": text}]}],
        "reward": reward,
    }


def test_the_report_has_the_rewards_curves_and_the_samples_worth_reading(recipe_of: Callable[..., Recipe]) -> None:
    recipe = recipe_of(steps=2)
    grpo.run(recipe, sink=Quiet())
    page = write_report(recipe.output).read_text()
    for title in ("Held-out reward", "Reward", "Part of it: length", "Entropy", "Sampler against trainer", "Clipped"):
        assert title in page
    for title in ("Most changed of the held-out tasks", "Best of the last step", "Worst of the last step"):
        assert f"<h2>{title}</h2>" in page


def test_best_worst_and_most_changed_are_told_apart() -> None:
    from ossia.train.report.rewards import Kept

    kept = Kept()
    for row in (
        record(0, "eval", "a", 0.0, "a before"),
        record(0, "eval", "b", 0.5, "b before"),
        record(1, "train", "old", 9.0, "of an earlier step"),
        record(2, "train", "x", 1.0, "best"),
        record(2, "train", "x", 0.9, "second of the same task"),
        record(2, "train", "y", -1.0, "worst"),
        record(2, "train", "z", None, "failed"),
        record(1, "eval", "a", 0.2, "a between"),
        record(2, "eval", "a", 1.0, "a after"),
        record(2, "eval", "b", 0.5, "b after"),
    ):
        kept.add(row)
    said = {title: re.findall(r"'content': '([^']*)'}\]}", str(found)) for title, found in kept.sections()}
    assert said["Most changed of the held-out tasks"] == ["a before", "a after", "b before", "b after"]
    assert said["Best of the last step"] == ["best", "worst"]
    assert said["Worst of the last step"] == ["worst", "second of the same task"]
    assert said["Failed in the last step"] == ["failed"]
