"""Adapters against `peft`: what either wrote gives the same logits in the other, and training the same gradients."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ossia.model.checkpoint import Checkpoint
from ossia.model.lora import Lora, LoraSpec
from ossia.model.peft import CONFIG, TENSORS, load_adapter, save_adapter
from ossia.ops.loss import weighted_nll
from ossia.train.schedule import forward_backward
from tests.conftest import MakeTiny
from tests.golden.write_adapters import pefts_deltas, tiny_model
from tests.model.test_adapter_layouts import ARCH as GOLDEN_ARCH
from tests.model.test_adapter_layouts import GOLDEN, UNSLOTH, WRITERS
from tests.oracle.model_pairs import CPU, documents, load, load_transformers, pack_of, relative_error
from tests.shapes import SHALLOW

ATTENTION = dict.fromkeys(("q_proj", "k_proj", "v_proj", "o_proj"), (4, 8.0))
EXPERTS = {"gate_up_proj": (3, 6.0), "down_proj": (3, 6.0)}
SPECS = {
    "attention": LoraSpec(ATTENTION),
    "experts": LoraSpec(EXPERTS),
    "gate_up alone": LoraSpec({"gate_up_proj": (2, 5.0)}),
    "down alone": LoraSpec({"down_proj": (2, 5.0)}),
    "router alone": LoraSpec({"router": (2, 4.0)}),
    "everything": LoraSpec({**ATTENTION, **EXPERTS, "router": (3, 6.0), "lm_head": (3, 6.0)}),
    "a rank for each": LoraSpec(
        {
            "q_proj": (1, 1.0),
            "k_proj": (2, 3.0),
            "v_proj": (4, 8.0),
            "o_proj": (8, 0.5),
            "router": (5, 2.5),
            "gate_up_proj": (3, 6.0),
            "down_proj": (7, 3.0),
            "lm_head": (6, 12.0),
        }
    ),
    "rslora": LoraSpec({**ATTENTION, **EXPERTS}, rslora=True),
    "k alone": LoraSpec({"k_proj": (4, 8.0)}),
}


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    """PEFT warns that patterns for parameters are ignored (and follows them), and that it saves the head's weight."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="peft")
        warnings.filterwarnings("ignore", category=FutureWarning)
        yield


def random_lora(spec: LoraSpec, seed: int = 1, arch_path: Path | None = None, arch: Any = None) -> Lora:
    """An adapter whose B isn't zero."""
    arch = Checkpoint.open(arch_path).arch if arch_path is not None else arch
    lora = Lora.fresh(arch, spec, seed=seed, device=CPU)
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in lora.trainable.tensors.items():
        if name.endswith("lora_B"):
            tensor.copy_(torch.randn(tensor.shape, generator=generator) * 0.2)
    return lora


def in_peft(path: Path, adapter: Path, *, trainable: bool = False) -> torch.nn.Module:
    from peft import PeftModel

    return PeftModel.from_pretrained(load_transformers(path), str(adapter), is_trainable=trainable)


def their_logits(model: torch.nn.Module, ids: Tensor) -> Tensor:
    with torch.no_grad():
        return model(ids[None]).logits[0]


@pytest.mark.parametrize("name", SPECS)
def test_an_adapter_that_ossia_saved_gives_the_same_logits_in_peft(tiny: MakeTiny, tmp_path: Path, name: str) -> None:
    path = tiny(SHALLOW)
    lora = random_lora(SPECS[name], arch_path=path)
    save_adapter(tmp_path / "adapter", lora, base_model=str(path))
    (sample,) = documents(load(path).arch, (150,))
    pack = pack_of([sample])
    found = their_logits(in_peft(path, tmp_path / "adapter"), pack.ids)
    ours, base = load(path, lora=lora).logits(pack), load(path).logits(pack)
    assert relative_error(base, ours) > 0.01, "the adapter has to matter"
    assert relative_error(found, ours) <= 1e-5


@pytest.mark.parametrize("name", SPECS)
def test_peft_gives_the_file_that_ossia_saved_back_with_the_same_names_shapes_and_config(
    tiny: MakeTiny, tmp_path: Path, name: str
) -> None:
    from safetensors.torch import load_file

    path = tiny(SHALLOW)
    save_adapter(tmp_path / "ours", random_lora(SPECS[name], arch_path=path), base_model=str(path))
    in_peft(path, tmp_path / "ours").save_pretrained(str(tmp_path / "theirs"))
    ours, theirs = (load_file(tmp_path / who / TENSORS) for who in ("ours", "theirs"))
    copies = {key for key in theirs if key.endswith("lm_head.base_layer.weight")}
    assert theirs.keys() - copies == ours.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    before, after = (json.loads((tmp_path / who / CONFIG).read_text()) for who in ("ours", "theirs"))
    for config in (before, after):
        config["target_modules"] = sorted(config["target_modules"])
        config["target_parameters"] = sorted(config["target_parameters"] or [])
    assert {key: after[key] for key in before} == before


