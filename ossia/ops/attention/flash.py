"""Attention with sinks by the varlen flash kernels behind torch's `aten` operators, which know no sinks: see `sinks`.

torch brings FlashAttention 2. Its registry puts FlashAttention 3 or 4 under the same operators where their packages are
installed; which of them answers is a state of the whole process, so every call says which it means.
Letters: T packed tokens, S keys, H query heads, K key-value heads, d head size.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.nn.attention import (
    activate_flash_attention_impl,
    current_flash_attention_impl,
    restore_flash_attention_impl,
)

from ossia.kernels import pick_kernels
from ossia.ops.attention.kept import Kept, found
from ossia.ops.attention.segments import Segments
from ossia.ops.attention.sinks import include_sink, sink_gradient

Implementation = Literal["FA3", "FA4"]


def attend(
    implementation: Implementation | None,
    q_THd: Tensor,
    k_TKd: Tensor,
    v_TKd: Tensor,
    sinks_H: Tensor,
    segments: Segments,
    window: int | None,
    scale: float,
    kept: Kept | None = None,
) -> Tensor:
    """As `sink_attention`, of documents that share no rows. implementation  None: torch's own"""
    return _FlashSink.apply(implementation, q_THd, k_TKd, v_TKd, sinks_H, segments, window, scale, kept)


def prefix(
    implementation: Implementation | None,
    q_THd: Tensor,
    k_SKd: Tensor,
    v_SKd: Tensor,
    sinks_H: Tensor,
    window: int | None,
    scale: float,
) -> Tensor:
    """As `prefix_attention`: varlen flash attention aligns the last query with the last key."""
    _use(implementation)
    ends_q, ends_k = (torch.tensor([0, len(x)], dtype=torch.int32, device=x.device) for x in (q_THd, k_SKd))
    out, lse_HT, *_ = torch.ops.aten._flash_attention_forward(
        q_THd, k_SKd, v_SKd, ends_q, ends_k, len(q_THd), len(k_SKd), 0.0, True, False, scale=scale,
        window_size_left=-1 if window is None else window - 1, window_size_right=0,
    )  # fmt: skip
    return _include_sink_in(out, lse_HT, sinks_H)[0]


def _use(implementation: Implementation | None) -> None:
    current = current_flash_attention_impl()
    if current == implementation:
        return
    if implementation is None:
        restore_flash_attention_impl()
    else:
        activate_flash_attention_impl(implementation)


def _include_sink_in(out_THd: Tensor, lse_HT: Tensor, sinks_H: Tensor) -> tuple[Tensor, Tensor]:
    """`_include_sink` on a GPU: in one pass and in place where there is Triton. Returns (T, H, d), (H, T)."""
    if pick_kernels(out_THd.device, out_THd.dtype) == "triton":
        from ossia.kernels.gpu.rows import include_sink_

        include_sink_(out_THd, lse_HT, sinks_H)
        return out_THd, lse_HT
    out_THd, lse_TH = include_sink(out_THd, lse_HT.transpose(0, 1), sinks_H.float())
    return out_THd, lse_TH.transpose(0, 1).contiguous()


class _FlashSink(torch.autograd.Function):
    """The stock forward and backward, the sink taken in between."""

    @staticmethod
    def forward(ctx, implementation, q_THd, k_TKd, v_TKd, sinks_H, segments, window, scale, kept):
        _use(implementation)
        cu = segments.starts.to(torch.int32).to(q_THd.device)
        bounds = {"scale": scale, "window_size_left": -1 if window is None else window - 1, "window_size_right": 0}

        def compute() -> tuple[Tensor, ...]:
            out, lse_HT, rng, unused, _ = torch.ops.aten._flash_attention_forward(
                q_THd, k_TKd, v_TKd, cu, cu, segments.longest, segments.longest, 0.0, True, False, **bounds
            )
            return *_include_sink_in(out, lse_HT, sinks_H), rng, unused

        out, lse_HT, rng, unused = found(kept, compute)
        ctx.save_for_backward(q_THd, k_TKd, v_TKd, out, lse_HT, sinks_H, cu, rng, unused)
        ctx.implementation, ctx.longest, ctx.bounds = implementation, segments.longest, bounds
        return out

    @staticmethod
    def backward(ctx, grad_out):
        q, k, v, out, lse_HT, sinks_H, cu, rng, unused = ctx.saved_tensors
        _use(ctx.implementation)
        dq, dk, dv = torch.ops.aten._flash_attention_backward(
            grad_out.contiguous(), q, k, v, out, lse_HT, cu, cu, ctx.longest, ctx.longest, 0.0, True, rng, unused,
            **ctx.bounds,
        )  # fmt: skip
        dsinks = None
        if ctx.needs_input_grad[4]:
            dsinks = sink_gradient(sinks_H, lse_HT, (grad_out.float() * out.float()).sum(-1).transpose(0, 1))
        return None, dq, dk, dv, dsinks, None, None, None, None
