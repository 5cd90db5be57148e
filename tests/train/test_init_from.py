"""A run that starts from an adapter that another program wrote (`adapter.init_from`): it trains that one on.

The files are in tests/golden/adapters/, each made by the real package.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from ossia import sft
from ossia.config import Recipe, recipe_from_dict
from ossia.errors import AdapterError
from ossia.export import export_model
from ossia.model.checkpoint import write_checkpoint
from ossia.model.lora import Lora
from ossia.model.peft import LayoutName, load_adapter
from ossia.model.template import vocabulary_size
from tests.model.test_adapter_layouts import ARCH, CPU, GOLDEN, UNSLOTH, WRITERS, deltas_of

RATE = 1e-6  # a step of AdamW moves a weight by no more


def recipe(model: Path, start: Path, folder: Path, lora: Lora) -> Recipe:
    """One step from `start`, with the targets, ranks and alphas that it has."""
    chat = [{"role": "user", "content": "Hi."}, {"role": "assistant", "content": "Hello!"}]
    (folder / "rows.jsonl").write_text(json.dumps({"messages": chat}) + "\n", encoding="utf-8")
    targets = {name: {"rank": rank, "alpha": alpha} for name, (rank, alpha) in lora.spec.targets.items()}
    train = {"steps": 1, "tokens_per_step": 256, "learning_rate": RATE, "warmup": 0}
    given: dict[str, Any] = {
        "model": str(model),
        "dtype": "float32",
        "data": str(folder / "rows.jsonl"),
        "adapter": {"targets": targets, "init_from": str(start)},
        "max_length": 256,
        "train": train,
        "output": str(folder / "run"),
    }
    return recipe_from_dict(given)


@pytest.fixture(scope="module")
def model(small_tokenizer: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random one that the adapters fit, with a vocabulary that a chat can be written in."""
    arch = dataclasses.replace(ARCH, vocab_size=vocabulary_size(small_tokenizer))
    generator, path = torch.Generator().manual_seed(0), tmp_path_factory.mktemp("base") / "model"
    drawn = (
        (name, torch.randn(spec.shape, generator=generator).mul(0.2).bfloat16())
        for name, spec in arch.tensor_specs("bf16").items()
    )
    write_checkpoint(path, arch, drawn, "bf16", tokenizer_from=small_tokenizer)
    return path


@pytest.mark.parametrize("writer", [*WRITERS, UNSLOTH])
def test_a_run_trains_on_what_another_program_left(model: Path, tmp_path: Path, writer: str) -> None:
    start = GOLDEN / writer
    layout: LayoutName | None = "expert-major" if writer == UNSLOTH else None
    if layout is not None:  # its file doesn't say; a recipe has no key for that, an export does
        start = tmp_path / "said"
        export_model(str(model), to="peft", output=start, adapter=str(GOLDEN / writer), adapter_layout=layout)
    before = load_adapter(GOLDEN / writer, ARCH, CPU, layout=layout, say=lambda _: None)
    after = load_adapter(sft.run(recipe(model, start, tmp_path, before)).trained, ARCH, CPU)
    found, wanted = deltas_of(after), load_file(GOLDEN / writer / "deltas.safetensors")
    assert found.keys() == wanted.keys()
    moved = {name: float((found[name] - wanted[name]).abs().max()) for name in wanted}
    assert max(moved.values()) < 1e-4, "it isn't the adapter that it started from"
    assert all(float(wanted[name].abs().max()) > 1e-2 for name in wanted), "nothing to keep: this shows little"
    ended, started = after.trainable.tensors, before.trainable.tensors
    changed = [name for name in started if not ended[name].equal(started[name])]
    assert any(".mlp.experts." in name for name in changed), "its experts weren't trained"
    assert any(".self_attn." in name for name in changed), "its attention wasn't trained"


def test_one_that_can_be_read_in_two_ways_is_refused_with_what_to_do(model: Path, tmp_path: Path) -> None:
    before = load_adapter(GOLDEN / UNSLOTH, ARCH, CPU, layout="expert-major", say=lambda _: None)
    with pytest.raises(AdapterError, match=r"(?s)rank-major:.*expert-major:.*--adapter-layout expert-major"):
        sft.run(recipe(model, GOLDEN / UNSLOTH, tmp_path, before))
