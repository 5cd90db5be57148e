"""The dense products of a decode step for one or two tokens, each in one pass over its weights.

Queries, keys and values with the norm before them, biases, adapters, rotation, and what belongs there into the cache;
the product after attention with its residual; and the router with its norm. Rounded where the references round:
`ops.linear`, `ops.rope`, `engine.cache.Lane.write`. Letters: B tokens, D hidden, H query heads, K key-value heads,
d head size, F = d / 2, I width, r rank, E experts.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

Dense = tuple[Tensor, Tensor, Tensor | None, Tensor | None]
"""Weight (O, I), bias (O,) and adapter (r, I), (O, r), or None."""

PAIRS = 2  # of numbers that are turned together, of a program
ROWS = 2
BLOCK = 4096  # of columns at a time


@triton.jit
def _inverse(x, WIDTH: tl.constexpr, ALL: tl.constexpr, eps):
    """1 / root mean square of a row."""
    column = tl.arange(0, ALL)
    value = tl.load(x + column, mask=column < WIDTH, other=0).to(tl.float32)
    return 1 / tl.sqrt(tl.sum(value * value, 0) / WIDTH + eps)


@triton.jit
def _normed(x, norm, column, inside, inverse):
    """A part of the normed row, in float32 but rounded."""
    value = tl.load(x + column, mask=inside, other=0).to(tl.float32) * inverse
    value *= tl.load(norm + column, mask=inside, other=0).to(tl.float32)
    return value.to(x.dtype.element_ty).to(tl.float32)


@triton.jit
def _shrink(x, norm, lora_a, out, rank, eps, WIDTH: tl.constexpr, ALL: tl.constexpr):
    """One number of A times the normed row."""
    r, token = tl.program_id(0), tl.program_id(1)
    x += token * WIDTH
    inverse = _inverse(x, WIDTH, ALL, eps)
    column = tl.arange(0, ALL)
    inside = column < WIDTH
    factor = tl.load(lora_a + r * WIDTH + column, mask=inside, other=0).to(tl.float32)
    total = tl.sum(factor * _normed(x, norm, column, inside, inverse), 0)
    tl.store(out + token * rank + r, total.to(out.dtype.element_ty))


@triton.jit
def _finish(total, bias, lora_b, a_x, bias_row, row, rank, RANK: tl.constexpr):
    """Bias and adapter on top of some rows' products."""
    dtype = bias.dtype.element_ty
    total = (total + tl.load(bias + bias_row).to(tl.float32)).to(dtype).to(tl.float32)
    if RANK > 0:
        r = tl.arange(0, RANK)
        shrunk = tl.load(a_x + r, mask=r < rank, other=0).to(tl.float32)[None]
        factor = tl.load(lora_b + row[:, None] * rank + r[None], mask=r[None] < rank, other=0).to(tl.float32)
        total = (total + tl.sum(factor * shrunk, 1)).to(dtype).to(tl.float32)
    return total


