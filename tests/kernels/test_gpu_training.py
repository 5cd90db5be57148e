"""The Triton kernels of training against their references in torch: on a GPU, or on a CPU in Triton's interpreter."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from ossia.data.pack import Pack
from ossia.model.lora import TARGETS
from ossia.model.transformer import Transformer
from ossia.model.weights import split_gate_up
from ossia.ops.attention.sinks import include_sink
from ossia.ops.fused import TORCH, parts_for
from ossia.ops.loss import _take_in_torch, linear_logprob, weighted_nll
from ossia.ops.moe import Expert, route
from ossia.ops.mxfp4 import dequantize_mxfp4
from ossia.train.schedule import forward_backward
from tests.conftest import MakeTiny
from tests.engine.support import adapter
from tests.engine.test_engine import NARROW
from tests.oracle.model_pairs import documents, load

pytest.importorskip("triton", reason="pip install 'ossia[dev-gpu]'")

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
FLOATS = [torch.float32, torch.bfloat16]


def error(found: Tensor, expected: Tensor) -> float:
    """Of the whole tensor, relative."""
    assert found.shape == expected.shape
    assert found.dtype == expected.dtype
    difference = (found.double() - expected.double()).norm()
    return float(difference / expected.double().norm().clamp(min=1e-30))


def bound(dtype: torch.dtype) -> float:
    """The interpreter cuts float32 off where a GPU rounds it to bfloat16."""
    return 1e-5 if dtype == torch.float32 else 8e-3 if DEVICE.type == "cuda" else 1.6e-2


def random(*shape: int, seed: int, dtype: torch.dtype = torch.float32, scale: float = 1.0) -> Tensor:
    return (torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale).to(DEVICE, dtype)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("split", [False, True])
def test_every_byte_and_every_scale_expands_to_the_same_bits(dtype: torch.dtype, split: bool) -> None:
    from ossia.kernels.gpu.dequant import dequantize

    # the interpreter rounds bfloat16's subnormal numbers to zero; a GPU doesn't
    lowest = 0 if DEVICE.type == "cuda" or dtype == torch.float32 else 3
    scales = torch.arange(256, dtype=torch.uint8).clamp(min=lowest).repeat(3)[: 2 * 4 * 90].view(2, 4, 90)
    blocks = (torch.arange(scales.numel() * 16) * 7 % 256).to(torch.uint8).view(2, 4, 90, 16)
    found = dequantize(blocks.to(DEVICE), scales.to(DEVICE), dtype, split=split).cpu()
    expected = dequantize_mxfp4(blocks, scales, dtype)
    expected = split_gate_up(expected) if split else expected
    assert torch.equal(found.isnan(), expected.isnan())
    bits = torch.int32 if dtype == torch.float32 else torch.int16
    assert torch.equal(found.nan_to_num(0).view(bits), expected.nan_to_num(0).view(bits))


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("width", [64, 90])
def test_normalised_rows_and_their_gradients(dtype: torch.dtype, width: int) -> None:
    x, weight = random(5, width, seed=0, dtype=dtype), random(width, seed=1, dtype=dtype) + 1
    grad = random(5, width, seed=2, dtype=dtype)
    results = []
    for parts in (TORCH, parts_for("triton")):
        leaves = x.clone().requires_grad_(), weight.clone().requires_grad_()
        out = parts.rms_norm(*leaves, 1e-5)
        out.backward(grad)
        results.append((out.detach(), leaves[0].grad, leaves[1].grad))
    for mine, theirs in zip(results[1], results[0], strict=True):
        assert error(mine, theirs) <= bound(dtype)


def test_a_float32_stream_beyond_float16_is_normalised_to_float16() -> None:
    x, weight = random(5, 90, seed=0, scale=1e6), random(90, seed=1, dtype=torch.float16) + 1
    grad = random(5, 90, seed=2, dtype=torch.float16)
    results = []
    for parts in (TORCH, parts_for("triton", torch.float16)):
        leaves = x.clone().requires_grad_(), weight.clone().requires_grad_()
        out = parts.rms_norm(*leaves, 1e-5)
        out.backward(grad)
        assert (out.dtype, leaves[0].grad.dtype, leaves[1].grad.dtype) == (torch.float16, torch.float32, torch.float16)
        results.append((out.detach(), leaves[0].grad, leaves[1].grad))
    for mine, theirs in zip(results[1], results[0], strict=True):
        assert error(mine, theirs) <= 1e-3


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("heads", [1, 8, 20])
def test_turned_heads_and_their_gradients(dtype: torch.dtype, heads: int) -> None:
    x, angle = random(7, heads, 32, seed=0, dtype=dtype), random(7, 16, seed=1, scale=3)
    cos, sin = (1.3 * angle.cos()).to(dtype), (1.3 * angle.sin()).to(dtype)
    grad = random(7, heads, 32, seed=2, dtype=dtype)
    results = []
    for parts in (TORCH, parts_for("triton")):
        leaf = x.clone().requires_grad_()
        out = parts.apply_rope(leaf, cos, sin)
        out.backward(grad)
        results.append((out.detach(), leaf.grad))
    for mine, theirs in zip(results[1], results[0], strict=True):
        assert error(mine, theirs) <= bound(dtype)


def test_a_sink_taken_in_afterwards() -> None:
    from ossia.kernels.gpu.rows import include_sink_

    out, lse, sinks = random(9, 20, 16, seed=0), random(20, 9, seed=1, scale=5), random(20, seed=2, scale=3)
    expected, expected_lse = include_sink(out, lse.t(), sinks)
    include_sink_(out, lse, sinks)
    assert error(out, expected) <= 1e-6
    assert error(lse, expected_lse.t()) <= 1e-6


@pytest.mark.parametrize("dtype", FLOATS)
def test_exponentials_of_a_block_of_logits_with_the_sums_so_far(dtype: torch.dtype) -> None:
    from ossia.kernels.gpu.rows import exponentials_

    before = random(6, 50, seed=0, dtype=dtype, scale=4)
    top, total = before.amax(1).float(), torch.full((6,), 2.0, device=DEVICE)
    logits = random(6, 100, seed=1, dtype=dtype, scale=6)[:, :77]
    column = torch.tensor([0, 76, -5, 77, 90, 30], device=DEVICE)
    mine, theirs = (tuple(x.clone() for x in (logits, column, top, total)) for _ in range(2))
    found, expected = exponentials_(*mine), _take_in_torch(*theirs)
    assert error(found, expected) <= bound(dtype)
    for a, b in zip(mine, theirs, strict=True):
        assert error(a, b) <= bound(dtype)
    assert float(mine[0][5, 30]) == 0


def mixture_inputs(dtype: torch.dtype, *, adapted: bool) -> tuple[Tensor, Tensor, Tensor, Expert, Expert]:
    """Residual, normed, router logits; experts 2 and 5 get no token. Sums beyond the clamps occur."""
    experts, hidden, width, rank = 6, 64, 32, 8

    def expert(fan_out: int, fan_in: int, seed: int) -> Expert:
        weight = random(experts, fan_out, fan_in, seed=seed, dtype=dtype, scale=fan_in**-0.5)
        lora = [random(experts, *shape, seed=seed + i, dtype=dtype, scale=0.3) for i, shape in
                enumerate(((rank, fan_in), (fan_out, rank)))] if adapted else [None, None]  # fmt: skip
        return Expert(weight, random(experts, fan_out, seed=seed + 7, dtype=dtype), *lora)

    logits = random(11, experts, seed=3)
    logits[:, [2, 5]] = -9
    x = random(11, hidden, seed=1, dtype=dtype, scale=2)
    return (
        random(11, hidden, seed=0, dtype=dtype),
        x,
        logits.to(dtype),
        expert(2 * width, hidden, 10),
        expert(hidden, width, 20),
    )


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("adapted", [False, True])
def test_the_mixture_of_experts_and_every_gradient(dtype: torch.dtype, adapted: bool) -> None:
    residual, x, logits, gate_up, down = mixture_inputs(dtype, adapted=adapted)
    grad = random(11, 64, seed=5, dtype=dtype)
    results = []
    for parts in (TORCH, parts_for("triton")):
        leaves = [tensor.clone().requires_grad_() for tensor in (residual, x, logits)]
        mine = [
            replace(one, **{name: getattr(one, name).clone().requires_grad_() for name in names})
            for one in (gate_up, down)
            for names in [("bias", "lora_a", "lora_b") if adapted else ("bias",)]
        ]
        routing = route(leaves[2], 3)
        out = parts.mixture(leaves[0], leaves[1], routing, *mine, 1.5, 1.702, lambda *_: None)
        out.backward(grad)
        trained = [tensor for one in mine for tensor in (one.bias, one.lora_a, one.lora_b) if tensor is not None]
        results.append([out.detach(), *(tensor.grad for tensor in (*leaves, *trained))])
    assert len(results[0]) == (10 if adapted else 6)
    for mine, theirs in zip(results[1], results[0], strict=True):
        assert error(mine, theirs) <= 2 * bound(dtype)


def test_a_step_with_the_kernels_has_the_loss_and_the_gradients_of_a_step_without(tiny: MakeTiny) -> None:
    base = load(tiny(NARROW))
    lora = adapter(base, *TARGETS).to(DEVICE)
    pack = Pack.from_samples(documents(base.arch, (5, 20, 1, 34)))
    results = []
    for kernels in ("torch", "triton"):
        weights = type(base.weights)(base.weights.checkpoint, "resident", torch.float32, DEVICE)
        model = Transformer(weights, lora=lora, kernels=kernels)
        model.trainable.zero_grad()
        loss = forward_backward(
            model, [pack], lambda logp, _, rows: weighted_nll(logp, pack.weights.to(DEVICE)[rows], 10.0), recompute=True
        )
        results.append((loss, {name: tensor.grad for name, tensor in model.trainable.tensors.items()}))
    (loss, grads), (found, found_grads) = results
    assert found == pytest.approx(loss, rel=1e-5)
    assert {name for name, grad in grads.items() if grad is not None} == set(found_grads)
    worst = max(error(found_grads[name], grads[name]) for name in grads)
    assert worst <= 1e-4


def test_a_step_as_a_gpu_without_bfloat16_takes_it_is_near_one_in_float32(tiny: MakeTiny) -> None:
    """float16, Ossia's attention, norms and rotation in Triton, experts in parts and their tokens in chunks."""
    base = load(tiny(NARROW))
    lora = adapter(base, *TARGETS).to(DEVICE)
    pack = Pack.from_samples(documents(base.arch, (5, 1, 19)))
    results = []
    for dtype, how in (
        (torch.float32, {}),
        (torch.float16, {"experts_at_once": 3, "tokens_at_once": 16, "loss_scale": 16.0}),
    ):
        model = Transformer(type(base.weights)(base.weights.checkpoint, "resident", dtype, DEVICE), lora=lora)
        if dtype == torch.float16:
            model = Transformer(model.weights, lora=lora, kernels="triton")
            model.backend = "triton"  # not through its record: here it is interpreted
        model.trainable.zero_grad()
        loss = forward_backward(
            model, [pack], lambda logp, _, rows: weighted_nll(logp, pack.weights.to(DEVICE)[rows], 10.0),
            recompute=True, **how,
        )  # fmt: skip
        results.append((loss, {name: tensor.grad for name, tensor in model.trainable.tensors.items()}))
    (loss, grads), (found, found_grads) = results
    assert found == pytest.approx(loss, rel=1e-3)
    assert max(error(found_grads[name], grads[name]) for name in grads) <= 3e-2


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE.type == "cpu", reason="needs a CUDA device")
def test_log_probabilities_on_a_gpu_are_those_of_float64() -> None:
    # more rows and tokens than a block there
    hidden, head = random(5000, 64, seed=0, dtype=torch.bfloat16), random(20_000, 64, seed=1, dtype=torch.bfloat16)
    targets = torch.randint(20_000, (5000,), generator=torch.Generator().manual_seed(2)).to(DEVICE)
    leaf = hidden.clone().requires_grad_()
    logp = linear_logprob(leaf, head, targets)
    logp.sum().backward()
    exact = hidden.double().requires_grad_()
    expected = torch.log_softmax(exact @ head.double().t(), -1).gather(1, targets[:, None])[:, 0]
    expected.sum().backward()
    assert error(logp.double().detach(), expected.detach()) <= 3e-3  # logits of up to 50 are rounded to bfloat16
    assert error(leaf.grad.double(), exact.grad) <= 2e-2


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE.type == "cpu", reason="needs a CUDA device")
def test_a_head_in_the_machines_memory_gives_the_bits_of_one_on_the_gpu() -> None:
    hidden, head = random(5000, 64, seed=0, dtype=torch.bfloat16), random(20_000, 64, seed=1, dtype=torch.bfloat16)
    targets = torch.randint(20_000, (5000,), generator=torch.Generator().manual_seed(2)).to(DEVICE)
    results = []
    for place in (head, head.cpu().pin_memory(), head.cpu()):
        leaf = hidden.clone().requires_grad_()
        logp = linear_logprob(leaf, place, targets)
        logp.sum().backward()
        results.append((logp.detach(), leaf.grad))
    for found in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found, results[0], strict=True))
