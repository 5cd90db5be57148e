"""A policy really learns from rewards: forty steps of sorting six digits."""

from __future__ import annotations

import json
from pathlib import Path
from statistics import fmean

import pytest

from ossia import grpo
from ossia.config import load_recipe
from ossia.demo.fixture import trained_fixture
from ossia.demo.prepare import Plan
from tests.rl.test_grpo import Quiet

RECIPE = """
method: grpo
model: {model}
dtype: float32
weights: bf16
device: cpu
env: sort
max_length: 256
rl: {{prompts: 4, group: 16, max_new: 80, eval_tasks: 0}}
eval: {{every: 0}}
train: {{steps: 40, learning_rate: 2.0e-4, schedule: constant, warmup: 0, tokens_per_step: 4096, threads: 1}}
output: {output}
"""


@pytest.fixture(scope="session")
def start(pytestconfig: pytest.Config) -> Path:
    """The demo's model after a third of its fine-tuning: it sorts six digits about every other time."""
    return trained_fixture(pytestconfig.cache.mkdir("trained"), plan=Plan(steps=200, evaluations=1))


@pytest.mark.slow
@pytest.mark.timeout(func_only=True)
def test_forty_steps_of_rewards_teach_to_sort_more_often(start: Path, tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text(RECIPE.format(model=start, output=tmp_path / "run"))
    grpo.run(load_recipe(file), sink=Quiet())
    events = [json.loads(line) for line in (tmp_path / "run" / "events.jsonl").read_text().splitlines()]
    rewards = [event["reward"] for event in events if event["event"] == "step"]
    print([round(reward, 2) for reward in rewards])
    assert fmean(rewards[-8:]) - fmean(rewards[:4]) >= 0.15