PEFT_CONFIGS: dict[str, dict[str, Any]] = {
    "attention by default names": {"target_modules": ["q_proj", "v_proj"], "r": 4, "lora_alpha": 8},
    "all linear modules": {"target_modules": "all-linear", "r": 4, "lora_alpha": 16, "use_rslora": True},
    "by regular expression": {"target_modules": r".*self_attn\.(q|o)_proj", "r": 2, "lora_alpha": 2},
    "experts, as the cookbook has them": {
        "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"],
        "target_parameters": ["mlp.experts.down_proj", "mlp.experts.gate_up_proj"],
        "r": 2,
        "lora_alpha": 4,
        "rank_pattern": {"mlp.experts.down_proj": 5, r"self_attn\.[kv]_proj": 3},
        "alpha_pattern": {"down_proj": 7, "o_proj": 1},
    },
    "one parameter, router and head": {
        "target_modules": ["lm_head"],
        "target_parameters": ["experts.down_proj", "router.weight"],
        "r": 3,
        "lora_alpha": 3,
    },
}


@pytest.mark.parametrize("name", PEFT_CONFIGS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_adapter_that_peft_saved_gives_the_same_logits_in_ossia(
    tiny: MakeTiny, tmp_path: Path, name: str, dtype: torch.dtype
) -> None:
    from peft import LoraConfig, get_peft_model

    path = tiny(SHALLOW)
    torch.manual_seed(0)
    model = get_peft_model(load_transformers(path), LoraConfig(init_lora_weights=False, **PEFT_CONFIGS[name]))
    for key, parameter in model.named_parameters():
        if "lora_" in key:
            parameter.data = parameter.data.to(dtype).float()
    model.eval()
    (sample,) = documents(load(path).arch, (150,))
    pack = pack_of([sample])
    expected = their_logits(model, pack.ids)
    model.to(dtype).save_pretrained(str(tmp_path))
    checkpoint = Checkpoint.open(path)
    found = load(path, lora=load_adapter(tmp_path, checkpoint.arch, CPU, base=checkpoint)).logits(pack)
    assert relative_error(load(path).logits(pack), expected) > 0.01
    assert relative_error(found, expected) <= 1e-5


@pytest.mark.parametrize("name", ["everything", "a rank for each", "rslora", "gate_up alone"])
@pytest.mark.parametrize("recompute", [True, False])
def test_gradients_of_every_adapter_tensor_equal_those_of_peft(
    tiny: MakeTiny, tmp_path: Path, name: str, recompute: bool
) -> None:
    path = tiny(SHALLOW)
    lora = random_lora(SPECS[name], arch_path=path)
    save_adapter(tmp_path / "adapter", lora, base_model=str(path))
    model, reference = load(path, lora=lora), in_peft(path, tmp_path / "adapter", trainable=True).train()
    samples = documents(model.arch, (60, 1, 140, 33))
    packs = [pack_of(samples[:2]), pack_of(samples[2:])]
    total = sum(float(pack.weights.sum()) for pack in packs)
    forward_backward(
        model, packs, lambda logp, m, rows: weighted_nll(logp, packs[m].weights[rows], total), recompute=recompute
    )
    for sample in samples:
        ids, weights = torch.from_numpy(sample.ids).long(), torch.from_numpy(sample.weights)
        if len(sample) > 1:
            nll = F.cross_entropy(reference(ids[None]).logits[0, :-1], ids[1:], reduction="none")
            ((nll * weights[1:]).sum() / total).backward()
    # peft's gradients, written as an adapter, come back in our names and layout
    grads = {key: p.grad for key, p in reference.named_parameters() if p.requires_grad}
    with torch.no_grad():
        for key, parameter in reference.named_parameters():
            if key in grads:
                parameter.copy_(grads[key])
    reference.save_pretrained(str(tmp_path / "grads"))
    expected = load_adapter(tmp_path / "grads", model.arch, CPU).trainable.tensors
    for key, tensor in lora.trainable.tensors.items():
        assert relative_error(tensor.grad, expected[key]) <= 1e-5, key


@pytest.mark.parametrize("writer", [*WRITERS, UNSLOTH])
def test_what_others_wrote_in_their_layouts_is_in_peft_what_it_was_to_them_once_ossia_saved_it(
    tmp_path: Path, writer: str
) -> None:
    from peft import PeftModel
    from safetensors.torch import load_file

    lora = load_adapter(GOLDEN / writer, GOLDEN_ARCH, CPU, layout="expert-major" if writer == UNSLOTH else None)
    save_adapter(tmp_path / "today", lora, base_model="x")
    model = PeftModel.from_pretrained(tiny_model(), str(tmp_path / "today"))
    found, wanted = pefts_deltas(model), load_file(GOLDEN / writer / "deltas.safetensors")
    assert found.keys() == wanted.keys()
    assert all(torch.allclose(found[name], wanted[name], atol=1e-6) for name in wanted)
