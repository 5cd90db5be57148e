"""Training in float16, for GPUs without bfloat16: activations beyond its range, and gradients below it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from ossia.data.pack import Pack, pack_samples
from ossia.engine import Engine, Request, Sampling
from ossia.model.checkpoint import Checkpoint
from ossia.model.lora import TARGETS, Lora, LoraSpec
from ossia.model.transformer import Transformer
from ossia.model.weights import Placement, Weights
from ossia.ops import linear, moe
from ossia.train import step as step_module
from ossia.train.optim import AdamW
from ossia.train.schedule import forward_backward
from ossia.train.step import train_step
from tests.conftest import MakeTiny
from tests.oracle.model_pairs import CPU
from tests.shapes import SMALL
from tests.train.test_step import samples

LARGEST = torch.finfo(torch.float16).max
OUTLIER = 3  # the hidden dimension that a few experts write numbers beyond float16 to


def model_of(tiny: MakeTiny, dtype: torch.dtype, *, outliers: bool, placement: Placement = "bf16") -> Transformer:
    weights = Weights(Checkpoint.open(tiny(SMALL)), placement, dtype, CPU)
    if outliers:
        weights._expanded[1, "down_proj"][:, OUTLIER] *= 2.0**17
    lora = Lora.fresh(weights.arch, LoraSpec(dict.fromkeys(TARGETS, (4, 8.0))), seed=0, device=CPU)
    generator = torch.Generator().manual_seed(1)
    for name, tensor in lora.trainable.tensors.items():
        if name.endswith("lora_B"):
            tensor.copy_(torch.randn(tensor.shape, generator=generator) * 0.01)
    return Transformer(weights, lora=lora)


def step_of(model: Transformer, packs: list[Pack], scale: float) -> tuple[float, dict[str, Tensor]]:
    total = float(sum(pack.weights.sum() for pack in packs))
    model.trainable.zero_grad()
    loss = forward_backward(
        model, packs, lambda logp, m, rows: -(packs[m].weights[rows] * logp).sum() / total, recompute=True,
        loss_scale=scale,
    )  # fmt: skip
    return loss, {name: tensor.grad for name, tensor in model.trainable.tensors.items()}


def largest_residual(model: Transformer, packs: list[Pack]) -> float:
    micro, x = packs[0], model.embed(packs[0].ids)
    context, found = model.context(micro), 0.0
    with torch.no_grad():
        for index in range(model.arch.num_layers):
            x = model.layer_forward(model.fetch(index), x, context)
            found = max(found, float(x.abs().max()))
    return found


def error(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """Of all gradients together, relative."""
    total = sum(float((found[name] - grad).double().square().sum()) for name, grad in expected.items())
    return (total / sum(float(grad.double().square().sum()) for grad in expected.values())) ** 0.5


def test_activations_beyond_float16_stay_finite_and_near_float32(tiny: MakeTiny) -> None:
    packs = pack_samples(samples((60, 40)), 128)
    exact = model_of(tiny, torch.float32, outliers=True)
    assert 2 * LARGEST < largest_residual(exact, packs) < 60 * LARGEST
    loss, grads = step_of(exact, packs, 1.0)
    half, half_grads = step_of(model_of(tiny, torch.float16, outliers=True), packs, 64.0)
    _, brain_grads = step_of(model_of(tiny, torch.bfloat16, outliers=True), packs, 1.0)
    assert half == pytest.approx(loss, rel=1e-3)
    # through the norm of an outlier a gradient is a small difference of large numbers, in any type
    assert error(half_grads, grads) < 0.5 * error(brain_grads, grads)


def test_without_what_keeps_them_in_range_they_are_not_finite(tiny: MakeTiny, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear, "NARROW", 1.0)
    monkeypatch.setattr(moe, "NARROW", 1.0)
    packs = pack_samples(samples((60, 40)), 128)
    found, _ = step_of(model_of(tiny, torch.float16, outliers=True), packs, 64.0)
    assert not torch.tensor(found).isfinite()


@pytest.mark.parametrize("placement", ["bf16", "mmap"])
def test_float16_is_nearer_to_float32_than_bfloat16_is(tiny: MakeTiny, placement: Placement) -> None:
    packs = pack_samples(samples((60, 40)), 128)
    _, grads = step_of(model_of(tiny, torch.float32, outliers=False), packs, 1.0)
    _, half = step_of(model_of(tiny, torch.float16, outliers=False, placement=placement), packs, 64.0)
    _, brain = step_of(model_of(tiny, torch.bfloat16, outliers=False, placement=placement), packs, 1.0)
    assert error(half, grads) < 0.5 * error(brain, grads)


def test_gradients_too_small_for_float16_are_kept_by_the_scale_of_a_step(tiny: MakeTiny) -> None:
    packs, results = pack_samples(samples((60, 40)), 128), []
    for dtype, scale in ((torch.float32, 1.0), (torch.float16, 1.0), (torch.float16, 2.0**20)):
        model = model_of(tiny, dtype, outliers=False)
        model.trainable.zero_grad()

        def one_of_a_million(logp_R: Tensor, micro: int, rows_R: Tensor) -> Tensor:
            return -1e-6 * logp_R.mean()

        forward_backward(model, packs, one_of_a_million, recompute=True, loss_scale=scale)
        results.append({name: tensor.grad for name, tensor in model.trainable.tensors.items()})
    assert error(results[1], results[0]) > 0.1
    assert error(results[2], results[0]) < 0.01


def test_a_step_whose_gradient_overflows_is_taken_with_a_smaller_scale(
    tiny: MakeTiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, packs = model_of(tiny, torch.float16, outliers=False), pack_samples(samples((60, 40)), 128)
    exact = step_of(model_of(tiny, torch.float32, outliers=False), packs, 1.0)[1]
    scales: list[float] = []

    def noted(*args: Any, **options: Any) -> float:
        scales.append(options["loss_scale"])
        return forward_backward(*args, **{**options, "loss_scale": options["loss_scale"] * 2.0**14})

    monkeypatch.setattr(step_module, "forward_backward", noted)
    seen: dict[str, Tensor] = {}

    class Noting(AdamW):
        def update(self, **options: Any) -> float:
            seen.update({name: tensor.grad.clone() for name, tensor in self.params.items()})
            return super().update(**options)

    optimizer = Noting(model.trainable.tensors, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.0)
    result = train_step(model, optimizer, packs, lr=1e-3, clip=1.0, recompute=True)
    assert scales[0] == 64.0  # the power of two from the number of predictions on
    assert scales == [scales[0] / 2**n for n in range(len(scales))]
    assert len(scales) > 1
    assert result.grad_norm < 100
    assert error(seen, exact) <= 2e-2


def test_training_in_float16_lowers_the_loss(tiny: MakeTiny) -> None:
    model, packs = model_of(tiny, torch.float16, outliers=True), pack_samples(samples((60, 40)), 128)
    optimizer = AdamW(model.trainable.tensors, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.0)
    losses = [train_step(model, optimizer, packs, lr=3e-3, clip=1.0, recompute=True).loss for _ in range(8)]
    assert losses[-1] < losses[0] - 0.1


@pytest.mark.parametrize("placement", ["bf16", "mmap"])
def test_generation_in_float16_goes_through_the_same_numbers(tiny: MakeTiny, placement: Placement) -> None:
    prompts = [[1, 2, 3, 4], [7, 8]]
    found = []
    for dtype in (torch.float32, torch.float16):
        model = model_of(tiny, dtype, outliers=placement == "bf16", placement=placement)
        requests = [Request(prompt, Sampling(temperature=0), 6) for prompt in prompts]
        found.append(Engine(model).generate(requests))
    for half, exact in zip(found[1], found[0], strict=True):
        assert half.ids == exact.ids
        assert half.logprobs == pytest.approx(exact.logprobs, abs=2e-2)
