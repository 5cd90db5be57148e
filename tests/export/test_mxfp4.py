"""`ossia export --to hf-mxfp4`: bytes that stay, experts that are rounded, what that costs, and when it is refused."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest
import torch

from ossia.errors import CheckpointError
from ossia.export import export_model
from ossia.model.checkpoint import Checkpoint, write_checkpoint
from ossia.model.lora import Lora, LoraSpec
from ossia.model.peft import save_adapter
from ossia.model.template import vocabulary_size
from ossia.model.weights import EXPERT_WEIGHTS, interleave_gate_up
from ossia.ops.mxfp4 import dequantize_mxfp4, quantize_mxfp4
from ossia.train.optim import AdamW
from ossia.train.state import save_checkpoint
from tests.conftest import MakeTiny
from tests.export.conftest import EVERYTHING, MakeRun, arch_of, random_lora
from tests.oracle.model_pairs import load
from tests.shapes import SHALLOW

ATTENTION = LoraSpec(dict.fromkeys(("q_proj", "v_proj", "router", "lm_head"), (4, 8.0)))
GATE_UP = "model.layers.1.mlp.experts.gate_up_proj"


def export(path: Path, lora: Lora, folder: Path, **options: object) -> Checkpoint:
    save_adapter(folder / "adapter", lora, base_model=str(path))
    out = export_model(
        str(path), to="hf-mxfp4", output=folder / "out", adapter=str(folder / "adapter"), **{"max_kl": 9.0, **options}
    )
    return Checkpoint.open(out)


def with_small_codes(base: Checkpoint, path: Path) -> Path:
    """The same model, but no code of a layer's gate_up experts is above 1.5: rounded again their bytes are others."""
    tensors = ((name, base.tensor(name)) for name in base.specs)
    smaller = ((name, tensor & 0xBB if name == f"{GATE_UP}_blocks" else tensor) for name, tensor in tensors)
    write_checkpoint(path, base.arch, smaller, "mxfp4", tokenizer_from=base.path)
    return path


def packed_names(checkpoint: Checkpoint) -> list[str]:
    return [name for name in checkpoint.specs if name.endswith(("_blocks", "_scales"))]


