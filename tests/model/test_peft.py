"""Adapters on disk: bit for bit there and back, and what is refused. Against `peft`: tests/oracle/test_peft.py."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from ossia.config import Recipe
from ossia.errors import AdapterError
from ossia.model.arch import Arch
from ossia.model.checkpoint import Checkpoint
from ossia.model.lora import TARGETS, Lora, LoraSpec
from ossia.model.peft import CONFIG, RUN_TENSORS, TENSORS, find_adapter, load_adapter, save_adapter
from ossia.train.state import TRAINABLE
from tests.conftest import MakeTiny

CPU = torch.device("cpu")
SPECS = {
    "everything": LoraSpec({target: (n + 1, 2.5 * n + 1) for n, target in enumerate(TARGETS)}),
    "attention with dropout": LoraSpec(dict.fromkeys(("q_proj", "o_proj"), (4, 8.0)), dropout=0.1),
    "gate_up alone": LoraSpec({"gate_up_proj": (2, 4.0)}, rslora=True),
    "down alone": LoraSpec({"down_proj": (2, 4.0)}),
}


def random_lora(arch: Arch, spec: LoraSpec, seed: int = 0) -> Lora:
    lora = Lora.fresh(arch, spec, seed=seed, device=CPU)
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in lora.trainable.tensors.items():
        if name.endswith("lora_B"):
            tensor.copy_(torch.randn(tensor.shape, generator=generator))
    return lora


def same(one: Lora, other: Lora) -> bool:
    mine, theirs = one.trainable.tensors, other.trainable.tensors
    return mine.keys() == theirs.keys() and all(torch.equal(mine[name], theirs[name]) for name in mine)


@pytest.mark.parametrize("name", SPECS)
def test_a_saved_adapter_comes_back_bit_for_bit(small: Arch, tmp_path: Path, name: str) -> None:
    lora = random_lora(small, SPECS[name])
    save_adapter(tmp_path / "adapter", lora, base_model="openai/gpt-oss-20b")
    found = load_adapter(tmp_path / "adapter", small, CPU)
    assert same(found, lora)
    assert found.spec == lora.spec
    assert all(tensor.is_contiguous() for tensor in found.trainable.tensors.values())
    assert json.loads((tmp_path / "adapter" / CONFIG).read_text())["base_model_name_or_path"] == "openai/gpt-oss-20b"
    assert sorted(p.name for p in (tmp_path / "adapter").iterdir()) == [CONFIG, TENSORS]


def test_dropout_is_left_out_where_peft_would_refuse_it(small: Arch, tmp_path: Path) -> None:
    lora = random_lora(small, LoraSpec({"q_proj": (2, 4.0), "down_proj": (2, 4.0)}, dropout=0.1))
    save_adapter(tmp_path / "adapter", lora, base_model="x")
    assert load_adapter(tmp_path / "adapter", small, CPU).spec.dropout == 0.0


def test_an_adapter_is_replaced_whole_and_anything_else_is_left_alone(
    small: Arch, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = (random_lora(small, SPECS["down alone"], seed) for seed in (1, 2))
    place = tmp_path / "adapter"
    save_adapter(place, first, base_model="x")
    save_adapter(place, second, base_model="x")
    assert same(load_adapter(place, small, CPU), second)
    assert [p.name for p in tmp_path.iterdir()] == ["adapter"]

    def full_disk(*args: object, **options: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("ossia.model.peft.write.save_file", full_disk)
        with pytest.raises(AdapterError, match="No space left on device"):
            save_adapter(place, first, base_model="x")
    assert same(load_adapter(place, small, CPU), second)
    assert [p.name for p in tmp_path.iterdir()] == ["adapter"]
    other = tmp_path / "other"
    other.mkdir()
    (other / "thesis.txt").write_text("mine")
    with pytest.raises(AdapterError, match="exists and is no adapter"):
        save_adapter(other, first, base_model="x")
    assert (other / "thesis.txt").read_text() == "mine"


# --- what is refused --------------------------------------------------------------------------------------------------

Tensors = dict[str, Tensor]
Q = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"


def without(name: str) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {key: tensor for key, tensor in tensors.items() if key != name}


def with_one(name: str, tensor: Tensor) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {**tensors, name: tensor}


FILE_FAULTS: dict[str, tuple[Callable[[Tensors], Tensors], str]] = {
    "missing": (without(Q), rf"`{re.escape(Q)}` \[1, 64\] is missing"),
    "left over": (with_one("base_model.model.model.embed_tokens.weight", torch.zeros(2)), "embed_tokens.weight` would"),
    "misshapen": (with_one(Q, torch.zeros(2, 64)), r"is \[2, 64\]; for this model and rank it must be \[1, 64\]"),
    "another model's": (
        lambda tensors: {f"x.{name}": tensor for name, tensor in tensors.items()},
        rf"`{re.escape(Q)}` \[1, 64\] is missing(\n  `.*` .* is missing){{7}}\n  and \d+ more\n  next: name the model",
    ),
    "integers": (with_one(Q, torch.zeros(1, 64, dtype=torch.int32)), "is I32; allowed: F32, BF16, F16"),
    "another head": (
        with_one("base_model.model.lm_head.base_layer.weight", torch.zeros(3, 64)),
        "not the head of this model",
    ),
}


@pytest.mark.parametrize("fault", FILE_FAULTS)
def test_a_file_that_does_not_fit_is_refused_naming_tensor_and_file(small: Arch, tmp_path: Path, fault: str) -> None:
    change, message = FILE_FAULTS[fault]
    save_adapter(tmp_path, random_lora(small, SPECS["everything"]), base_model="x")
    save_file(change(load_file(tmp_path / TENSORS)), tmp_path / TENSORS)
    with pytest.raises(AdapterError, match=message) as caught:
        load_adapter(tmp_path, small, CPU)
    assert str(tmp_path / TENSORS) in str(caught.value)


CONFIG_FAULTS: dict[str, tuple[dict[str, Any], str]] = {
    "IA3": ({"peft_type": "IA3"}, "`peft_type` is 'IA3'; allowed: LORA"),
    "DoRA": ({"use_dora": True}, "`use_dora` is True"),
    "bias of A and B": ({"lora_bias": True}, "`lora_bias` is True"),
    "trained biases": ({"bias": "all"}, "`bias` is 'all'; allowed: 'none'"),
    "saved modules": ({"modules_to_save": ["embed_tokens"]}, "`modules_to_save`"),
    "changed base": ({"init_lora_weights": "pissa"}, "`init_lora_weights` is 'pissa'"),
    "new kind": ({"use_something_new": True}, "`use_something_new`"),
    "one layer": ({"target_modules": ["0.self_attn.q_proj"]}, r"q_proj is adapted in layers \[0\] only"),
    "a rank a layer": ({"rank_pattern": {"1.self_attn.q_proj": 7}}, "q_proj has .* in one layer and .* in layer 1"),
    "nothing": ({"target_modules": ["gate_proj"], "target_parameters": None}, "`target_modules` is"),
    "bad pattern": ({"rank_pattern": {"(": 7}}, "`rank_pattern` is .* regular expressions"),
    "rank as text": ({"r": "8", "rank_pattern": {}}, "`r` is '8'; allowed: numbers above 0"),
    "dropout over 1": ({"lora_dropout": 5}, "`lora_dropout` is 5"),
}


@pytest.mark.parametrize("fault", CONFIG_FAULTS)
def test_an_adapter_of_another_kind_is_refused_naming_key_and_file(small: Arch, tmp_path: Path, fault: str) -> None:
    change, message = CONFIG_FAULTS[fault]
    save_adapter(tmp_path, random_lora(small, SPECS["everything"]), base_model="x")
    config = json.loads((tmp_path / CONFIG).read_text())
    (tmp_path / CONFIG).write_text(json.dumps({**config, **change}))
    with pytest.raises(AdapterError, match=message) as caught:
        load_adapter(tmp_path, small, CPU)
    assert str(tmp_path / CONFIG) in str(caught.value)


def test_broken_files_and_pickles_are_refused(small: Arch, tmp_path: Path) -> None:
    save_adapter(tmp_path, random_lora(small, SPECS["down alone"]), base_model="x")
    whole = (tmp_path / TENSORS).read_bytes()
    (tmp_path / TENSORS).write_bytes(whole[:-7])
    with pytest.raises(AdapterError, match="cut short"):
        load_adapter(tmp_path, small, CPU)
    (tmp_path / TENSORS).rename(tmp_path / "adapter_model.bin")
    with pytest.raises(AdapterError, match=r"adapter_model\.bin may run code"):
        load_adapter(tmp_path, small, CPU)
    (tmp_path / CONFIG).write_text("{")
    with pytest.raises(AdapterError, match="is not JSON"):
        load_adapter(tmp_path, small, CPU)


def test_the_head_beside_an_adapter_has_to_be_the_models_own(tiny: MakeTiny, tmp_path: Path) -> None:
    base = Checkpoint.open(tiny())
    lora = random_lora(base.arch, LoraSpec({"lm_head": (2, 4.0)}))
    save_adapter(tmp_path, lora, base_model="x")
    head, tensors = base.tensor("lm_head.weight"), load_file(tmp_path / TENSORS)
    name = "base_model.model.lm_head.base_layer.weight"
    save_file({**tensors, name: head.float()}, tmp_path / TENSORS)
    assert same(load_adapter(tmp_path, base.arch, CPU, base=base), lora)
    save_file({**tensors, name: head.float() * 1.01}, tmp_path / TENSORS)
    with pytest.raises(AdapterError, match="not the head of this model"):
        load_adapter(tmp_path, base.arch, CPU, base=base)


# --- runs -------------------------------------------------------------------------------------------------------------


def make_run(folder: Path, adapter: dict[str, Any] | None) -> None:
    recipe = Recipe.model_validate({"model": "m", "data": {"path": "d.jsonl"}, "adapter": adapter})
    folder.mkdir(parents=True)
    (folder / "recipe.yaml").write_text(recipe.to_yaml())


def save_step(run: Path, step: int, lora: Lora) -> Path:
    folder = run / "checkpoints" / f"step-{step:08d}"
    folder.mkdir(parents=True)
    save_file(lora.trainable.tensors, folder / RUN_TENSORS)
    return folder


def test_a_runs_adapter_is_that_of_its_newest_checkpoint_until_it_has_a_final_one(small: Arch, tmp_path: Path) -> None:
    assert RUN_TENSORS == TRAINABLE
    run = tmp_path / "run"
    make_run(run, {"rank": 3, "alpha": 6.0, "targets": ["attention", "experts"], "rslora": True, "dropout": 0.1})
    with pytest.raises(AdapterError, match="saved no checkpoint yet"):
        find_adapter(run)
    spec = LoraSpec({t: (3, 6.0) for t in TARGETS if t not in ("router", "lm_head")}, dropout=0.1, rslora=True)
    loras = {step: random_lora(small, spec, step) for step in (90, 100, 1000)}
    for step, lora in loras.items():
        save_step(run, step, lora)
    (run / "checkpoints" / "step-00002000.corrupt").mkdir()
    (run / "checkpoints" / "step-00002000.corrupt" / RUN_TENSORS).write_bytes(b"")
    found = load_adapter(find_adapter(run), small, CPU)
    assert same(found, loras[1000])
    assert found.spec == spec
    assert same(load_adapter(find_adapter(run / "checkpoints" / "step-00000090"), small, CPU), loras[90])
    save_adapter(run / "adapter", loras[100], base_model="m")
    assert same(load_adapter(find_adapter(str(run)), small, CPU), loras[100])
    assert find_adapter(run / "adapter") == run / "adapter"


def test_a_run_that_has_no_adapter_says_so(small: Arch, tmp_path: Path) -> None:
    run = tmp_path / "run"
    make_run(run, None)
    step = save_step(run, 5, random_lora(small, SPECS["down alone"]))
    with pytest.raises(AdapterError, match="trained all weights, so it has no adapter"):
        load_adapter(find_adapter(run), small, CPU)
    (run / "recipe.yaml").unlink()
    with pytest.raises(AdapterError, match="name an adapter's folder or a run folder"):
        load_adapter(step, small, CPU)
    with pytest.raises(AdapterError, match="no such folder"):
        find_adapter(tmp_path / "nowhere")
    with pytest.raises(AdapterError, match="nor checkpoints of a run"):
        find_adapter(tmp_path)
