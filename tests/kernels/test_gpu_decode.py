"""The Triton kernels of decoding against their references in torch: on a GPU, or on a CPU in Triton's interpreter."""

from __future__ import annotations

from dataclasses import replace
from itertools import accumulate

import pytest
import torch
from torch import Tensor

from ossia.engine.cache import attend_cached
from ossia.model.weights import split_gate_up
from ossia.ops.linear import Linear, linear, rms_norm
from ossia.ops.moe import Expert, mixture, route
from ossia.ops.mxfp4 import dequantize_mxfp4
from ossia.ops.rope import apply_rope
from tests.kernels.test_gpu_training import DEVICE, FLOATS, bound, error, random

pytest.importorskip("triton", reason="pip install 'ossia[dev-gpu]'")


def paged(
    lengths: tuple[int, ...], window: int | None, block: int, kv_heads: int, size: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """A pool of random keys and values, and a table in which blocks lie in no order."""
    need = [1 if window is not None else -(-length // block) for length in lengths]
    numbers = (torch.randperm(sum(need), generator=torch.Generator().manual_seed(9)) + 1).tolist()
    table = torch.zeros(len(lengths) + 1, max(need) + 1, dtype=torch.int32)
    for row, (first, count) in enumerate(zip([0, *accumulate(need)], need, strict=False)):
        table[row, :count] = torch.tensor(numbers[first : first + count], dtype=torch.int32)
    return random((sum(need) + 1) * block, 2 * kv_heads, size, seed=1, dtype=dtype), table.to(DEVICE)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(("window", "block"), [(None, 64), (128, 128), (16, 16)])
def test_attention_over_the_cache_of_sequences_of_all_lengths(
    dtype: torch.dtype, window: int | None, block: int
) -> None:
    from ossia.kernels.gpu.decode import attend

    lengths, kv_heads, group, size = (1, 15, 16, 63, 64, 65, 127, 128, 129, 300), 2, 4, 32
    pool, table = paged(lengths, window, block, kv_heads, size, dtype)
    row = torch.arange(len(lengths), device=DEVICE).flip(0)
    length = torch.tensor(lengths, device=DEVICE).flip(0)
    whole = random(len(lengths), kv_heads * group + 5, size, seed=2, dtype=dtype, scale=2)
    query, sinks = whole[:, : kv_heads * group], random(kv_heads * group, seed=3, dtype=dtype, scale=2)
    found = attend(query, pool, table, row, length - 1, sinks, block=block, window=window, scale=size**-0.5)
    most = max(lengths) if window is None else window
    place = torch.arange(most, device=DEVICE).expand(len(lengths), -1)
    slot = table[row].long().gather(1, place // block) * block + place % block
    keys, values = pool.float()[slot].transpose(1, 2).chunk(2, dim=1)
    seen = place < length[:, None]
    mask = torch.zeros(seen.shape, device=DEVICE).masked_fill_(~seen, -torch.inf)[:, None, None]
    expected = attend_cached(query.float(), keys, values, sinks, mask, "reference").to(dtype)
    assert error(found, expected) <= bound(dtype)


@pytest.mark.parametrize(("rows", "experts", "top_k"), [(1, 8, 4), (3, 6, 3), (70, 32, 4), (9, 1, 1)])
def test_the_chosen_experts_and_the_sort(rows: int, experts: int, top_k: int) -> None:
    from ossia.kernels.gpu.decode import choose

    logits = random(rows, experts, seed=rows)
    found, shares, order, row, ends = choose(logits, top_k)
    expected = route(logits, top_k)
    assert torch.equal(found, expected.experts_TK)
    assert error(shares, expected.weights_TK) <= 1e-6
    assert torch.equal(order, expected.order_N)
    assert torch.equal(row, expected.row_TK)
    assert torch.equal(ends, expected.ends_E)


def test_a_tie_between_experts_goes_to_the_first_and_none_is_chosen_twice() -> None:
    from ossia.kernels.gpu.decode import choose

    found = choose(torch.tensor([[1.0, 2, 2, 2, 0]], device=DEVICE), 3)[0]
    assert found.tolist() == [[1, 2, 3]]


def packed(experts: int, fan_out: int, fan_in: int, seed: int) -> tuple[Tensor, Tensor]:
    """Every code; scales from very small to large, near those that keep sums near 1."""
    generator = torch.Generator().manual_seed(seed)
    blocks = torch.randint(256, (experts, fan_out, fan_in // 32, 16), dtype=torch.uint8, generator=generator)
    scales = torch.randint(121, 124, (experts, fan_out, fan_in // 32), generator=generator).to(torch.uint8)
    scales[0, 0], scales[0, 1, 0] = 1, 128
    return blocks.to(DEVICE), scales.to(DEVICE)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("rank", [0, 1, 12])
@pytest.mark.parametrize(("rows", "alone"), [(1, True), (3, True), (3, False), (40, False)])
def test_experts_from_their_packed_weights(dtype: torch.dtype, rank: int, alone: bool, rows: int) -> None:
    from ossia.kernels.gpu import decode_experts

    experts, hidden, size, top_k = 6, 96, 64, 2
    x = random(rows, hidden, seed=0, dtype=dtype)
    residual, logits = random(rows, hidden, seed=1, dtype=dtype), random(rows, experts, seed=2)
    logits[:, 4] = -9  # an expert without a row
    if rows == 3:
        logits[:, 2] = 9  # one with all of them
    theirs, mine = [], []
    for seed, (fan_out, fan_in) in enumerate(((2 * size, hidden), (hidden, size))):
        blocks, scales = packed(experts, fan_out, fan_in, seed)
        weight = dequantize_mxfp4(blocks.cpu(), scales.cpu(), dtype).to(DEVICE)
        bias = random(experts, fan_out, seed=seed + 5, dtype=dtype)
        lora = [random(experts, *shape, seed=seed + 7 + i, dtype=dtype, scale=0.2)
                for i, shape in enumerate(((rank, fan_in), (fan_out, rank)))] if rank else [None, None]  # fmt: skip
        parts = (split_gate_up(weight) if seed == 0 else weight, bias, *lora)
        theirs.append(Expert(*(None if part is None else part.float() for part in parts)))
        mine.append((blocks, scales, bias, *lora))
    found, chosen = decode_experts.mixture(residual, x, logits.to(dtype), top_k, *mine, 3.0, 1.702, alone=alone)
    routing = route(logits.to(dtype), top_k)
    exact = replace(routing, weights_TK=routing.weights_TK.float())
    expected = mixture(residual.float(), x.float(), exact, *theirs, 3.0, 1.702, lambda *_: None).to(dtype)
    assert torch.equal(chosen, routing.experts_TK)
    assert error(found, expected) <= bound(dtype)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("alone", [True, False])
def test_every_code_under_small_and_large_scales_is_multiplied_exactly(dtype: torch.dtype, alone: bool) -> None:
    """A token has one input of 1, the others are 0: what comes out are that input's weights."""
    from ossia.kernels.gpu.decode_experts import _Routed

    size, groups = 16, 18  # more than are looked at together
    # the interpreter rounds bfloat16's subnormal numbers to zero; a GPU doesn't
    lowest = 1 if DEVICE.type == "cuda" or dtype == torch.float32 else 3
    scales = torch.linspace(lowest, 251, size * groups).round().to(torch.uint8).view(1, size, groups)
    blocks = (torch.arange(scales.numel() * 16) * 7 % 256).to(torch.uint8).view(1, size, groups, 16)
    inputs = torch.arange(0, groups * 32, 23)
    x = torch.eye(groups * 32, dtype=dtype)[inputs]
    unit = 8 if alone else 4
    x = x.view(len(x), -1, unit).transpose(1, 2).reshape(len(x), -1)  # arranged
    if alone:
        x = x.float() * 2.0**100
    number = torch.arange(len(x), device=DEVICE)
    ends = torch.tensor([len(x)], dtype=torch.int32, device=DEVICE)
    routed = _Routed(torch.zeros_like(number)[:, None], number, ends, dtype, alone)
    found = torch.empty(len(x), size, dtype=dtype, device=DEVICE)
    bias = torch.zeros(1, size, dtype=dtype, device=DEVICE)
    packed = blocks.to(DEVICE), scales.to(DEVICE)
    routed.project(x.to(DEVICE), (*packed, bias, None, None), found, None)
    assert torch.equal(found.cpu().t(), dequantize_mxfp4(blocks, scales, dtype)[0][:, inputs])


def dense(fan_out: int, fan_in: int, rank: int, seed: int, dtype: torch.dtype) -> Linear:
    """A projection with bias, and an adapter where the rank isn't 0."""
    shapes = ((fan_out, fan_in), (fan_out,), (rank, fan_in), (fan_out, rank))
    tensors = [random(*shape, seed=seed + i, dtype=dtype, scale=0.1) for i, shape in enumerate(shapes)]
    return Linear(*tensors[:2], *(tensors[2:] if rank else ()))


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("ranks", [(0, 0, 0), (3, 0, 8)])
def test_queries_keys_and_values_of_a_token_from_its_norm_to_the_cache(
    dtype: torch.dtype, ranks: tuple[int, ...]
) -> None:
    from ossia.engine.decode import _dense
    from ossia.kernels.gpu.decode_dense import Qkv, qkv

    width, heads, kv_heads, size, tokens = 640, 4, 2, 32, 2
    x, norm = random(tokens, width, seed=0, dtype=dtype), random(width, seed=1, dtype=dtype)
    parts = [
        dense(count * size, width, rank, 10 * i, dtype)
        for i, (count, rank) in enumerate(zip((heads, kv_heads, kv_heads), ranks, strict=True), 1)
    ]
    angle = random(tokens, size // 2, seed=2)
    cos, sin, slot = angle.cos().to(dtype), angle.sin().to(dtype), torch.tensor([5, 2], device=DEVICE)
    pool = torch.zeros(7, 2 * kv_heads, size, dtype=dtype, device=DEVICE)
    found = qkv(x, norm, 1e-5, Qkv.of(*map(_dense, parts)), cos, sin, slot, pool)
    normed = rms_norm(x, norm, 1e-5)
    q, k, v = (linear(normed, part).view(tokens, -1, size) for part in parts)
    assert error(found, apply_rope(q, cos, sin)) <= bound(dtype)
    assert error(pool[slot, :kv_heads], apply_rope(k, cos, sin)) <= bound(dtype)
    assert error(pool[slot, kv_heads:], v) <= bound(dtype)
    assert not pool[[0, 1, 3, 4, 6]].any()


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("rank", [0, 5])
def test_a_product_on_top_of_the_residual(dtype: torch.dtype, rank: int) -> None:
    from ossia.engine.decode import _dense
    from ossia.kernels.gpu.decode_dense import add_product

    layer = dense(100, 640, rank, 0, dtype)
    residual, x = random(2, 100, seed=8, dtype=dtype), random(2, 640, seed=9, dtype=dtype)
    assert error(add_product(residual, x, _dense(layer)), residual + linear(x, layer)) <= bound(dtype)


@pytest.mark.parametrize("dtype", FLOATS)
def test_the_router_from_before_its_norm(dtype: torch.dtype) -> None:
    from ossia.engine.decode import _dense
    from ossia.kernels.gpu.decode_dense import logits

    x, norm, router = random(2, 96, seed=0, dtype=dtype), random(96, seed=1, dtype=dtype), dense(6, 96, 0, 2, dtype)
    expected = linear(rms_norm(x, norm, 1e-5), router)
    assert error(logits(x, norm, 1e-5, _dense(router)), expected) <= bound(dtype)


@pytest.mark.parametrize("alone", [True, False])
def test_experts_of_rows_that_are_not_normed_yet(alone: bool) -> None:
    from ossia.kernels.gpu import decode_experts

    experts, hidden, size = 6, 96, 64
    x, residual = random(2, hidden, seed=0), random(2, hidden, seed=1)
    norm, logits = random(hidden, seed=2), random(2, experts, seed=3)
    parts = [
        (*packed(experts, fan_out, fan_in, fan_out), random(experts, fan_out, seed=fan_out), None, None)
        for fan_out, fan_in in ((2 * size, hidden), (hidden, size))
    ]
    how = {"alone": alone, "wide": False}
    expected, _ = decode_experts.mixture(residual, rms_norm(x, norm, 1e-5), logits, 2, *parts, 3.0, 1.7, **how)
    found, _ = decode_experts.mixture(residual, x, logits, 2, *parts, 3.0, 1.7, norm=(norm, 1e-5), **how)
    assert error(found, expected) <= 1e-6
