"""What stands between the experts' matrix products: bias, clamped SwiGLU, and the weighted sum of each token's rows.

Forward and backward of each, one pass over memory and without atomics, so that results repeat bit for bit. Inputs that
are to be added (a product and its adapter's) come as two tensors and are added on the way. Computed in float32.
Reference: `ops.moe`. Letters: T tokens, K experts per token, N = T * K rows sorted by expert, E experts, I width,
D hidden.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 1024


@triton.jit
def _read(x, extra, bias, at, bias_at, inside, EXTRA: tl.constexpr, ROUND: tl.constexpr):
    """x + extra + bias; rounded to x's dtype where ROUND, which is where the torch reference rounds it."""
    value = tl.load(x + at, mask=inside, other=0).to(tl.float32)
    if EXTRA:
        value += tl.load(extra + at, mask=inside, other=0).to(tl.float32)
    value += tl.load(bias + bias_at, mask=inside, other=0).to(tl.float32)
    return value.to(x.dtype.element_ty).to(tl.float32) if ROUND else value


@triton.jit
def _swiglu(h, extra, bias, expert_N, out, width, limit, alpha, EXTRA: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    expert = tl.load(expert_N + row).to(tl.int64)
    at, bias_at = row * 2 * width + column, expert * 2 * width + column
    gate = _read(h, extra, bias, at, bias_at, inside, EXTRA, True)
    up = _read(h, extra, bias, at + width, bias_at + width, inside, EXTRA, True)
    gate = tl.minimum(gate, limit)
    up = tl.minimum(tl.maximum(up, -limit), limit)
    value = gate * tl.sigmoid(alpha * gate) * (up + 1)
    tl.store(out + row * width + column, value.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _swiglu_back(grad, h, extra, bias, expert_N, dh, width, limit, alpha, EXTRA: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    expert = tl.load(expert_N + row).to(tl.int64)
    at, bias_at = row * 2 * width + column, expert * 2 * width + column
    gate_raw = _read(h, extra, bias, at, bias_at, inside, EXTRA, True)
    up_raw = _read(h, extra, bias, at + width, bias_at + width, inside, EXTRA, True)
    gate = tl.minimum(gate_raw, limit)
    up = tl.minimum(tl.maximum(up_raw, -limit), limit)
    share = tl.sigmoid(alpha * gate)
    dout = tl.load(grad + row * width + column, mask=inside, other=0).to(tl.float32)
    dgate = dout * (up + 1) * (share + gate * alpha * share * (1 - share))
    dgate = tl.where(gate_raw <= limit, dgate, 0.0)
    dup = tl.where((up_raw <= limit) & (up_raw >= -limit), dout * gate * share, 0.0)
    tl.store(dh + at, dgate.to(dh.dtype.element_ty), mask=inside)
    tl.store(dh + at + width, dup.to(dh.dtype.element_ty), mask=inside)


@triton.jit
def _combine(
    y, extra, bias, weights_TK, row_TK, experts_TK, residual, out, width,
    K: tl.constexpr, EXTRA: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    total = tl.load(residual + token * width + column, mask=inside, other=0).to(tl.float32)
    for k in tl.static_range(K):
        row = tl.load(row_TK + token * K + k).to(tl.int64)
        expert = tl.load(experts_TK + token * K + k).to(tl.int64)
        weight = tl.load(weights_TK + token * K + k).to(tl.float32)
        total += weight * _read(y, extra, bias, row * width + column, expert * width + column, inside, EXTRA, False)
    tl.store(out + token * width + column, total.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _combine_back(
    grad, y, extra, bias, weights_TK, row_TK, experts_TK, dy, dweights_TK, width,
    K: tl.constexpr, EXTRA: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    choice = tl.program_id(0).to(tl.int64)
    token = choice // K
    row = tl.load(row_TK + choice).to(tl.int64)
    expert = tl.load(experts_TK + choice).to(tl.int64)
    weight = tl.load(weights_TK + choice).to(tl.float32)
    slope = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, width, BLOCK):
        column = start + tl.arange(0, BLOCK)
        inside = column < width
        dout = tl.load(grad + token * width + column, mask=inside, other=0).to(tl.float32)
        slope += dout * _read(y, extra, bias, row * width + column, expert * width + column, inside, EXTRA, False)
        tl.store(dy + row * width + column, (weight * dout).to(dy.dtype.element_ty), mask=inside)
    tl.store(dweights_TK + choice, tl.sum(slope, 0).to(dweights_TK.dtype.element_ty))


@triton.jit
def _sum_rows(x, row_TK, out, width, K: tl.constexpr, BLOCK: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    total = tl.zeros((BLOCK,), tl.float32)
    for k in tl.static_range(K):
        row = tl.load(row_TK + token * K + k).to(tl.int64)
        total += tl.load(x + row * width + column, mask=inside, other=0).to(tl.float32)
    tl.store(out + token * width + column, total.to(out.dtype.element_ty), mask=inside)


def swiglu(
    h_NJ: Tensor, extra_NJ: Tensor | None, bias_EJ: Tensor, expert_N: Tensor, limit: float, alpha: float
) -> Tensor:
    """Clamped SwiGLU of h + extra + bias, J = 2 I: the gate half, then the up half. Returns (N, I)."""
    rows, width = len(h_NJ), h_NJ.shape[1] // 2
    out = h_NJ.new_empty(rows, width)
    other = h_NJ if extra_NJ is None else extra_NJ
    _swiglu[(rows, triton.cdiv(width, _BLOCK))](
        h_NJ, other, bias_EJ, expert_N, out, width, limit, alpha, EXTRA=extra_NJ is not None, BLOCK=_BLOCK
    )
    return out


def swiglu_backward(
    grad_NI: Tensor, h_NJ: Tensor, extra_NJ: Tensor | None, bias_EJ: Tensor, expert_N: Tensor, limit: float,
    alpha: float,
) -> Tensor:  # fmt: skip
    """The gradient in h (and in extra, and row by row in the bias): (N, 2 I)."""
    dh = torch.empty_like(h_NJ)
    rows, width = grad_NI.shape
    other = h_NJ if extra_NJ is None else extra_NJ
    _swiglu_back[(rows, triton.cdiv(width, _BLOCK))](
        grad_NI, h_NJ, other, bias_EJ, expert_N, dh, width, limit, alpha, EXTRA=extra_NJ is not None, BLOCK=_BLOCK
    )
    return dh


def combine(
    y_ND: Tensor, extra_ND: Tensor | None, bias_ED: Tensor, weights_TK: Tensor, row_TK: Tensor, experts_TK: Tensor,
    residual_TD: Tensor,
) -> Tensor:  # fmt: skip
    """residual + sum over k of weight * (y + extra + bias of the expert). Returns (T, D)."""
    (tokens, top_k), width = weights_TK.shape, y_ND.shape[1]
    out = torch.empty_like(residual_TD)
    other = y_ND if extra_ND is None else extra_ND
    _combine[(tokens, triton.cdiv(width, _BLOCK))](
        y_ND, other, bias_ED, weights_TK, row_TK, experts_TK, residual_TD, out, width,
        K=top_k, EXTRA=extra_ND is not None, BLOCK=_BLOCK,
    )  # fmt: skip
    return out


def combine_backward(
    grad_TD: Tensor, y_ND: Tensor, extra_ND: Tensor | None, bias_ED: Tensor, weights_TK: Tensor, row_TK: Tensor,
    experts_TK: Tensor,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The gradients in y (and in extra, and row by row in the bias), (N, D), and in the weights, (T, K)."""
    dy, dweights = torch.empty_like(y_ND), torch.empty_like(weights_TK)
    other = y_ND if extra_ND is None else extra_ND
    _combine_back[(weights_TK.numel(),)](
        grad_TD, y_ND, other, bias_ED, weights_TK, row_TK, experts_TK, dy, dweights, y_ND.shape[1],
        K=weights_TK.shape[1], EXTRA=extra_ND is not None, BLOCK=_BLOCK,
    )  # fmt: skip
    return dy, dweights


def sum_rows(x_ND: Tensor, row_TK: Tensor) -> Tensor:
    """The sum of each token's rows, (T, D): the gradient of having copied a token to its experts."""
    (tokens, top_k), width = row_TK.shape, x_ND.shape[1]
    out = x_ND.new_empty(tokens, width)
    _sum_rows[(tokens, triton.cdiv(width, _BLOCK))](x_ND, row_TK, out, width, K=top_k, BLOCK=_BLOCK)
    return out
