"""Merged experts in MXFP4: one path for training and export, bytes that stay, and gradients that pass through."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from ossia.data.pack import Pack
from ossia.export import write_model
from ossia.model.arch import Layout
from ossia.model.lora import LoraSpec
from ossia.model.transformer import Transformer
from ossia.model.weights import EXPERT_WEIGHTS, Placement, Weights
from ossia.ops.mxfp4 import dequantize_mxfp4, quantize_mxfp4
from ossia.train.schedule import Micro, forward_backward, logprobs
from tests.conftest import MakeTiny
from tests.export.conftest import EVERYTHING, arch_of, random_lora
from tests.oracle.model_pairs import documents, load, pack_of
from tests.shapes import SHALLOW

EXPERTS_ALONE = LoraSpec(dict.fromkeys(EXPERT_WEIGHTS, (3, 6.0)))
GATE_UP_ALONE = LoraSpec({"gate_up_proj": (3, 6.0)})


def rounding(path: Path, placement: Placement = "mmap", spec: LoraSpec = EVERYTHING) -> Transformer:
    model = load(path, placement=placement, lora=random_lora(arch_of(path), spec))
    model.qat = True
    return model


def expert_bits(model: Transformer, layer: int, name: str) -> Tensor:
    with torch.no_grad():
        return model.expert_weight(layer, name).view(torch.int32)


@pytest.mark.parametrize("layout", ["mxfp4", "bf16"])
@pytest.mark.parametrize("spec", [EVERYTHING, GATE_UP_ALONE], ids=["everything", "gate_up"])
@pytest.mark.parametrize("placement", ["mmap", "resident", "bf16", "stream"])
def test_the_export_holds_bit_for_bit_what_the_forward_pass_computed_with(
    tiny: MakeTiny, tmp_path: Path, layout: Layout, spec: LoraSpec, placement: Placement
) -> None:
    path = tiny(SHALLOW, layout)
    model = rounding(path, placement, spec)
    for expert in (1, 4):  # to which training sent no token
        model.lora.trainable.tensors["model.layers.1.mlp.experts.gate_up_proj.lora_B"][expert] = 0
    write_model(tmp_path / "out", model, tokenizer_from=path, layout="mxfp4")
    exported = load(tmp_path / "out")
    assert exported.weights.checkpoint.layout == "mxfp4"
    for layer in range(SHALLOW.num_layers):
        for name in EXPERT_WEIGHTS:
            assert torch.equal(expert_bits(model, layer, name), expert_bits(exported, layer, name)), (layer, name)


def test_a_model_that_is_trained_whole_is_exported_as_its_forward_pass_rounded_it(
    tiny: MakeTiny, tmp_path: Path
) -> None:
    path = tiny(SHALLOW)
    model = load(path)
    model.qat = True
    model.train_all_weights()
    generator = torch.Generator().manual_seed(0)
    for tensor in model.trainable.tensors.values():
        tensor.mul_(1 + 0.1 * torch.randn(tensor.shape, generator=generator))
    write_model(tmp_path / "out", model, tokenizer_from=path, layout="mxfp4")
    exported = load(tmp_path / "out")
    for name in EXPERT_WEIGHTS:
        assert torch.equal(expert_bits(model, 1, name), expert_bits(exported, 1, name)), name
        master = model.trainable.tensors[f"model.layers.1.mlp.experts.{name}"]
        assert torch.equal(
            expert_bits(model, 1, name), dequantize_mxfp4(*quantize_mxfp4(master), torch.float32).view(torch.int32)
        )


class StraightThrough(Transformer):
    """The definition: merged weights in autograd's graph, what rounding adds to them a constant."""

    def expert_weight(self, index: int, projection: str) -> Tensor:
        module = f"model.layers.{index}.mlp.experts.{projection}"
        if self.lora is None:
            merged = self.trainable.tensors[module] * 1.0
        else:
            a, b = (self.trainable.tensors[f"{module}.lora_{side}"].double() for side in "AB")
            merged = self.weights.expert_weight(index, projection) + self.lora.spec.scale(projection) * (b @ a)
            merged = merged.float()
        rounded = dequantize_mxfp4(*quantize_mxfp4(merged.detach()), torch.float32)
        return merged + (rounded - merged).detach()


