"""Attention with sinks by torch's flash kernel for CPU, which knows masks and no sinks: see `sinks`.

Full attention takes one call a document, or one for all documents of at most a block; a window takes blocks of queries
against their own and the previous block of keys, which is linear in T. Documents that share their beginnings are taken
as `segments.Families` where that is less work.
Letters: T packed tokens, H query heads, K key-value heads, d head size, B blocks, L tokens of a block.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ossia.ops.attention import reference
from ossia.ops.attention.kept import Kept, found
from ossia.ops.attention.segments import Families, Segments
from ossia.ops.attention.sinks import include_sink, sink_gradient
from ossia.sizes import DENSE_BLOCK


def attend(
    q_THd: Tensor, k_TKd: Tensor, v_TKd: Tensor, sinks_H: Tensor, segments: Segments, window: int | None, scale: float,
    kept: Kept | None = None,
) -> Tensor:  # fmt: skip
    """As `sink_attention`, of documents that share no rows."""
    if window is None and segments.longest > DENSE_BLOCK:
        return _per_document(q_THd, k_TKd, v_TKd, sinks_H, segments, scale, kept)
    # where no document is longer than a block, its window already holds all of it
    return _in_blocks(q_THd, k_TKd, v_TKd, sinks_H, segments, window or DENSE_BLOCK, scale, kept)


def prefix(q_THd: Tensor, k_SKd: Tensor, v_SKd: Tensor, sinks_H: Tensor, window: int | None, scale: float) -> Tensor:
    """As `prefix_attention`."""
    return reference.prefix(_CpuSink.apply, q_THd, k_SKd, v_SKd, sinks_H, window, scale)


def attend_families(
    q_THd: Tensor, k_TKd: Tensor, v_TKd: Tensor, sinks_H: Tensor, families: Families, scale: float
) -> Tensor:
    """As `sink_attention`, of documents that share their beginnings."""
    outs = []
    for part in families.parts:
        q_BHLd, k_BKSd, v_BKSd = (
            x.index_select(0, rows.flatten()).view(*rows.shape, *x.shape[1:]).transpose(1, 2)
            for x, rows in ((q_THd, part.rows_q), (k_TKd, part.rows_k), (v_TKd, part.rows_k))
        )
        bias = torch.zeros(part.seen.shape, dtype=q_THd.dtype).masked_fill_(~part.seen, -torch.inf)[:, None]
        out_BHLd = _CpuSink.apply(q_BHLd, k_BKSd, v_BKSd, sinks_H, bias, scale)
        outs.append(out_BHLd.transpose(1, 2).reshape(-1, *q_THd.shape[1:]))
    return torch.cat(outs).index_select(0, families.place_T)


def _in_blocks(
    q_THd: Tensor, k_TKd: Tensor, v_TKd: Tensor, sinks_H: Tensor, segments: Segments, window: int, scale: float,
    kept: Kept | None,
) -> Tensor:  # fmt: skip
    """Blocks of `window` queries against their own and the previous block of keys: linear in T."""
    num_tokens, num_heads, head_dim = q_THd.shape
    num_blocks = -(-num_tokens // window)
    padding = num_blocks * window - num_tokens

    def blocks(x: Tensor, before: int) -> Tensor:
        return torch.nn.functional.pad(x, (0, 0, 0, 0, before, padding))

    def key_blocks(x_TKd: Tensor) -> Tensor:
        """(B, K, 2L, d): overlapping views, copied once so that the kernel sees plain strides."""
        padded = blocks(x_TKd, window)
        return padded.unfold(0, 2 * window, window).permute(0, 1, 3, 2).contiguous()

    q_BHLd = blocks(q_THd, 0).view(num_blocks, window, num_heads, head_dim).transpose(1, 2)
    mask = segments.block_mask(window)
    bias = torch.zeros(mask.shape, dtype=q_THd.dtype, device=q_THd.device).masked_fill(~mask, -torch.inf)
    out_BHLd = _CpuSink.apply(q_BHLd, key_blocks(k_TKd), key_blocks(v_TKd), sinks_H, bias, scale, kept)
    return out_BHLd.transpose(1, 2).reshape(-1, num_heads, head_dim)[:num_tokens]


def _per_document(
    q_THd: Tensor, k_TKd: Tensor, v_TKd: Tensor, sinks_H: Tensor, segments: Segments, scale: float,
    kept: Kept | None,
) -> Tensor:  # fmt: skip
    """One causal kernel call a document."""
    outs = []
    for q, k, v in zip(*(x.split(segments.lengths) for x in (q_THd, k_TKd, v_TKd)), strict=True):
        q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
        outs.append(_CpuSink.apply(q, k, v, sinks_H, None, scale, kept)[0].transpose(0, 1))
    return torch.cat(outs)


class _CpuSink(torch.autograd.Function):
    """torch's flash attention for CPU with a sink; is_causal where no bias is given."""

    @staticmethod
    def forward(ctx, q_BHLd, k_BKLd, v_BKLd, sinks_H, bias, scale, kept=None):
        def compute() -> tuple[Tensor, ...]:
            out, lse_BHL = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
                q_BHLd, k_BKLd, v_BKLd, 0.0, bias is None, attn_mask=bias, scale=scale
            )
            return include_sink(out, lse_BHL, sinks_H.float()[:, None])

        out, lse_BHL = found(kept, compute)
        ctx.save_for_backward(q_BHLd, k_BKLd, v_BKLd, out, lse_BHL, sinks_H, bias)
        ctx.scale = scale
        return out

    @staticmethod
    def backward(ctx, grad_out):
        q, k, v, out, lse, sinks_H, bias = ctx.saved_tensors
        dq, dk, dv = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            grad_out, q, k, v, out, lse, 0.0, bias is None, attn_mask=bias, scale=ctx.scale
        )
        dsinks = None
        if ctx.needs_input_grad[3]:
            slope = (grad_out.float() * out.float()).sum(-1)
            dsinks = sink_gradient(sinks_H, lse.transpose(0, 1), slope.transpose(0, 1))
        return dq, dk, dv, dsinks, None, None, None
