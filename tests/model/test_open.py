"""Opening a model from what a person types."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path
from typing import Any, get_args

import huggingface_hub
import pytest
import torch
from huggingface_hub.errors import LocalEntryNotFoundError

from ossia.config import Recipe
from ossia.errors import AdapterError, CheckpointError, UserError
from ossia.model import open as opening
from ossia.model.arch import SHAPES
from ossia.model.budget import choose as budget
from ossia.model.budget.choose import Memory
from ossia.model.budget.weights import expanded_expert_bytes
from ossia.model.checkpoint import Checkpoint
from ossia.model.lora import Lora, LoraSpec
from ossia.model.open import (
    WeightsChoice,
    choose_placement,
    model_folder,
    open_model,
)
from ossia.model.peft import save_adapter
from ossia.model.weights import EMBEDDING, HEAD, Placement
from tests.conftest import MakeTiny
from tests.oracle.model_pairs import CPU
from tests.shapes import SMALL


def test_a_folder_opens_with_its_tokenizer_and_the_adapter_named(tiny: MakeTiny, tmp_path: Path) -> None:
    lora = Lora.fresh(Checkpoint.open(tiny(SMALL)).arch, LoraSpec({"q_proj": (2, 4.0)}), seed=0, device=CPU)
    save_adapter(tmp_path / "adapter", lora, base_model="x")
    model, vocab = open_model(str(tiny(SMALL)), adapter=tmp_path / "adapter", dtype="float32", device="cpu")
    assert (model.dtype, model.device, model.arch.vocab_size) == (torch.float32, CPU, vocab.size)
    assert model.lora is not None
    assert model.lora.spec == lora.spec
    plain, _ = open_model(str(tiny(SMALL)), dtype=torch.bfloat16, weights="mmap")
    assert (plain.lora, plain.dtype, plain.weights.placement) == (None, torch.bfloat16, "mmap")


def test_a_run_folder_opens_as_what_it_trained(tiny: MakeTiny, tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(f"model: {tiny(SMALL)}\ndata: y\nadapter: {{}}\n")
    with pytest.raises(AdapterError, match="has saved no checkpoint yet"):
        open_model(str(tmp_path))
    lora = Lora.fresh(Checkpoint.open(tiny(SMALL)).arch, LoraSpec({"q_proj": (2, 4.0)}), seed=0, device=CPU)
    save_adapter(tmp_path / "adapter", lora, base_model="x")
    model, _ = open_model(str(tmp_path), device="cpu")
    assert model.lora is not None
    assert model.lora.spec == lora.spec
    (tmp_path / "recipe.yaml").write_text("model: gone\ndata: y\n")
    with pytest.raises(CheckpointError, match="it trains all weights"):
        open_model(str(tmp_path))
    shutil.copytree(tiny(SMALL), tmp_path / "model")
    model, _ = open_model(str(tmp_path), device="cpu")
    assert (model.lora, model.weights.checkpoint.path) == (None, tmp_path / "model")


def test_what_a_recipe_may_say_of_weights_opens_a_model(tiny: MakeTiny) -> None:
    choices = get_args(Recipe.model_fields["weights"].annotation)
    assert choices == get_args(WeightsChoice)
    assert set(choices) == {"auto", *get_args(Placement)}
    for choice in choices:
        model, _ = open_model(str(tiny(SMALL)), weights=choice, device="cpu")
        assert choice in ("auto", model.weights.placement)


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"model": "nowhere"}, CheckpointError, "nowhere: no such folder"),
        ({"adapter": "nowhere"}, AdapterError, "nowhere"),
        ({"weights": "disk"}, UserError, "weights: 'disk'; allowed: auto, resident, stream, mmap, bf16"),
        ({"dtype": "int8"}, UserError, "dtype: 'int8'; allowed: bfloat16"),
        ({"device": "tpu"}, UserError, "device: 'tpu'; allowed: auto, cpu, cuda"),
    ],
)
def test_what_cannot_be_opened_is_told_in_words(
    tiny: MakeTiny, options: dict[str, Any], error: type[UserError], words: str
) -> None:
    with pytest.raises(error, match=words):
        open_model(**{"model": str(tiny(SMALL)), **options})


def test_a_gguf_file_is_no_folder_and_the_message_says_how_it_becomes_one(tmp_path: Path) -> None:
    (tmp_path / "x.gguf").write_bytes(b"GGUF")
    with pytest.raises(CheckpointError, match=r"a GGUF file\n  next: .*ossia export .*x\.gguf --to hf-mxfp4"):
        model_folder(str(tmp_path / "x.gguf"))


def test_a_run_folder_is_not_a_model_and_the_message_says_what_is(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text("model: some/model\ndata: y\n")
    with pytest.raises(CheckpointError, match=r"run folder(.|\n)*it trains all weights(.|\n)*ossia export"):
        model_folder(str(tmp_path))
    (tmp_path / "recipe.yaml").write_text("model: some/model\ndata: y\nadapter: {}\n")
    with pytest.raises(CheckpointError, match=f"run folder(.|\n)*some/model --adapter {tmp_path}"):
        model_folder(str(tmp_path))
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match=f"its trained model is {tmp_path / 'model'}"):
        model_folder(str(tmp_path))


def test_a_tokenizer_of_another_model_is_refused(tiny: MakeTiny, o200k_tokenizer: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny(SMALL), tmp_path / "model"))
    shutil.copy(o200k_tokenizer, folder / "tokenizer.json")
    with pytest.raises(CheckpointError, match=r"tokenizer\.json knows 200,019 tokens"):
        open_model(str(folder))


def test_a_hub_name_is_downloaded_without_its_other_formats(
    tiny: MakeTiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    asked: dict[str, Any] = {}

    def download(name: str, **options: Any) -> str:
        asked.update(options, name=name)
        return str(tiny(SMALL))

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert model_folder("openai/gpt-oss-20b") == tiny(SMALL)
    assert asked["name"] == "openai/gpt-oss-20b"
    assert "original/*" in asked["ignore_patterns"]

    def offline(name: str, **options: Any) -> str:
        raise LocalEntryNotFoundError("no connection\nmore")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    with pytest.raises(CheckpointError, match=r"openai/gpt-oss-20b: neither a folder here nor .*: no connection\n"):
        model_folder("openai/gpt-oss-20b")


def test_auto_expands_experts_only_where_memory_is_plenty(tiny: MakeTiny, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = Checkpoint.open(tiny(SMALL))
    needed = expanded_expert_bytes(checkpoint.arch, "bfloat16")
    expanded = sum(
        spec.num_bytes
        for name, spec in dataclasses.replace(SMALL, vocab_size=300).tensor_specs("bf16").items()
        if name.endswith(("gate_up_proj", "down_proj"))
    )
    assert needed == expanded
    for total, placement in ((4 * needed + 4, "bf16"), (4 * needed, "mmap")):
        monkeypatch.setattr(opening, "machine_memory", lambda total=total: (total, total))
        assert choose_placement(checkpoint, torch.bfloat16, CPU) == placement


@pytest.mark.parametrize(
    ("gpu_gb", "machine_gb", "placement"),
    [
        (80, 64, "resident"),
        (141, 64, "bf16"),
        (24, 64, "resident"),
        (16, 64, "resident"),
        (14, 64, "stream"),
        (8, 64, "stream"),
        (8, 14, "mmap"),
    ],
)
def test_on_a_gpu_the_20b_goes_where_it_fits(gpu_gb: int, machine_gb: int, placement: str) -> None:
    memory = Memory(machine_gb * 10**9, machine_gb * 10**9, gpu_gb * 10**9, gpu_gb * 10**9)
    assert budget.choose_placement(SHAPES["20b"], "mxfp4", "bfloat16", "cuda", memory).placement == placement


@pytest.mark.parametrize(
    ("free_gb", "placed_gb", "names"),
    [
        (24, 13.76, set()),
        (15, 13.76, {EMBEDDING}),  # resident
        (8, 4.45, set()),
        (6, 4.45, {EMBEDDING}),
        (5, 4.45, {EMBEDDING, HEAD}),  # streamed
    ],
)
def test_embedding_and_head_wait_in_the_machines_memory_where_a_gpu_is_full(
    free_gb: int, placed_gb: float, names: set[str]
) -> None:
    table = 1_158_000_000
    assert budget.on_host_where_full(free_gb * 10**9, int(placed_gb * 1e9), table) == names