def by_autograd(model: Transformer, packs: list[Pack]) -> tuple[float, dict[str, Tensor]]:
    """Loss and gradients of experts; each pack through a whole graph."""
    leaves = {name: tensor.requires_grad_() for name, tensor in model.trainable.tensors.items() if ".experts." in name}
    total, last = torch.zeros(()), model.arch.num_layers - 1
    for pack in packs:
        micro = Micro.of(model, pack)
        x = model.embed(micro.ids)
        for index in range(model.arch.num_layers):
            x = model.layer_forward(model.fetch(index), x, micro.context, **micro.in_layer(index, last))
        total = total - logprobs(model, micro, x, model.head()).sum() / 7
    total.backward()
    return float(total.detach()), {name: leaf.grad for name, leaf in leaves.items() if not name.endswith("_bias")}


@pytest.mark.parametrize("recompute", [True, False], ids=["recompute", "kept"])
@pytest.mark.parametrize("trained", ["adapter, mmap", "adapter, bf16", "all weights"])
def test_gradients_pass_through_the_rounding(tiny: MakeTiny, trained: str, recompute: bool) -> None:
    path = tiny(SHALLOW)

    def make(kind: type[Transformer]) -> Transformer:
        weights = load(path, placement="bf16" if trained.endswith("bf16") else "mmap").weights
        lora = None if trained == "all weights" else random_lora(arch_of(path), EXPERTS_ALONE)
        model = kind(weights, lora=lora, qat=True)
        if lora is None:
            model.train_all_weights()
        return model

    model, packs = make(Transformer), [pack_of([sample]) for sample in documents(arch_of(path), (30, 21))]
    loss = forward_backward(model, packs, lambda logp, m, rows: -logp.sum() / 7, recompute=recompute)
    expected_loss, expected = by_autograd(make(StraightThrough), packs)
    assert loss == pytest.approx(expected_loss, rel=1e-6)
    assert len(expected) == 2 * SHALLOW.num_layers * (1 if trained == "all weights" else 2)
    for name, grad in expected.items():
        assert float(grad.norm()) > 0, name
        assert float((model.trainable.tensors[name].grad - grad).norm() / grad.norm()) < 1e-5, name


def test_the_factors_gradients_are_the_closed_form(tiny: MakeTiny) -> None:
    lora = random_lora(arch_of(tiny(SHALLOW)), EXPERTS_ALONE)
    name = "model.layers.0.mlp.experts.gate_up_proj"
    a, b, scale = lora.factors(name)
    grad = torch.randn(len(a), b.shape[1], a.shape[2], generator=torch.Generator().manual_seed(0))
    for times in (1, 2):  # the second micro-batch is added to the first
        lora.add_grad(name, grad)
        for side, expected in (("A", scale * b.mT @ grad), ("B", scale * grad @ a.mT)):
            torch.testing.assert_close(lora.trainable.tensors[f"{name}.lora_{side}"].grad, times * expected)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("placement", ["resident", "stream", "bf16"])
def test_a_gpu_rounds_experts_to_the_bytes_that_are_exported_and_trains_through_it(
    tiny: MakeTiny, tmp_path: Path, placement: Placement
) -> None:
    path, device = tiny(SHALLOW), torch.device("cuda")
    base = rounding(path)
    weights = Weights(base.weights.checkpoint, placement, torch.bfloat16, device)
    model = Transformer(weights, lora=base.lora.to(device), qat=True)
    packs = [pack_of([sample]) for sample in documents(arch_of(path), (30, 21))]
    expected = forward_backward(base, packs, lambda logp, m, rows: -logp.sum() / 7, recompute=True)
    on_device = [pack.to(device) for pack in packs]
    loss = forward_backward(model, on_device, lambda logp, m, rows: -logp.sum() / 7, recompute=True)
    assert float(loss) == pytest.approx(float(expected), rel=2e-2)
    for name, tensor in base.trainable.tensors.items():
        if ".experts." in name:
            found = model.trainable.tensors[name].grad.cpu()
            assert float((found - tensor.grad).norm() / tensor.grad.norm()) < 0.1, name
    write_model(tmp_path / "out", model, tokenizer_from=path, layout="mxfp4")
    exported = load(tmp_path / "out", dtype=torch.bfloat16)
    for layer in range(SHALLOW.num_layers):
        for name in EXPERT_WEIGHTS:
            with torch.no_grad():
                mine, theirs = model.expert_weight(layer, name).cpu(), exported.expert_weight(layer, name)
            assert torch.equal(mine.view(torch.int16), theirs.view(torch.int16)), (layer, name)