@triton.jit
def _qkv(
    x, norm, q, k, v, q_bias, k_bias, v_bias, a_x, lora_b, cos, sin, slots, out, pool, rank, eps,
    WIDTH: tl.constexpr, ALL: tl.constexpr, BLOCK: tl.constexpr, HEADS: tl.constexpr, KV: tl.constexpr,
    HALF: tl.constexpr, SHARE: tl.constexpr, RANK: tl.constexpr,
):  # fmt: skip
    """Some pairs of one head of one token: numbers i and i + HALF, which are turned together."""
    head, token = tl.program_id(0) // (HALF // SHARE), tl.program_id(1)
    pair = tl.program_id(0) % (HALF // SHARE) * SHARE + tl.arange(0, SHARE)
    x += token * WIDTH
    weight, bias, mine = q, q_bias, head
    if head >= HEADS + KV:
        weight, bias, mine = v, v_bias, head - HEADS - KV
    elif head >= HEADS:
        weight, bias, mine = k, k_bias, head - HEADS
    row = mine * 2 * HALF + pair
    inverse = _inverse(x, WIDTH, ALL, eps)
    first = tl.zeros((SHARE, BLOCK), tl.float32)
    second = tl.zeros((SHARE, BLOCK), tl.float32)
    for start in range(0, WIDTH, BLOCK):
        column = start + tl.arange(0, BLOCK)[None]
        inside = column < WIDTH
        at = weight + row[:, None] * WIDTH + column
        one = tl.load(at, mask=inside, other=0).to(tl.float32)
        other = tl.load(at + HALF * WIDTH, mask=inside, other=0).to(tl.float32)
        value = _normed(x, norm, column, inside, inverse)
        first += one * value
        second += other * value
    whole_row = head * 2 * HALF + pair
    a_x += token * rank
    low = _finish(tl.sum(first, 1), bias, lora_b, a_x, row, whole_row, rank, RANK)
    high = _finish(tl.sum(second, 1), bias, lora_b, a_x, row + HALF, whole_row + HALF, rank, RANK)
    if head < HEADS + KV:
        c = tl.load(cos + token * HALF + pair).to(tl.float32)
        s = tl.load(sin + token * HALF + pair).to(tl.float32)
        turned = low * c - high * s
        high = high * c + low * s
        low = turned
    if head < HEADS:
        at = out + (token * HEADS + head) * 2 * HALF + pair
        tl.store(at, low.to(out.dtype.element_ty))
        tl.store(at + HALF, high.to(out.dtype.element_ty))
    else:
        at = pool + (tl.load(slots + token).to(tl.int64) * 2 * KV + head - HEADS) * 2 * HALF + pair
        tl.store(at, low.to(pool.dtype.element_ty))
        tl.store(at + HALF, high.to(pool.dtype.element_ty))


@triton.jit
def _logit(x, norm, weight, bias, out, eps, WIDTH: tl.constexpr, ALL: tl.constexpr):
    """One output of a product with the normed row."""
    row, token = tl.program_id(0), tl.program_id(1)
    x += token * WIDTH
    column = tl.arange(0, ALL)
    inside = column < WIDTH
    factor = tl.load(weight + row * WIDTH + column, mask=inside, other=0).to(tl.float32)
    total = tl.sum(factor * _normed(x, norm, column, inside, _inverse(x, WIDTH, ALL, eps)), 0)
    total += tl.load(bias + row).to(tl.float32)
    tl.store(out + token * tl.num_programs(0) + row, total.to(out.dtype.element_ty))


@triton.jit
def _shrink_plain(x, lora_a, out, rank, WIDTH: tl.constexpr, ALL: tl.constexpr):
    """One number of A x."""
    r, token = tl.program_id(0), tl.program_id(1)
    column = tl.arange(0, ALL)
    inside = column < WIDTH
    factor = tl.load(lora_a + r * WIDTH + column, mask=inside, other=0).to(tl.float32)
    value = tl.load(x + token * WIDTH + column, mask=inside, other=0).to(tl.float32)
    tl.store(out + token * rank + r, tl.sum(factor * value, 0).to(out.dtype.element_ty))


@triton.jit
def _add_product(
    residual, x, weight, bias, a_x, lora_b, out, rank,
    SIZE: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr, RANK: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(1)
    at = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    row = tl.minimum(at, SIZE - 1)
    total = tl.zeros((ROWS, BLOCK), tl.float32)
    for start in range(0, WIDTH, BLOCK):
        column = start + tl.arange(0, BLOCK)[None]
        inside = column < WIDTH
        value = tl.load(x + token * WIDTH + column, mask=inside, other=0).to(tl.float32)
        total += tl.load(weight + row[:, None] * WIDTH + column, mask=inside, other=0).to(tl.float32) * value
    product = _finish(tl.sum(total, 1), bias, lora_b, a_x + token * rank, row, row, rank, RANK)
    product += tl.load(residual + token * SIZE + row).to(tl.float32)
    tl.store(out + token * SIZE + row, product.to(out.dtype.element_ty), mask=at < SIZE)


@dataclass(frozen=True, slots=True)
class Qkv:
    """A layer's projections and their adapters as one: A (r, D), and B (out, r) with zeros between them; or None."""

    parts: tuple[Dense, Dense, Dense]
    lora_a: Tensor | None
    lora_b: Tensor | None

    @classmethod
    def of(cls, q: Dense, k: Dense, v: Dense) -> Qkv:
        """Of the three as they are; adapters' factors are copied."""
        parts = q, k, v
        if all(lora_a is None for _, _, lora_a, _ in parts):
            return cls(parts, None, None)
        a = torch.cat([weight[:0] if lora_a is None else lora_a for weight, _, lora_a, _ in parts])
        b = torch.block_diag(*(weight[:, :0] if lora_b is None else lora_b for weight, _, _, lora_b in parts))
        return cls(parts, a.detach(), b.detach())


def qkv(
    x_BD: Tensor, norm_D: Tensor, eps: float, weights: Qkv, cos_BF: Tensor, sin_BF: Tensor, slot_B: Tensor,
    pool_SXd: Tensor,
) -> Tensor:  # fmt: skip
    """Turned queries, (B, H, d); keys and values are in slots (B,) of the pool (slots, 2 K, d) then."""
    (tokens, width), (kv_twice, size) = x_BD.shape, pool_SXd.shape[1:]
    q, k, v = weights.parts
    heads, everything = len(q[0]) // size, triton.next_power_of_2(width)
    assert x_BD.is_contiguous()
    assert all(part[0].is_contiguous() for part in weights.parts)
    a_x, rank = x_BD, 0
    if weights.lora_a is not None:
        rank = len(weights.lora_a)
        a_x = torch.empty(tokens, rank, dtype=x_BD.dtype, device=x_BD.device)
        _shrink[(rank, tokens)](x_BD, norm_D, weights.lora_a, a_x, rank, eps, WIDTH=width, ALL=everything)
    out = torch.empty(tokens, heads, size, dtype=x_BD.dtype, device=x_BD.device)
    share = min(PAIRS, size // 2)
    _qkv[((heads + kv_twice) * (size // 2 // share), tokens)](
        x_BD, norm_D, q[0], k[0], v[0], q[1], k[1], v[1], a_x,
        x_BD if weights.lora_b is None else weights.lora_b, cos_BF, sin_BF, slot_B, out, pool_SXd, rank, eps,
        WIDTH=width, ALL=everything, BLOCK=min(BLOCK, everything), HEADS=heads, KV=kv_twice // 2, HALF=size // 2,
        SHARE=share, RANK=rank and triton.next_power_of_2(rank),
    )  # fmt: skip
    return out


def logits(x_BD: Tensor, norm_D: Tensor, eps: float, router: Dense) -> Tensor:
    """The router's, without an adapter, from the rows before their norm: (B, E)."""
    (tokens, width), (weight, bias, lora_a, _) = x_BD.shape, router
    assert x_BD.is_contiguous()
    assert weight.is_contiguous()
    assert lora_a is None
    out = torch.empty(tokens, len(weight), dtype=x_BD.dtype, device=x_BD.device)
    _logit[(len(weight), tokens)](x_BD, norm_D, weight, bias, out, eps, WIDTH=width, ALL=triton.next_power_of_2(width))
    return out


def add_product(residual_BD: Tensor, x_BI: Tensor, layer: Dense) -> Tensor:
    """The residual, and on top of it weight, bias and adapter of x: (B, D)."""
    (tokens, width), size = x_BI.shape, residual_BD.shape[1]
    weight, bias, lora_a, lora_b = layer
    assert x_BI.is_contiguous()
    assert residual_BD.is_contiguous()
    assert weight.is_contiguous()
    everything, a_x, rank = triton.next_power_of_2(width), x_BI, 0
    if lora_a is not None:
        rank = len(lora_a)
        a_x = torch.empty(tokens, rank, dtype=x_BI.dtype, device=x_BI.device)
        _shrink_plain[(rank, tokens)](x_BI, lora_a.contiguous(), a_x, rank, WIDTH=width, ALL=everything)
    out = torch.empty_like(residual_BD)
    _add_product[(triton.cdiv(size, ROWS), tokens)](
        residual_BD, x_BI, weight, bias, a_x, x_BI if lora_b is None else lora_b.contiguous(), out, rank,
        SIZE=size, WIDTH=width, BLOCK=min(BLOCK, everything), ROWS=ROWS,
        RANK=rank and triton.next_power_of_2(rank),
    )  # fmt: skip
    return out
