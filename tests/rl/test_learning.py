"""A policy really learns from rewards, sorting six digits; and where it really loses what it had, the run says so."""

from __future__ import annotations

import json
from io import StringIO
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest

from ossia import grpo
from ossia.config import load_recipe
from ossia.demo.fixture import trained_fixture
from ossia.demo.prepare import Plan
from ossia.train.events import Sink
from ossia.train.sinks import TerminalSink
from tests.rl.test_grpo import Quiet

RECIPE = """
method: grpo
model: {model}
dtype: float32
weights: bf16
device: cpu
env: sort
max_length: 256
rl: {{prompts: {prompts}, group: 16, max_new: 80, eval_tasks: 0}}
eval: {{every: 0}}
train: {{steps: {steps}, learning_rate: {lr}, schedule: constant, warmup: 0, tokens_per_step: 4096, threads: 1}}
output: {output}
"""


COLLAPSE_STEPS = 60


@pytest.fixture(scope="session")
def start(pytestconfig: pytest.Config) -> Path:
    """The demo's model after a third of its fine-tuning: it sorts six digits about every other time."""
    return trained_fixture(pytestconfig.cache.mkdir("trained"), plan=Plan(steps=200, evaluations=1))


@pytest.fixture(scope="session")
def poor_start(pytestconfig: pytest.Config) -> Path:
    """Half as far: it sorts six digits about once in eleven times."""
    return trained_fixture(pytestconfig.cache.mkdir("trained"), plan=Plan(steps=115, evaluations=1))


def learn(folder: Path, sink: Sink, **values: object) -> list[dict[str, Any]]:
    """The steps of a run."""
    file = folder / "recipe.yaml"
    file.write_text(RECIPE.format(output=folder / "run", **values))
    grpo.run(load_recipe(file), sink=sink)
    events = [json.loads(line) for line in (folder / "run" / "events.jsonl").read_text().splitlines()]
    return [event for event in events if event["event"] == "step"]


@pytest.mark.slow
@pytest.mark.timeout(func_only=True)
def test_forty_steps_of_rewards_teach_to_sort_more_often(start: Path, tmp_path: Path) -> None:
    steps = learn(tmp_path, Quiet(), model=start, prompts=4, steps=40, lr=2.0e-4)
    rewards = [event["reward"] for event in steps]
    print([round(reward, 2) for reward in rewards])
    assert fmean(rewards[-8:]) - fmean(rewards[:4]) >= 0.15
    assert not any(event.get("alarm_kind") == "collapse" for event in steps)


@pytest.mark.slow
@pytest.mark.timeout(func_only=True)
def test_a_poor_start_with_a_high_rate_on_few_samples_collapses_and_the_run_says_so(
    poor_start: Path, tmp_path: Path
) -> None:
    said = StringIO()
    steps = learn(
        tmp_path, TerminalSink(COLLAPSE_STEPS, file=said), model=poor_start, prompts=2, steps=COLLAPSE_STEPS, lr=3.0e-4
    )  # fmt: skip
    print([round(event["reward"], 2) for event in steps])
    alarms = [event for event in steps if event.get("alarm_kind") == "collapse"]
    assert alarms
    words = alarms[0]["alarm"]
    assert "the policy is collapsing. Go back to an earlier checkpoint" in words
    assert f"step {alarms[0]['step']}: {words}" in said.getvalue()
    report = (tmp_path / "run" / "report.html").read_text()
    assert "<h2>Alarms</h2>" in report
    assert "the policy is collapsing" in report
