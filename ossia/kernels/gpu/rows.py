"""Passes over the rows of activations: RMS normalisation, rotary positions, a sink taken into attention, exponentials.

Reference: `ops.linear.rms_norm`, `ops.rope.apply_rope`, `ops.attention`, `ops.loss`. Computed in float32.
Letters: T tokens, D hidden, H heads, d head size, F = d / 2, N rows, B tokens of a vocabulary block.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _norm(x, weight, out, inverse, width, eps, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < width
    value = tl.load(x + row * width + column, mask=inside, other=0).to(tl.float32)
    scale = 1 / tl.sqrt(tl.sum(value * value, 0) / width + eps)
    normed = value * scale * tl.load(weight + column, mask=inside, other=0).to(tl.float32)
    tl.store(out + row * width + column, normed.to(out.dtype.element_ty), mask=inside)
    tl.store(inverse + row, scale)


@triton.jit
def _norm_back(grad, x, weight, inverse, dx, width, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < width
    scale = tl.load(inverse + row)
    normed = tl.load(x + row * width + column, mask=inside, other=0).to(tl.float32) * scale
    dnormed = tl.load(grad + row * width + column, mask=inside, other=0).to(tl.float32)
    dnormed *= tl.load(weight + column, mask=inside, other=0).to(tl.float32)
    slope = (dnormed - normed * (tl.sum(dnormed * normed, 0) / width)) * scale
    tl.store(dx + row * width + column, slope.to(dx.dtype.element_ty), mask=inside)


@triton.jit
def _rotate(x, cos, sin, out, num_heads, x_stride, out_stride, sign, HALF: tl.constexpr, HEADS: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    place = tl.arange(0, HALF)
    c = tl.load(cos + token * HALF + place).to(tl.float32)[None]
    s = tl.load(sin + token * HALF + place).to(tl.float32)[None] * sign
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    at = head[:, None] * 2 * HALF + place[None]
    inside = head[:, None] < num_heads
    first = tl.load(x + token * x_stride + at, mask=inside, other=0).to(tl.float32)
    second = tl.load(x + token * x_stride + at + HALF, mask=inside, other=0).to(tl.float32)
    at += token * out_stride
    tl.store(out + at, (first * c - second * s).to(out.dtype.element_ty), mask=inside)
    tl.store(out + at + HALF, (second * c + first * s).to(out.dtype.element_ty), mask=inside)


@triton.jit
def _sink(out, lse_HT, sinks, tokens, num_heads, HEADS: tl.constexpr, SIZE: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    inside = head < num_heads
    lse = tl.load(lse_HT + head * tokens + token, mask=inside, other=0)
    sink = tl.load(sinks + head, mask=inside, other=0).to(tl.float32)
    at = (token * num_heads + head[:, None]) * SIZE + tl.arange(0, SIZE)[None]
    value = tl.load(out + at, mask=inside[:, None], other=0).to(tl.float32) * tl.sigmoid(lse - sink)[:, None]
    tl.store(out + at, value.to(out.dtype.element_ty), mask=inside[:, None])
    top = tl.maximum(lse, sink)
    tl.store(lse_HT + head * tokens + token, top + tl.log(tl.exp(lse - top) + tl.exp(sink - top)), mask=inside)


@triton.jit
def _exponentials(logits, column_N, top_N, total_N, shrink_N, stride, width, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < width
    target = tl.load(column_N + row)
    value = tl.load(logits + row * stride + column, mask=inside, other=-float("inf")).to(tl.float32)
    value = tl.where(column == target, -float("inf"), value)
    before = tl.load(top_N + row)
    top = tl.maximum(before, tl.max(value, 0))
    power = tl.exp(value - top).to(logits.dtype.element_ty)
    tl.store(logits + row * stride + column, power, mask=inside)
    shrink = tl.exp(before - top)
    tl.store(total_N + row, tl.load(total_N + row) * shrink + tl.sum(power.to(tl.float32), 0))
    tl.store(top_N + row, top)
    tl.store(shrink_N + row, shrink)


def rms_norm(x_TD: Tensor, weight_D: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """The normed rows, (T, D), and 1 / their root mean square, (T,) float32."""
    rows, width = x_TD.shape
    out = torch.empty(rows, width, dtype=weight_D.dtype, device=x_TD.device)
    inverse = torch.empty(rows, dtype=torch.float32, device=x_TD.device)
    _norm[(rows,)](x_TD, weight_D, out, inverse, width, eps, BLOCK=triton.next_power_of_2(width))
    return out, inverse


def rms_norm_backward(grad_TD: Tensor, x_TD: Tensor, weight_D: Tensor, inverse_T: Tensor) -> Tensor:
    """The gradient in x: (T, D)."""
    rows, width = x_TD.shape
    dx = torch.empty_like(x_TD)
    _norm_back[(rows,)](grad_TD, x_TD, weight_D, inverse_T, dx, width, BLOCK=triton.next_power_of_2(width))
    return dx


def rotate(x_THd: Tensor, cos_TF: Tensor, sin_TF: Tensor, *, back: bool, out: Tensor | None = None) -> Tensor:
    """Each head turned by its position's angle, or turned back, which is the gradient.

    x_THd    tokens may lie apart; heads that do are copied first
    out      where to write, x itself for example; None: a new tensor
    Returns  (T, H, d)
    """
    tokens, heads, size = x_THd.shape
    if x_THd.stride()[1:] != (size, 1):
        x_THd = x_THd.contiguous()
    out = torch.empty(x_THd.shape, dtype=x_THd.dtype, device=x_THd.device) if out is None else out
    block = min(16, triton.next_power_of_2(heads))
    _rotate[(tokens, triton.cdiv(heads, block))](
        x_THd, cos_TF, sin_TF, out, heads, x_THd.stride(0), out.stride(0), -1.0 if back else 1.0,
        HALF=size // 2, HEADS=block,
    )  # fmt: skip
    return out


def include_sink_(out_THd: Tensor, lse_HT: Tensor, sinks_H: Tensor) -> None:
    """Attention without a sink becomes attention with one: `out` and `lse` (float32) are changed in place."""
    tokens, heads, size = out_THd.shape
    block = min(16, triton.next_power_of_2(heads))
    _sink[(tokens, triton.cdiv(heads, block))](out_THd, lse_HT, sinks_H, tokens, heads, HEADS=block, SIZE=size)


def exponentials_(logits_NB: Tensor, column_N: Tensor, top_N: Tensor, total_N: Tensor) -> Tensor:
    """A block of logits becomes exp(logit - top), 0 at each row's target; `top` and `total` (float32) go along.

    logits_NB  rows of any stride
    column_N   (N,) the target's column in this block, or one outside it
    Returns    (N,) float32: what sums made so far shrink by, since `top` has grown
    """
    rows, width = logits_NB.shape
    assert logits_NB.stride(1) == 1
    shrink_N = torch.empty_like(total_N)
    _exponentials[(rows,)](
        logits_NB, column_N, top_N, total_N, shrink_N, logits_NB.stride(0), width,
        BLOCK=triton.next_power_of_2(width), num_warps=8,
    )  # fmt: skip
    return shrink_N
