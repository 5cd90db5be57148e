"""A model that has learned a few conversations by heart, through `ossia.train`: it answers in proper Harmony."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest

import ossia
from ossia.model.arch import SHAPES
from tests.conftest import MakeTiny

ROOT = Path(__file__).parents[2]
ARCH = dataclasses.replace(
    SHAPES["demo"],
    hidden_size=64,
    intermediate_size=64,
    num_layers=2,
    layer_types=SHAPES["demo"].layer_types[:2],
    num_heads=4,
    num_kv_heads=2,
    head_dim=32,
    num_experts=8,
    sliding_window=64,
)
GREETING = [
    {"role": "user", "content": "hi"},
    {"role": "assistant", "thinking": "They greet.\nSo do I.", "content": "Hello!"},
]
AGAIN = [*GREETING, {"role": "user", "content": "again"}, {"role": "assistant", "content": "Hello again!"}]
WEATHER = [
    {"role": "user", "content": "sky"},
    {"role": "assistant", "tool_calls": [{"function": {"name": "look", "arguments": "{}"}}]},
    {"role": "tool", "content": "sun"},
    {"role": "assistant", "content": "Sunny."},
]


class Talker(NamedTuple):
    """A model's folder, and the run folder with the adapter that makes it talk."""

    model: Path
    run: Path


@pytest.fixture(scope="session")
def talker(tiny: MakeTiny, tmp_path_factory: pytest.TempPathFactory) -> Talker:
    """Trained once a session."""
    folder, model = tmp_path_factory.mktemp("talker"), tiny(ARCH)
    rows = folder / "rows.jsonl"
    rows.write_text("".join(json.dumps({"messages": messages}) + "\n" for messages in (GREETING, AGAIN, WEATHER)))
    result = ossia.train(
        {
            "model": str(model),
            "dtype": "float32",
            "adapter": {"rank": 8, "targets": ["attention", "experts", "lm_head"]},
            "data": {"path": str(rows)},
            "max_length": 512,
            "train": {
                "steps": 45,
                "tokens_per_step": 512,
                "tokens_per_pack": 512,
                "learning_rate": 1e-2,
                "warmup": 3,
                "save_every": 0,
            },
            "output": str(folder / "run"),
        }
    )
    return Talker(model, result.folder)


Command = Callable[..., subprocess.CompletedProcess[str]]
START = [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(ROOT)!r}); from ossia.cli import main; main()"]


@pytest.fixture(scope="session")
def command() -> Command:
    """`command("score", ..., text=...)`: the ossia command in a process of its own."""

    def run(*arguments: str | Path, text: str = "") -> subprocess.CompletedProcess[str]:
        words = [*START, *map(str, arguments)]
        return subprocess.run(words, input=text, capture_output=True, text=True, timeout=120)

    return run
