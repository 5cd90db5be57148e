"""Recipes for several ranks: float32, five packs a step, which no number of ranks divides."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.conftest import MakeTiny
from tests.shapes import LEAST

MakeRecipe = Callable[..., list[str]]
RECIPE = """
model: {model}
dtype: float32
device: cpu
data: {{path: {data}}}
max_length: 256
eval: {{split: 0.2, every: 10, answers: 1, answer_tokens: 2}}
train: {{steps: 6, tokens_per_step: 1280, tokens_per_pack: 256, learning_rate: 1.0e-3, save_every: 2, threads: 1}}
parallel: {{timeout: 60}}
"""
LORA = "adapter={rank: 2, targets: [attention, experts, router], dropout: 0.1}"


@pytest.fixture(scope="session")
def train_into(tiny: MakeTiny, tmp_path_factory: pytest.TempPathFactory) -> MakeRecipe:
    """`train_into(folder, *overrides)`: the arguments of `ossia` that train into that folder."""
    folder = tmp_path_factory.mktemp("ranks")
    answers = ["very " * (n % 5) + f"{n * n}." for n in range(60)]
    rows = [
        {"messages": [{"role": "user", "content": f"Say {n}."}, {"role": "assistant", "content": answer}]}
        for n, answer in enumerate(answers)
    ]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "r.yaml").write_text(RECIPE.format(model=tiny(LEAST), data=folder / "rows.jsonl"))

    def arguments(output: Path, *overrides: str, adapter: str | None = LORA) -> list[str]:
        keys = [f"output={output}", *([] if adapter is None else [adapter]), *overrides]
        return ["train", str(folder / "r.yaml"), *keys]

    return arguments
