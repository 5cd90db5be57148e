"""Real fine-tuning to be ended in the middle: a tiny gpt-oss checkpoint, LoRA with dropout, conversations in a file."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from ossia import sft
from ossia.config import load_recipe
from tests.conftest import MakeTiny
from tests.shapes import LEAST
from tests.train.small_run import Death, forkserver

RecipeFor = Callable[[Path], Path]
Outcome = tuple[dict[str, bytes], list[dict[str, Any]]]
TIMED = {"tokens_per_s", "step_s", "eval_s", "peak_bytes", "rank_peak_bytes"}
RECIPE = """
model: {model}
dtype: bfloat16
device: cpu
adapter: {{rank: 2, targets: [attention, experts], dropout: 0.1}}
data: {{path: {data}}}
max_length: 256
eval: {{split: 0.2, every: 3}}
train: {{steps: 6, tokens_per_step: 512, tokens_per_pack: 256, learning_rate: 1.0e-3, save_every: 2, threads: 1}}
output: {output}
"""


@pytest.fixture(scope="session")
def recipe_for(tiny: MakeTiny, tmp_path_factory: pytest.TempPathFactory) -> RecipeFor:
    """`recipe_for(folder)`: a recipe file that trains into that folder, the same model and data each time."""
    folder = tmp_path_factory.mktemp("kill")
    rows = [
        {"messages": [{"role": "user", "content": f"Say {n}."}, {"role": "assistant", "content": f"It is {n * n}."}]}
        for n in range(60)
    ]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def make(output: Path) -> Path:
        file = output.with_suffix(".yaml")
        file.write_text(RECIPE.format(model=tiny(LEAST), data=folder / "rows.jsonl", output=output))
        return file

    return make


def fine_tune(recipe: Path, kind: str, number: int, resume: bool) -> None:
    torch.set_num_threads(1)
    with Death(kind, number).lurking():
        sft.run(load_recipe(recipe), resume=resume)


def in_process(recipe: Path, kind: str = "", number: int = 0, resume: bool = False) -> int | None:
    """The exit code of fine-tuning in a process of its own that may be killed at a chosen place."""
    process = forkserver().Process(target=fine_tune, args=(recipe, kind, number, resume))
    process.start()
    process.join()
    return process.exitcode


def outcome(run: Path) -> Outcome:
    """The bytes of the adapter or model and of every checkpoint's tensors, data position and generators; untimed
    events."""
    kept = ("adapter_model.safetensors", "model.safetensors", "trainable.safetensors", "optimizer.safetensors")
    found = (f for f in run.rglob("*") if f.name in kept or f.suffix == ".distcp")
    files = {str(f.relative_to(run)): f.read_bytes() for f in found}
    for file in run.glob("checkpoints/*/state.json"):
        state = json.loads(file.read_text())
        del state["progress"]["events_bytes"]  # the length of the timings differs
        files[str(file.relative_to(run))] = json.dumps(state).encode()
    events = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
    return files, [{key: value for key, value in event.items() if key not in TIMED} for event in events]


@pytest.fixture(scope="session")
def untouched(recipe_for: RecipeFor, tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    run = tmp_path_factory.mktemp("untouched") / "run"
    assert in_process(recipe_for(run)) == 0
    files, events = outcome(run)
    assert len(files) == 7  # the adapter, and three of each of two checkpoints
    assert [event["step"] for event in events if event["event"] == "step"] == [1, 2, 3, 4, 5, 6]
    return files, events
