"""The passes of training in C against their references in torch, and the grouped product in few sizes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ossia.kernels import passes_for, pick_kernels
from ossia.kernels.cpu.build import Unavailable
from ossia.kernels.cpu.grouped import _pieces, grouped_mm
from ossia.kernels.cpu.passes import load_passes
from ossia.ops.fused import TORCH, Parts, parts_for
from ossia.ops.loss import _put_at_targets, _take_in_torch
from ossia.ops.moe import Expert, route

FLOATS = [torch.float32, torch.bfloat16]


@pytest.fixture
def fused() -> Parts:
    if isinstance(found := load_passes(), Unavailable):
        pytest.skip(found.reason)
    return parts_for("c")


@pytest.fixture
def threads() -> Iterator[None]:
    """Whatever a test sets is undone."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def error(found: Tensor, expected: Tensor) -> float:
    """Of the whole tensor, relative."""
    assert found.shape == expected.shape
    assert found.dtype == expected.dtype
    difference = (found.double() - expected.double()).norm()
    return float(difference / expected.double().norm().clamp(min=1e-30))


def bound(dtype: torch.dtype) -> float:
    return 1e-6 if dtype == torch.float32 else 8e-3


def random(*shape: int, seed: int, dtype: torch.dtype = torch.float32, scale: float = 1.0) -> Tensor:
    return (torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale).to(dtype)


def expert(experts: int, fan_out: int, fan_in: int, seed: int, dtype: torch.dtype, *, adapted: bool) -> Expert:
    shapes = ((experts, 3, fan_in), (experts, fan_out, 3)) if adapted else ()
    factors = [random(*shape, seed=seed + i, dtype=dtype, scale=0.3) for i, shape in enumerate(shapes)]
    weight = random(experts, fan_out, fan_in, seed=seed + 5, dtype=dtype, scale=3 * fan_in**-0.5)
    return Expert(weight, random(experts, fan_out, seed=seed + 7, dtype=dtype), *factors)


def mixture_results(parts: Parts, dtype: torch.dtype, *, adapted: bool, tokens: int = 53) -> list[Tensor]:
    """Output and every gradient of a mixture; experts 2 and 5 get no token, the others differ in theirs."""
    experts, hidden, width = 9, 40, 24
    names = ("weight", "bias", "lora_a", "lora_b") if adapted else ("weight", "bias")
    mine = [
        replace(one, **{name: getattr(one, name).requires_grad_() for name in names})
        for one in (
            expert(experts, 2 * width, hidden, 10, dtype, adapted=adapted),
            expert(experts, hidden, width, 20, dtype, adapted=adapted),
        )
    ]
    logits = random(tokens, experts, seed=3)
    logits[:, [2, 5]] = -9
    leaves = [
        random(tokens, hidden, seed=0, dtype=dtype).requires_grad_(),
        random(tokens, hidden, seed=1, dtype=dtype, scale=2).requires_grad_(),
        logits.to(dtype).requires_grad_(),
    ]
    out = parts.mixture(leaves[0], leaves[1], route(leaves[2], 3), *mine, 1.5, 1.702, lambda *_: None)
    out.backward(random(tokens, hidden, seed=5, dtype=dtype))
    trained = [getattr(one, name) for one in mine for name in names]
    return [out.detach(), *(tensor.grad for tensor in (*leaves, *trained))]


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("adapted", [False, True])
def test_the_mixture_of_experts_and_every_gradient(fused: Parts, dtype: torch.dtype, adapted: bool) -> None:
    expected, found = (mixture_results(parts, dtype, adapted=adapted) for parts in (TORCH, fused))
    assert len(expected) == (12 if adapted else 8)
    for mine, theirs in zip(found, expected, strict=True):
        assert error(mine, theirs) <= 2 * bound(dtype)


def test_a_bfloat16_mixture_rounds_where_torch_does(fused: Parts) -> None:
    expected, found = (mixture_results(parts, torch.bfloat16, adapted=False)[0] for parts in (TORCH, fused))
    assert error(found, expected) <= 1e-3  # a few results lie just beside a rounding's edge


@pytest.mark.parametrize("dtype", FLOATS)
def test_bits_do_not_depend_on_the_number_of_threads(fused: Parts, dtype: torch.dtype, threads: None) -> None:
    many = random(700, 1, seed=0)  # rows enough for two threads
    results = []
    for count in (1, 2, 2):
        torch.set_num_threads(count)
        x, bias, ends = random(700, 96, seed=1, dtype=dtype), random(2, 96, seed=2, dtype=dtype), torch.tensor([7, 700])
        expert_N = (torch.arange(700) >= 7).long()
        passes = passes_for("c")
        dh = passes.swiglu_backward(x[:, :48].contiguous(), x, None, bias, expert_N, 1.0, 1.7)
        sums = passes.sum_by_expert(dh, ends.to(torch.int32))
        gradient = passes.rms_norm_weight_gradient(dh, x, many[:, 0].contiguous())
        results.append((passes.swiglu(x, None, bias, expert_N, 1.0, 1.7), dh, sums, gradient))
    for mine in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(mine, results[0], strict=True))


