"""Attention with sinks by our own Triton kernels, for GPUs without a flash kernel; see `kernels.gpu.attention`."""

from __future__ import annotations

import torch
from torch import Tensor

from ossia.ops.attention.kept import Kept, found
from ossia.ops.attention.segments import Segments
from ossia.ops.attention.sinks import sink_gradient


def attend(
    q_THd: Tensor, k_TKd: Tensor, v_TKd: Tensor, sinks_H: Tensor, segments: Segments, window: int | None, scale: float,
    kept: Kept | None = None,
) -> Tensor:  # fmt: skip
    """As `sink_attention`, of documents that share no rows."""
    return _TiledSink.apply(q_THd, k_TKd, v_TKd, sinks_H, *segments.bounds(window), scale, kept)


def prefix(q_THd: Tensor, k_SKd: Tensor, v_SKd: Tensor, sinks_H: Tensor, window: int | None, scale: float) -> Tensor:
    """As `prefix_attention`."""
    from ossia.kernels.gpu.attention import forward

    place_T = torch.arange(len(k_SKd) - len(q_THd), len(k_SKd), dtype=torch.int32, device=q_THd.device)
    first_T = torch.zeros_like(place_T) if window is None else (place_T - window + 1).clamp_(min=0)
    q, k, v = (x.contiguous() for x in (q_THd, k_SKd, v_SKd))
    return forward(q, k, v, sinks_H.contiguous(), first_T, scale)[0]


class _TiledSink(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q_THd, k_TKd, v_TKd, sinks_H, first_T, last_T, scale, kept):
        from ossia.kernels.gpu.attention import forward

        q, k, v = (x.contiguous() for x in (q_THd, k_TKd, v_TKd))
        out, lse_HT = found(kept, lambda: forward(q, k, v, sinks_H.contiguous(), first_T, scale))
        ctx.save_for_backward(q, k, v, out, lse_HT, sinks_H, first_T, last_T)
        ctx.scale = scale
        return out

    @staticmethod
    def backward(ctx, grad_out):
        from ossia.kernels.gpu.attention import backward

        *given, sinks_H, first_T, last_T = ctx.saved_tensors
        dq, dk, dv, slope_HT = backward(grad_out.contiguous(), *given, first_T, last_T, ctx.scale)
        dsinks = sink_gradient(sinks_H, given[-1], slope_HT) if ctx.needs_input_grad[3] else None
        return dq, dk, dv, dsinks, None, None, None, None
