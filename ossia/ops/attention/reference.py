"""Attention with sinks by its definition, with plain autograd: what every backend is held against.

Letters: T packed tokens, H query heads, K key-value heads, d head size, B batch, L queries, S keys.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ossia.ops.attention.kept import Kept
from ossia.ops.attention.segments import Segments


def attend(
    q_THd: Tensor, k_TKd: Tensor, v_TKd: Tensor, sinks_H: Tensor, segments: Segments, window: int | None, scale: float,
    kept: Kept | None = None,
) -> Tensor:  # fmt: skip
    """The definition over all T x T pairs. Autograd needs all of its numbers, so that nothing is kept."""
    i = torch.arange(segments.num_tokens, device=q_THd.device)
    seen_TT = (segments.doc_T[:, None] == segments.doc_T[None]) & (i[None] <= i[:, None])
    if window is not None:
        seen_TT &= i[None] > i[:, None] - window
    bias_TT = torch.zeros(seen_TT.shape, device=q_THd.device).masked_fill_(~seen_TT, -torch.inf)
    q, k, v = (x.transpose(0, 1)[None] for x in (q_THd, k_TKd, v_TKd))
    return dense_attention(q, k, v, sinks_H, bias_TT, scale)[0].transpose(0, 1)


def dense_attention(
    q_BHLd: Tensor, k_BKSd: Tensor, v_BKSd: Tensor, sinks_H: Tensor, bias: Tensor | None, scale: float
) -> Tensor:
    """The definition of attention with sinks, in float32, on any device, with plain autograd.

    bias     added to the scores, broadcast against (B, H, L, S): -inf where a key isn't seen; None: all are
    Returns  (B, H, L, d) of q's dtype
    """
    groups = q_BHLd.shape[1] // k_BKSd.shape[1]
    k, v = (x.float().repeat_interleave(groups, dim=1) for x in (k_BKSd, v_BKSd))
    scores_BHLS = torch.matmul(q_BHLd.float(), k.transpose(-1, -2)) * scale
    if bias is not None:
        scores_BHLS = scores_BHLS + bias.float()
    sinks = sinks_H.float()[:, None, None].expand(*scores_BHLS.shape[:3], 1)
    weights_BHLS = torch.cat((scores_BHLS, sinks), dim=-1).softmax(-1)[..., :-1]
    return torch.matmul(weights_BHLS, v).to(q_BHLd.dtype)


_PREFIX_BLOCK = 256  # queries at once, so that the mask stays small


def prefix(
    attend: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor | None, float], Tensor],
    q_THd: Tensor,
    k_SKd: Tensor,
    v_SKd: Tensor,
    sinks_H: Tensor,
    window: int | None,
    scale: float,
) -> Tensor:
    """As `prefix_attention`, some queries after the others. attend  `dense_attention` or what is called like it"""
    num_queries, num_keys = len(q_THd), len(k_SKd)
    before, outs = num_keys - num_queries, []
    for start in range(0, num_queries, _PREFIX_BLOCK):
        end = min(start + _PREFIX_BLOCK, num_queries)
        first = 0 if window is None else max(0, before + start - window + 1)
        i = torch.arange(before + start, before + end, device=q_THd.device)[:, None]
        j = torch.arange(first, before + end, device=q_THd.device)[None]
        seen = j <= i if window is None else (j <= i) & (j > i - window)
        bias = torch.zeros(seen.shape, dtype=q_THd.dtype, device=q_THd.device).masked_fill_(~seen, -torch.inf)
        keys, values = (x[first : before + end].transpose(0, 1)[None] for x in (k_SKd, v_SKd))
        queries = q_THd[start:end].transpose(0, 1)[None]
        outs.append(attend(queries, keys, values, sinks_H, bias[None, None], scale)[0].transpose(0, 1))
    return torch.cat(outs)
