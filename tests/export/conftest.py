"""Adapters that matter, and run folders as `ossia train` leaves them, without the training."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from ossia.config import Recipe
from ossia.model.arch import Arch
from ossia.model.checkpoint import Checkpoint
from ossia.model.lora import TARGETS, Lora, LoraSpec
from tests.oracle.model_pairs import CPU

EVERYTHING = LoraSpec(dict.fromkeys(TARGETS, (3, 6.0)))


def random_lora(arch: Arch, spec: LoraSpec = EVERYTHING, *, seed: int = 1, size: float = 0.05) -> Lora:
    """An adapter that changes the answers; `size` is the spread of B."""
    lora = Lora.fresh(arch, spec, seed=seed, device=CPU)
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in lora.trainable.tensors.items():
        if name.endswith("lora_B"):
            tensor.copy_(torch.randn(tensor.shape, generator=generator) * size)
    return lora


MakeRun = Callable[..., Path]


@pytest.fixture
def make_run(tmp_path: Path) -> MakeRun:
    """`make_run(model, adapter=..., held_out=...)`: a run folder with its recipe, and nothing trained in it yet."""

    def make(model: Path, *, adapter: dict[str, object] | None = None, held_out: bool = False, **keys: object) -> Path:
        data = tmp_path / "data.jsonl"
        rows = [
            {"messages": [{"role": "user", "content": f"Say {n}."}, {"role": "assistant", "content": f"{n}!"}]}
            for n in range(8)
        ]
        data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        recipe = {"model": str(model), "data": {"path": str(data)}, "adapter": adapter, "output": str(tmp_path / "run")}
        recipe |= keys
        if held_out:
            recipe["eval"] = {"split": 0.5}
        run = tmp_path / "run"
        run.mkdir()
        (run / "recipe.yaml").write_text(Recipe.model_validate(recipe).to_yaml(), encoding="utf-8")
        return run

    return make


def arch_of(path: Path) -> Arch:
    return Checkpoint.open(path).arch