def test_experts_that_were_not_trained_keep_their_bytes_and_the_rest_is_merged(
    tiny: MakeTiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tiny(SHALLOW)
    lora = random_lora(arch_of(path), ATTENTION)
    exported, base = export(path, lora, tmp_path, max_kl=None), Checkpoint.open(path)
    codes = torch.cat([base.tensor(name).flatten() for name in packed_names(base) if name.endswith("_blocks")])
    assert (codes & 15 == 8).any(), "no -0.0 among the codes: the test would show nothing"
    for name in base.specs:
        same = torch.equal(base.tensor(name), exported.tensor(name))
        assert same == (name.removesuffix(".weight") not in lora.sites), name
    assert "rounded to MXFP4" not in capsys.readouterr().err


def test_a_trained_expert_is_merged_and_rounded_and_one_without_a_delta_keeps_its_bytes(
    tiny: MakeTiny, tmp_path: Path
) -> None:
    path = with_small_codes(Checkpoint.open(tiny(SHALLOW)), tmp_path / "model")
    lora = random_lora(arch_of(path), EVERYTHING)
    lora.trainable.tensors[f"{GATE_UP}.lora_B"][2] = 0  # as training leaves an expert that no token went to
    lora.trainable.tensors[f"{GATE_UP}.lora_A"][4] = 0
    base, exported = Checkpoint.open(path), export(path, lora, tmp_path)
    blocks, scales = (base.tensor(f"{GATE_UP}_{part}").clone() for part in ("blocks", "scales"))
    factors = (lora.trainable.tensors[f"{GATE_UP}.lora_{side}"].double() for side in "AB")
    a, b = next(factors), interleave_gate_up(next(factors))
    merged = dequantize_mxfp4(blocks, scales, torch.float32).double() + lora.spec.scale("gate_up_proj") * (b @ a)
    wanted_blocks, wanted_scales = quantize_mxfp4(merged.float())
    for expert in range(SHALLOW.num_experts):
        kept = expert in (2, 4)
        wanted = (blocks, scales) if kept else (wanted_blocks, wanted_scales)
        for part, tensor in zip(("blocks", "scales"), wanted, strict=True):
            assert torch.equal(exported.tensor(f"{GATE_UP}_{part}")[expert], tensor[expert]), (expert, part)
        if kept:  # the test would show nothing if rounding them again gave the same
            again = quantize_mxfp4(dequantize_mxfp4(blocks[expert], scales[expert], torch.float32))
            assert not torch.equal(again[0], blocks[expert])
            assert not torch.equal(again[1], scales[expert])
            assert (blocks[expert] & 15 == 8).any(), "no -0.0"


def test_every_layer_is_told_how_far_rounding_moved_its_weights(
    tiny: MakeTiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tiny(SHALLOW)
    spec = LoraSpec({"down_proj": (3, 6.0), "q_proj": (3, 6.0)})
    lora = random_lora(arch_of(path), spec)
    base, exported = Checkpoint.open(path), export(path, lora, tmp_path)
    said = capsys.readouterr().err
    for layer in range(SHALLOW.num_layers):
        name = f"model.layers.{layer}.mlp.experts.down_proj"
        before, after = (
            dequantize_mxfp4(*(one.tensor(f"{name}_{part}").clone() for part in ("blocks", "scales")), torch.float32)
            for one in (base, exported)
        )
        a, b = (lora.trainable.tensors[f"{name}.lora_{side}"] for side in "AB")
        merged = before + lora.spec.scale("down_proj") * (b @ a)
        error = float((after - merged).norm() / merged.norm())
        assert 0.01 < error < 0.2
        ((told, kl),) = re.findall(rf"layer {layer}: down_proj ([\d.]+)%; KL (\S+)\n", said)
        assert float(told) == pytest.approx(100 * error, abs=0.006)
        assert float(kl) > 1e-6
    assert re.search(r"read back and compared with what was trained, on fixed texts: .*KL", said)


def test_from_bf16_experts_all_are_rounded_trained_or_not_and_it_says_so(
    tiny: MakeTiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tiny(SHALLOW, "bf16")
    base, exported = Checkpoint.open(path), export(path, random_lora(arch_of(path), ATTENTION), tmp_path)
    assert exported.layout == "mxfp4"
    for name in EXPERT_WEIGHTS:
        module = f"model.layers.0.mlp.experts.{name}"
        wanted = quantize_mxfp4(base.tensor(module).transpose(1, 2))
        for part, tensor in zip(("blocks", "scales"), wanted, strict=True):
            assert torch.equal(exported.tensor(f"{module}_{part}"), tensor)
    assert "all of them are rounded to MXFP4, trained or not" in capsys.readouterr().err


def test_an_export_too_far_from_what_was_trained_is_refused_unless_it_is_allowed(
    tiny: MakeTiny, tmp_path: Path
) -> None:
    path = tiny(SHALLOW)
    lora = random_lora(arch_of(path), EVERYTHING, size=0.3)
    with pytest.raises(
        CheckpointError, match=r"(?s)isn't the one .*allowed: .*next: train with `qat: mxfp4`.*--max-kl"
    ):
        export(path, lora, tmp_path, max_kl=None)
    with pytest.raises(CheckpointError, match=r"allowed: a KL divergence of 1\.00e-09 nats"):
        export(path, lora, tmp_path, max_kl=1e-9)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["adapter"]
    assert export(path, lora, tmp_path, max_kl=9.0).layout == "mxfp4"


def test_experts_whose_sizes_the_format_does_not_have_are_refused_before_anything_is_written(
    small_tokenizer: Path, tmp_path: Path
) -> None:
    arch = dataclasses.replace(SHALLOW, hidden_size=80, vocab_size=vocabulary_size(small_tokenizer))
    ones = ((name, torch.ones(spec.shape, dtype=torch.bfloat16)) for name, spec in arch.tensor_specs("bf16").items())
    write_checkpoint(tmp_path / "model", arch, ones, "bf16", tokenizer_from=small_tokenizer)
    with pytest.raises(CheckpointError, match="80 inputs; MXFP4 needs a multiple of 32"):
        export_model(str(tmp_path / "model"), to="hf-mxfp4", output=tmp_path / "out")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["model"]


@pytest.mark.parametrize("adapter", [{"rank": 3, "alpha": 6.0, "targets": ["experts"]}, None], ids=["adapter", "all"])
def test_a_run_that_trained_rounded_experts_is_that_model_in_every_layout(
    tiny: MakeTiny, tmp_path: Path, make_run: MakeRun, capsys: pytest.CaptureFixture[str], adapter: dict | None
) -> None:
    path = tiny(SHALLOW)
    run = make_run(path, adapter=adapter, qat="mxfp4")
    if adapter is None:
        model = load(path)
        model.train_all_weights()
        params = model.trainable.tensors
        generator = torch.Generator().manual_seed(0)
        for tensor in params.values():
            tensor.mul_(1 + 0.1 * torch.randn(tensor.shape, generator=generator)).copy_(tensor.bfloat16())
    else:
        params = random_lora(arch_of(path), LoraSpec(dict.fromkeys(EXPERT_WEIGHTS, (3, 6.0)))).trainable.tensors
    optimizer = AdamW(params, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.0)
    save_checkpoint(run, step=3, params=params, optimizer=optimizer, progress={}, keep=1)
    if adapter is not None:
        of_model = export_model(str(path), to="hf-mxfp4", output=tmp_path / "of-model", adapter=str(run))
        of_run = export_model(str(run), to="hf-mxfp4", output=tmp_path / "of-run")
        assert (of_model / "model.safetensors").read_bytes() == (of_run / "model.safetensors").read_bytes()
        assert capsys.readouterr().err.count("rounding them costs nothing more") == 2
    packed = Checkpoint.open(export_model(str(run), to="hf-mxfp4", output=tmp_path / "packed"))
    said = capsys.readouterr().err
    assert "rounding them costs nothing more" in said
    assert float(re.findall(r"KL ([\d.e+-]+) nats", said)[0]) < 1e-9
    plain = Checkpoint.open(export_model(str(run), to="hf-bf16", output=tmp_path / "plain"))
    for name in EXPERT_WEIGHTS:
        module = f"model.layers.1.mlp.experts.{name}"
        parts = (packed.tensor(f"{module}_{part}").clone() for part in ("blocks", "scales"))
        assert torch.equal(dequantize_mxfp4(*parts, torch.bfloat16).mT, plain.tensor(module))