def test_a_gradient_is_zero_where_a_clamp_holds_and_what_is_no_number_stays_so(fused: Parts) -> None:
    h = torch.tensor([[2.0, 1.0, torch.nan, -9.0, -2.0, 1.0, 0.0, 2.0]])  # gates, then ups
    passes, bias, expert_N = passes_for("c"), torch.zeros(1, 8), torch.zeros(1, dtype=torch.int64)
    dh = passes.swiglu_backward(torch.ones(1, 4), h, None, bias, expert_N, 1.5, 1.7)[0]
    assert dh.isnan().tolist() == [False, False, True, False, False, False, True, False]
    assert (dh == 0).tolist() == [True, False, False, False, True, False, False, True]
    assert passes.swiglu(h, None, bias, expert_N, 1.5, 1.7).isnan().tolist() == [[False, False, True, False]]


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("width", [64, 90])
def test_normalised_rows_and_their_gradients(fused: Parts, dtype: torch.dtype, width: int) -> None:
    results = []
    for parts in (TORCH, fused):
        x, weight = random(300, width, seed=0, dtype=dtype), random(width, seed=1, dtype=dtype) + 1
        leaves = x.requires_grad_(), weight.requires_grad_()
        out = parts.rms_norm(*leaves, 1e-5)
        out.backward(random(300, width, seed=2, dtype=dtype))
        results.append((out.detach(), leaves[0].grad, leaves[1].grad))
    for mine, theirs in zip(results[1], results[0], strict=True):
        assert error(mine, theirs) <= bound(dtype)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("size", [32, 20])
def test_turned_heads_and_their_gradients_of_any_strides(fused: Parts, dtype: torch.dtype, size: int) -> None:
    angle = random(7, size // 2, seed=1, scale=3)
    cos, sin = (1.3 * angle.cos()).to(dtype), (1.3 * angle.sin()).to(dtype)
    results = []
    for parts in (TORCH, fused):
        leaf = random(7, 3, size, seed=0, dtype=dtype).requires_grad_()
        out = parts.apply_rope(leaf, cos, sin)
        out.backward(random(3, 7, size, seed=2, dtype=dtype).transpose(0, 1))
        results.append((out.detach(), leaf.grad))
    assert torch.equal(results[1][0], results[0][0]) or dtype == torch.float32
    for mine, theirs in zip(results[1], results[0], strict=True):
        assert error(mine, theirs) <= bound(dtype)


@pytest.mark.parametrize("dtype", FLOATS)
def test_exponentials_of_a_block_of_logits_with_the_sums_so_far(fused: Parts, dtype: torch.dtype) -> None:
    before = random(6, 50, seed=0, dtype=dtype, scale=4)
    top, total = before.amax(1).float(), torch.full((6,), 2.0)
    logits = random(6, 100, seed=1, dtype=dtype, scale=6)[:, :77]
    column = torch.tensor([0, 76, -5, 77, 90, 30])
    exact = logits.double()
    _put_at_targets(exact, column, torch.full((6,), -torch.inf))
    mine, theirs = (tuple(x.clone() for x in (logits, column, top, total)) for _ in range(2))
    found, expected = passes_for("c").exponentials_(*mine), _take_in_torch(*theirs)
    assert torch.equal(mine[2], theirs[2])
    assert error(found, expected) <= 1e-6
    assert error(mine[0].double(), (exact - mine[2].double()[:, None]).exp()) <= bound(dtype)
    assert error(mine[3], total * found + mine[0].float().sum(1)) <= 1e-6
    assert float(mine[0][5, 30]) == 0


@pytest.mark.parametrize(("tokens", "experts", "top_k"), [(500, 9, 3), (1, 4, 4), (40, 64, 1), (0, 5, 2)])
def test_choices_sorted_by_expert(fused: Parts, tokens: int, experts: int, top_k: int) -> None:
    chosen = random(tokens, experts, seed=0).topk(top_k, -1).indices
    for mine, theirs in zip(fused.sort(chosen, experts), TORCH.sort(chosen, experts), strict=True):
        assert torch.equal(mine, theirs)


COUNTS = [[33, 0, 1, 500, 17, 64, 0, 129, 31], [0] * 9, [5, *[0] * 7, 300], [300, *[0] * 8]]


@pytest.mark.parametrize("counts", COUNTS)
def test_a_grouped_product_in_few_sizes_is_the_grouped_product(counts: list[int]) -> None:
    ends, rows = torch.tensor(counts).cumsum(0).to(torch.int32), sum(counts)
    x = random(rows, 40, seed=0, dtype=torch.bfloat16).requires_grad_()
    weight = random(9, 56, 40, seed=1, dtype=torch.bfloat16)
    weight[[one for one, count in enumerate(counts) if not count]] = torch.nan
    weight.requires_grad_()
    results = []
    for product in (grouped_mm(x, weight.transpose(1, 2), ends), F.grouped_mm(x, weight.transpose(1, 2), offs=ends)):
        gradients = torch.autograd.grad(product, (x, weight), random(rows, 56, seed=2, dtype=torch.bfloat16))
        results.append((product.detach(), *gradients))
    for mine, theirs in zip(*results, strict=True):
        assert error(mine, theirs) <= 1e-3


def test_the_sizes_of_a_grouped_product_are_few() -> None:
    sizes = set()
    for seed in range(50):
        ends = torch.rand(9, generator=torch.Generator().manual_seed(seed)).mul(900).long().cumsum(0).tolist()
        pieces = list(_pieces(ends))
        assert all(start < end <= ends[-1] for _, start, end in pieces)
        sizes |= {end - start for _, start, end in pieces}
    assert all(size % (1 << max(0, size.bit_length() - 4)) == 0 for size in sizes)
    assert len(sizes) > 40


def test_c_is_picked_where_it_can_be_and_torch_elsewhere(fused: Parts) -> None:
    cpu = torch.device("cpu")
    assert [pick_kernels(cpu, dtype) for dtype in (*FLOATS, torch.float16, torch.float64)] == [*"cc", "torch", "torch"]
    assert pick_kernels(torch.device("meta"), torch.float32) == "torch"
