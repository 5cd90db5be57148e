"""A run from rewards of a tiny untrained checkpoint, as a recipe file."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from ossia.config import Recipe, load_recipe
from tests.conftest import MakeTiny
from tests.shapes import LEAST

REWARDS = Path(__file__).with_name("rewards.py")
RECIPE = """
method: grpo
model: {model}
dtype: {dtype}
device: cpu
adapter: {{rank: 2, targets: [attention, experts]}}
env: "{rewards}:{env}"
max_length: 256
rl: {{prompts: 3, group: 4, max_new: 24, eval_tasks: {held_out}, mask_truncated: false, loss: {loss}{more}}}
eval: {{every: 2}}
train: {{steps: {steps}, learning_rate: 1.0e-2, tokens_per_step: 512, tokens_per_pack: 256, save_every: 2, threads: 1}}
output: {output}
"""
RecipeFor = Callable[..., Path]


@pytest.fixture(scope="session")
def rewarded(tiny: MakeTiny) -> RecipeFor:
    """`rewarded(folder, env=..., loss=..., more=...)`: a recipe file that trains into that folder."""

    def make(
        output: Path,
        *,
        env: str = "Parity",
        loss: str = "dapo",
        more: str = "",
        steps: int = 4,
        dtype: str = "float32",
        held_out: int = 2,
    ) -> Path:
        file = output.with_suffix(".yaml")
        more = f", {more}" if more else ""
        values = {"env": env, "loss": loss, "more": more, "steps": steps, "dtype": dtype, "held_out": held_out}
        file.write_text(RECIPE.format(model=tiny(LEAST), rewards=REWARDS, output=output, **values))
        return file

    return make


@pytest.fixture
def recipe_of(rewarded: RecipeFor, tmp_path: Path) -> Callable[..., Recipe]:
    """The same as a recipe that was loaded."""
    return lambda **changes: load_recipe(rewarded(tmp_path / "run", **changes))
