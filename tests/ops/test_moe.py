"""Routing and experts against one-token-at-a-time arithmetic."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from ossia.kernels.cpu.pages import Room
from ossia.ops.moe import (
    Expanding,
    Expert,
    base_part,
    clamped_swiglu,
    clamped_swiglu_only,
    combine,
    project,
    route,
)

T, D, I, E, K = 9, 8, 4, 6, 2


def experts(lora: bool) -> tuple[Expert, Expert]:
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float32)

    def expert(out: int, fan_in: int) -> Expert:
        pair = (draw(E, 3, fan_in), draw(E, out, 3)) if lora else (None, None)
        return Expert(draw(E, out, fan_in), draw(E, out), *pair)

    return expert(2 * I, D), expert(D, I)


def one_by_one(x: Tensor, logits: Tensor, gate_up: Expert, down: Expert) -> Tensor:
    """The definition: for each token its k experts, in float64."""

    def apply(expert: Expert, number: int, v: Tensor) -> Tensor:
        weight = expert.weight[number].double()
        if expert.lora_a is not None:
            weight = weight + expert.lora_b[number].double() @ expert.lora_a[number].double()
        return weight @ v + expert.bias[number].double()

    out = torch.zeros_like(x, dtype=torch.float64)
    for t in range(len(x)):
        values, chosen = logits[t].double().topk(K)
        for share, number in zip(values.softmax(0), chosen.tolist(), strict=True):
            h = apply(gate_up, number, x[t].double())
            gate, up = h[:I].clamp(max=7.0), h[I:].clamp(-7.0, 7.0)
            out[t] += share * apply(down, number, (up + 1) * gate * torch.sigmoid(1.702 * gate))
    return out


def grouped(x: Tensor, logits: Tensor, gate_up: Expert, down: Expert) -> Tensor:
    routing = route(logits, K)
    hidden = clamped_swiglu(project(x[routing.token_N], gate_up, routing.ends_E), 7.0, 1.702)
    return combine(project(hidden, down, routing.ends_E), routing)


@pytest.fixture(autouse=True)
def seeded() -> None:
    """The same numbers every time: of others a few in a thousand are just beyond a bound."""
    torch.manual_seed(0)


def test_grouped_experts_equal_the_definition_with_and_without_adapters() -> None:
    x, logits = torch.randn(T, D), torch.randn(T, E)
    for lora in (False, True):
        gate_up, down = experts(lora)
        torch.testing.assert_close(
            grouped(x, logits, gate_up, down).double(), one_by_one(x, logits, gate_up, down), rtol=1e-5, atol=1e-5
        )


def test_experts_that_nobody_chose_change_nothing_and_no_token_at_all_gives_nothing() -> None:
    x, logits = torch.randn(T, D), torch.randn(T, E)
    logits[:, 3] = -100.0
    gate_up, down = experts(True)
    before = grouped(x, logits, gate_up, down)
    gate_up.weight[3] = torch.nan
    assert torch.equal(grouped(x, logits, gate_up, down), before)
    assert grouped(x[:0], logits[:0], gate_up, down).shape == (0, D)


def test_only_routed_rows_are_computed() -> None:
    routing = route(torch.randn(T, E), K)
    assert len(routing.token_N) == T * K == int(routing.ends_E[-1])
    assert torch.equal(routing.token_N.sort().values, torch.arange(T).repeat_interleave(K))


def test_replayed_experts_are_used_instead_of_the_top_k() -> None:
    logits = torch.randn(T, E)
    replay = torch.stack([torch.randperm(E)[:K] for _ in range(T)])
    routing = route(logits, K, replay)
    assert torch.equal(routing.experts_TK, replay)
    torch.testing.assert_close(routing.weights_TK, logits.gather(1, replay).softmax(-1))


def test_the_swiglu_gradient_equals_autograd_and_is_zero_where_a_clamp_holds() -> None:
    h = (torch.randn(40, 2 * I, dtype=torch.float64) * 6).requires_grad_()
    grad = torch.randn(40, I, dtype=torch.float64)
    found = torch.autograd.grad(clamped_swiglu(h, 7.0, 1.702), h, grad)[0]
    gate, up = h.chunk(2, -1)
    clamped_gate, clamped_up = gate.clamp(max=7.0), up.clamp(-7.0, 7.0)
    plain = (clamped_up + 1) * clamped_gate * torch.sigmoid(1.702 * clamped_gate)
    torch.testing.assert_close(found, torch.autograd.grad(plain, h, grad)[0])
    assert (found[:, :I][gate > 7] == 0).all()
    assert (gate > 7).any()
    assert (found[:, I:][up.abs() > 7] == 0).all()
    assert (up.abs() > 7).any()


def test_gradients_reach_router_weights_inputs_and_adapters() -> None:
    x, logits = torch.randn(T, D, requires_grad=True), torch.randn(T, E, requires_grad=True)
    gate_up, down = experts(True)
    for expert in (gate_up, down):
        for tensor in (expert.lora_a, expert.lora_b):
            tensor.requires_grad_()
    target = torch.randn(T, D)
    tensors = [x, logits, gate_up.lora_a, gate_up.lora_b, down.lora_a, down.lora_b]
    found = torch.autograd.grad((grouped(x, logits, gate_up, down) * target).sum(), tensors)
    true = torch.autograd.grad((one_by_one(x, logits, gate_up, down) * target).sum(), tensors)
    for mine, expected in zip(found, true, strict=True):
        torch.testing.assert_close(mine, expected.float(), rtol=1e-4, atol=1e-4)


def test_replayed_experts_are_used_and_where_none_was_recorded_the_router_chooses() -> None:
    logits = torch.randn(T, E, generator=torch.Generator().manual_seed(3))
    own = route(logits, K)
    other = (own.experts_TK + 1) % E
    replay = other.clone()
    replay[::2] = -1
    found = route(logits, K, replay)
    assert torch.equal(found.experts_TK[::2], own.experts_TK[::2])
    assert torch.equal(found.experts_TK[1::2], other[1::2])
    assert torch.allclose(found.weights_TK, logits.gather(-1, found.experts_TK).softmax(-1))


@pytest.mark.parametrize("at_once", [1, 2, 4, 6, 9])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_experts_expanded_in_parts_give_what_all_of_them_give(at_once: int, dtype: torch.dtype) -> None:
    # experts 1 and 4 get no row, the last part is smaller than the others where it doesn't come out even
    weight = torch.randn(E, 8, 16).to(dtype)
    bias, ends_E = torch.randn(E, 8).to(dtype), torch.tensor([5, 5, 9, 30, 30, 41], dtype=torch.int32)
    asked: list[slice] = []

    def expand(experts: slice, room: Room) -> Tensor:
        asked.append(experts)
        return room.take(weight[experts].shape, dtype).copy_(weight[experts])

    x, grad = torch.randn(41, 16).to(dtype), torch.randn(41, 8).to(dtype)
    results = []
    for given in (weight, Expanding(expand, E, at_once)):
        leaf = x.clone().requires_grad_()
        out = base_part(leaf, Expert(given, bias), ends_E)
        out.backward(grad)
        results.append((out.detach(), leaf.grad))
    for found, expected in zip(results[1], results[0], strict=True):
        assert torch.equal(found, expected)
    counts = ends_E.diff(prepend=torch.zeros(1, dtype=torch.int32)).tolist()
    parts = [slice(first, min(first + at_once, E)) for first in range(0, E, at_once)]
    with_rows = [part for part in parts if sum(counts[part])]
    assert asked == (2 * with_rows if at_once < E else [slice(None)])


def test_all_experts_expanded_together_stay_for_the_next_product_until_they_are_let_go() -> None:
    asked: list[slice] = []

    def expand(experts: slice, room: Room) -> Tensor:
        asked.append(experts)
        return torch.ones(E, 8, 16)[experts]

    packed, ends_E = Expanding(expand, E), torch.tensor([1, 2, 3, 4, 5, 6], dtype=torch.int32)
    for _ in range(2):
        base_part(torch.ones(6, 16), Expert(packed, torch.zeros(E, 8)), ends_E)
    packed.let_go()
    base_part(torch.ones(6, 16), Expert(packed, torch.zeros(E, 8)), ends_E)
    assert len(asked) == 2


def test_sums_beyond_float16_give_a_finite_output_and_gradient() -> None:
    beyond = torch.inf
    h = torch.tensor([[-beyond, beyond, 1.0, beyond, -beyond, beyond]], dtype=torch.float16).requires_grad_()
    out = clamped_swiglu(h, 7.0, 1.702)
    out.backward(torch.ones_like(out))
    assert out.isfinite().all()
    assert h.grad.isfinite().all()
    assert out.tolist()[0][0] == 0  # a gate of minus infinity is closed
    assert torch.equal(out, clamped_swiglu_only(h.detach(), 7.0, 1.702))
