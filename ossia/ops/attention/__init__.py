"""Attention with sinks over packed documents: causal, grouped-query, full or with a sliding window.

A sink is one extra logit per head that takes part in the softmax and carries no value. No kernel needs to know of it,
see `sinks`. Own code because packing, window and sinks together exist in no stock op; the inner kernels are torch's own
where there is one. What computes it is a backend, one record each in `backends`; `probe` tries one on the device.
Letters: T packed tokens, S keys, H query heads, K key-value heads, d head size.
"""

from __future__ import annotations

from torch import Tensor

from ossia.ops.attention.backends import (
    BACKENDS,
    AttentionBackend,
    Backend,
    Place,
    candidates,
    check_backend,
    pick_backend,
)
from ossia.ops.attention.cpu import attend_families
from ossia.ops.attention.kept import Kept
from ossia.ops.attention.reference import dense_attention
from ossia.ops.attention.segments import Segments

__all__ = [
    "BACKENDS",
    "AttentionBackend",
    "Backend",
    "Kept",
    "Place",
    "Segments",
    "candidates",
    "check_backend",
    "dense_attention",
    "pick_backend",
    "prefix_attention",
    "sink_attention",
]


def sink_attention(
    q_THd: Tensor,
    k_TKd: Tensor,
    v_TKd: Tensor,
    sinks_H: Tensor,
    segments: Segments,
    *,
    window: int | None,
    scale: float,
    backend: Backend,
    kept: Kept | None = None,
) -> Tensor:
    """Causal attention of every document with itself, a sink in each head's softmax.

    q_THd, k_TKd, v_TKd  (T, H, d), (T, K, d), (T, K, d) of one dtype; H is a multiple of K. Rows that documents share
                         serve each of them
    sinks_H              (H,) any floating dtype, a logit
    window               the last `window` keys including the query's own, or None for all
    kept                 takes the kernel's results, or has them; not where documents share rows
    Returns              (T, H, d) of q's dtype; differentiable in q, k, v and sinks
    Source               gpt-oss model card; sliding window and sinks as in openai/gpt-oss torch/model.py
    """
    if not len(q_THd):
        return q_THd + 0 * (k_TKd.sum() + v_TKd.sum() + sinks_H.sum()).to(q_THd.dtype)  # a gradient for each
    attend = BACKENDS[backend].attend
    if (shared := segments.shared) is None:
        return attend(q_THd, k_TKd, v_TKd, sinks_H, segments, window, scale, kept)
    assert kept is None
    if backend == "cpu" and (families := shared.families(window)) is not None:
        return attend_families(q_THd, k_TKd, v_TKd, sinks_H, families, scale)
    q_UHd, k_UKd, v_UKd = (x.index_select(0, shared.unfold_U) for x in (q_THd, k_TKd, v_TKd))
    return attend(q_UHd, k_UKd, v_UKd, sinks_H, shared.apart, window, scale).index_select(0, shared.first_T)


def prefix_attention(
    q_THd: Tensor,
    k_SKd: Tensor,
    v_SKd: Tensor,
    sinks_H: Tensor,
    *,
    window: int | None,
    scale: float,
    backend: Backend,
) -> Tensor:
    """Causal attention of the last T tokens of one document over its last S >= T: a chunk and what came before it.

    As `sink_attention`, without a gradient. Query t stands at key S - T + t.
    Returns  (T, H, d) of q's dtype
    """
    return BACKENDS[backend].prefix(q_THd, k_SKd, v_SKd, sinks_H, window, scale)
