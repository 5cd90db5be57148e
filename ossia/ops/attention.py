"""Attention with sinks over packed documents: causal, grouped-query, full or with a sliding window.

A sink is one extra logit per head that takes part in the softmax and carries no value. No kernel needs to know of it:
with the stock output O and log-sum-exp l, the sink-inclusive ones are O' = O * sigmoid(l - s) and l' = logaddexp(l, s),
and the stock backward fed with (O', l') is exact, as it only ever uses exp(scores - l') and the row sum of dO * O'.
(Scaling O outside and dropping the gradient through l, as is commonly done, is not: a test holds that it differs.)
Own code because packing, window and sinks together exist in no stock op; the inner kernels are torch's own.
Backends: `reference` (dense, plain autograd, any device), `cpu` (torch's flash kernel for CPU), `cuda` (varlen).
Letters: T packed tokens, H query heads, K key-value heads, d head dimension, B blocks, L tokens of a block.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from ossia.kernels import pick_kernels

Backend = Literal["reference", "cpu", "cuda"]


CPU = torch.device("cpu")


@dataclass(slots=True)
class Segments:
    """Where the documents of a pack begin and end; attention never crosses from one into another.

    starts  (num_docs + 1,) int64 on CPU: 0, ..., U, strictly rising
    unfold  (U,) int64 on CPU: the row of each document's tokens among the pack's T, where documents that begin alike
            share the rows of their beginning; None: each has its own, U = T
    """

    starts: Tensor
    device: torch.device = CPU
    unfold: Tensor | None = None
    lengths: list[int] = field(init=False)
    positions_T: Tensor = field(init=False)
    doc_T: Tensor = field(init=False)
    shared: Shared | None = field(init=False, default=None)
    _blocks: dict[int, Tensor] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        lengths = self.starts.diff()
        assert int(self.starts[0]) == 0, self.starts
        assert bool((lengths > 0).all()), self.starts
        self.lengths = lengths.tolist()
        doc_T = torch.repeat_interleave(torch.arange(len(self.lengths)), lengths)
        positions_T = torch.arange(self.num_tokens) - self.starts[doc_T]
        if self.unfold is not None:
            self.shared = Shared.of(self.unfold, Segments(self.starts, self.device))
            first_T = self.shared.first_T.cpu()
            doc_T, positions_T = doc_T[first_T], positions_T[first_T]
        self.positions_T, self.doc_T = positions_T.to(self.device), doc_T.to(self.device)

    @property
    def num_tokens(self) -> int:
        """U, all documents together."""
        return int(self.starts[-1])

    @property
    def longest(self) -> int:
        return max(self.lengths)

    def block_mask(self, window: int) -> Tensor:
        """Which of the 2 * window keys (previous block and own) each query of a block sees: (B, 1, L, 2L) bool.

        Queries past the end of the pack see themselves, so that no row is empty.
        """
        if window not in self._blocks:
            num_blocks = -(-self.num_tokens // window)
            doc = torch.full(((num_blocks + 1) * window,), -1, device=self.device)
            doc[window : window + self.num_tokens] = self.doc_T
            doc_q_BL = doc[window:].view(num_blocks, window)
            doc_k_BL = torch.cat((doc[:-window].view(num_blocks, window), doc_q_BL), dim=1)
            offset_q = torch.arange(window, 2 * window, device=self.device)[:, None]
            offset_k = torch.arange(2 * window, device=self.device)[None]
            near = (offset_k <= offset_q) & (offset_k > offset_q - window)
            mask_BLL = near & (doc_q_BL[:, :, None] == doc_k_BL[:, None, :])
            # a padding query has document -1, like the block before the first: it must not reach back into it
            mask_BLL &= (doc_q_BL[:, :, None] >= 0) | (offset_k == offset_q)
            self._blocks[window] = mask_BLL[:, None]
        return self._blocks[window]


@dataclass(slots=True)
class Shared:
    """Rows that documents share, for attention.

    apart     the same documents, each with rows of its own
    unfold_U  (U,) int64: the row of each of their tokens; first_T (T,) int64: where each row comes up first among these
    """

    apart: Segments
    unfold_U: Tensor
    first_T: Tensor
    _families: dict[int | None, Families | None] = field(init=False, default_factory=dict)

    @classmethod
    def of(cls, unfold: Tensor, apart: Segments) -> Shared:
        """unfold  as that of Segments"""
        assert len(unfold) == apart.num_tokens, (unfold.shape, apart.starts)
        first_T = torch.full((int(unfold.max()) + 1,), apart.num_tokens)
        first_T.scatter_reduce_(0, unfold, torch.arange(apart.num_tokens), "amin")
        return cls(apart, unfold.to(apart.device), first_T.to(apart.device))

    def families(self, window: int | None) -> Families | None:
        """How documents that share rows attend without these being computed again; None where that would cost more."""
        if window not in self._families:
            found = Families.of(self.unfold_U, self.apart.starts.tolist(), window)
            apart = sum(n * min(n, 2 * (window or n)) for n in self.apart.lengths)
            self._families[window] = found if found.num_pairs <= min(apart, _MOST_PAIRS) else None
        return self._families[window]


_MOST_PAIRS = 1 << 24  # of a query and a key: the bias has a number for each


@dataclass(frozen=True, slots=True)
class Padded:
    """Rows of queries and of keys, in a batch of equal sizes; what is padding is seen by none and read by none.

    rows_q  (B, L) int64; rows_k (B, S) int64: rows of the pack, row 0 where there is none
    real_q  (B, L) bool: whether a query is no padding
    seen    (B, L, S) bool; a query that is padding sees one key
    """

    rows_q: Tensor
    rows_k: Tensor
    real_q: Tensor
    seen: Tensor

    @classmethod
    def of(cls, parts: list[tuple[range, range]], window: int | None) -> Padded:
        """parts  rows that documents share, and rows of one document after them, which are its queries"""
        num_before, num_own = (max(len(rows) for rows in column) for column in zip(*parts, strict=True))
        before_B, own_B = (torch.tensor([len(rows) for rows in column])[:, None] for column in zip(*parts, strict=True))
        first_before_B, first_own_B = (
            torch.tensor([rows.start for rows in c])[:, None] for c in zip(*parts, strict=True)
        )
        at_before, at_own = torch.arange(num_before)[None], torch.arange(num_own)[None]
        is_before, is_own = at_before < before_B, at_own < own_B
        rows_q = torch.where(is_own, first_own_B + at_own, 0)
        rows_k = torch.cat((torch.where(is_before, first_before_B + at_before, 0), rows_q), 1)
        position_q = before_B + at_own
        position_k = torch.cat((at_before.expand(len(parts), -1), position_q), 1)
        apart = position_q[:, :, None] - position_k[:, None, :]
        seen = (apart >= 0) & torch.cat((is_before, is_own), 1)[:, None, :]
        if window is not None:
            seen &= apart < window
        seen[:, :, 0] |= ~is_own
        return cls(rows_q, rows_k, is_own, seen)


def _of_like_lengths(parts: list[tuple[range, range]]) -> Iterator[list[tuple[range, range]]]:
    """Parts whose queries are of three quarters of the longest one's length and more, eight at least: padding costs."""
    left = sorted(parts, key=lambda part: len(part[1]), reverse=True)
    while left:
        like = sum(4 * len(queries) >= 3 * len(left[0][1]) for _, queries in left)
        yield left[: max(like, 8)]
        left = left[max(like, 8) :]


@dataclass(frozen=True, slots=True)
class Families:
    """Documents that share their beginnings: each beginning attends once, then each document's own rows to both.

    place_T  (T,) int64: where each row of the pack is among the queries of all parts
    """

    parts: list[Padded]
    place_T: Tensor

    @classmethod
    def of(cls, unfold: Tensor, starts: list[int], window: int | None) -> Families:
        """unfold and starts as those of Segments"""
        documents = [unfold[start:end].tolist() for start, end in itertools.pairwise(starts)]
        beginnings, owns = list[tuple[range, range]](), list[tuple[range, range]]()
        for _, family in itertools.groupby(documents, key=lambda rows: rows[0]):
            members = list(family)
            common = next((i for i, row in enumerate(members[-1]) if row != members[0][0] + i), 0)
            shared = range(members[0][0], members[0][0] + common)
            if common:
                beginnings.append((range(0), shared))
            owns += [(shared, range(rows[common], rows[-1] + 1)) for rows in members]
        parts = [Padded.of(found, window) for found in (*_of_like_lengths(beginnings), *_of_like_lengths(owns))]
        rows, real = (
            torch.cat([x.flatten() for x in xs]) for xs in zip(*((p.rows_q, p.real_q) for p in parts), strict=True)
        )
        place_T = torch.empty(int(unfold.max()) + 1, dtype=torch.int64)
        place_T[rows[real]] = real.nonzero()[:, 0]
        return cls(parts, place_T)

    @property
    def num_pairs(self) -> int:
        """Of a query and a key, padding included."""
        return sum(part.seen.numel() for part in self.parts)

    def attend(self, q_THd: Tensor, k_TKd: Tensor, v_TKd: Tensor, sinks_H: Tensor, scale: float) -> Tensor:
        """As `sink_attention`."""
        outs = []
        for part in self.parts:
            q_BHLd, k_BKSd, v_BKSd = (
                x.index_select(0, rows.flatten()).view(*rows.shape, *x.shape[1:]).transpose(1, 2)
                for x, rows in ((q_THd, part.rows_q), (k_TKd, part.rows_k), (v_TKd, part.rows_k))
            )
            bias = torch.zeros(part.seen.shape, dtype=q_THd.dtype).masked_fill_(~part.seen, -torch.inf)[:, None]
            out_BHLd = _CpuSink.apply(q_BHLd, k_BKSd, v_BKSd, sinks_H, bias, scale)
            outs.append(out_BHLd.transpose(1, 2).reshape(-1, *q_THd.shape[1:]))
        return torch.cat(outs).index_select(0, self.place_T)


def pick_backend(device: torch.device, dtype: torch.dtype) -> Backend:
    """The fastest backend that is exact on this device and dtype."""
    if device.type == "cpu" and dtype in (torch.float32, torch.bfloat16):
        return "cpu"
    if device.type == "cuda" and dtype in (torch.float16, torch.bfloat16):
        return "cuda"
    return "reference"


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
) -> Tensor:
    """Causal attention of every document with itself, a sink in each head's softmax.

    q_THd, k_TKd, v_TKd  (T, H, d), (T, K, d), (T, K, d) of one dtype; H is a multiple of K. Rows that documents share
                         serve each of them
    sinks_H              (H,) any floating dtype, a logit
    window               the last `window` keys including the query's own, or None for all
    Returns              (T, H, d) of q's dtype; differentiable in q, k, v and sinks
    Source               gpt-oss model card; sliding window and sinks as in openai/gpt-oss torch/model.py
    """
    if (shared := segments.shared) is not None:
        if backend == "cpu" and (families := shared.families(window)) is not None:
            return families.attend(q_THd, k_TKd, v_TKd, sinks_H, scale)
        q_UHd, k_UKd, v_UKd = (x.index_select(0, shared.unfold_U) for x in (q_THd, k_TKd, v_TKd))
        out_UHd = sink_attention(
            q_UHd, k_UKd, v_UKd, sinks_H, shared.apart, window=window, scale=scale, backend=backend
        )  # fmt: skip
        return out_UHd.index_select(0, shared.first_T)
    if backend == "reference":
        return _reference(q_THd, k_TKd, v_TKd, sinks_H, segments, window, scale)
    if backend == "cuda":
        return _CudaSink.apply(q_THd, k_TKd, v_TKd, sinks_H, segments, window, scale)
    if window is None and segments.longest > DENSE_BLOCK:
        return _per_document(q_THd, k_TKd, v_TKd, sinks_H, segments, scale)
    # where no document is longer than a block, its window already holds all of it
    return _in_blocks(q_THd, k_TKd, v_TKd, sinks_H, segments, window or DENSE_BLOCK, scale)


DENSE_BLOCK = 128


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
    num_queries, num_keys = len(q_THd), len(k_SKd)
    if backend == "cuda":
        return _cuda_prefix(q_THd, k_SKd, v_SKd, sinks_H, window, scale)
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
        attend = _CpuSink.apply if backend == "cpu" else dense_attention
        outs.append(attend(queries, keys, values, sinks_H, bias[None, None], scale)[0].transpose(0, 1))
    return torch.cat(outs)


_PREFIX_BLOCK = 256  # queries at once, so that the mask stays small


def _cuda_prefix(
    q_THd: Tensor, k_SKd: Tensor, v_SKd: Tensor, sinks_H: Tensor, window: int | None, scale: float
) -> Tensor:
    """torch's varlen flash attention aligns the last query with the last key."""
    ends_q, ends_k = (torch.tensor([0, len(x)], dtype=torch.int32, device=x.device) for x in (q_THd, k_SKd))
    out, lse_HT, *_ = torch.ops.aten._flash_attention_forward(
        q_THd, k_SKd, v_SKd, ends_q, ends_k, len(q_THd), len(k_SKd), 0.0, True, False, scale=scale,
        window_size_left=-1 if window is None else window - 1, window_size_right=0,
    )  # fmt: skip
    return _include_sink_in(out, lse_HT, sinks_H)[0]


def _reference(
    q_THd: Tensor, k_TKd: Tensor, v_TKd: Tensor, sinks_H: Tensor, segments: Segments, window: int | None, scale: float
) -> Tensor:
    """The definition over all T x T pairs."""
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


def _in_blocks(
    q_THd: Tensor, k_TKd: Tensor, v_TKd: Tensor, sinks_H: Tensor, segments: Segments, window: int, scale: float
) -> Tensor:
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
    out_BHLd = _CpuSink.apply(q_BHLd, key_blocks(k_TKd), key_blocks(v_TKd), sinks_H, bias, scale)
    return out_BHLd.transpose(1, 2).reshape(-1, num_heads, head_dim)[:num_tokens]


def _per_document(
    q_THd: Tensor, k_TKd: Tensor, v_TKd: Tensor, sinks_H: Tensor, segments: Segments, scale: float
) -> Tensor:
    """One causal kernel call a document."""
    outs = []
    for q, k, v in zip(*(x.split(segments.lengths) for x in (q_THd, k_TKd, v_TKd)), strict=True):
        q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
        outs.append(_CpuSink.apply(q, k, v, sinks_H, None, scale)[0].transpose(0, 1))
    return torch.cat(outs)


def _include_sink(out: Tensor, lse: Tensor, sinks: Tensor) -> tuple[Tensor, Tensor]:
    """(O', l') from the stock (O, l); `sinks` broadcasts against lse (float32)."""
    return (out.float() * (lse - sinks).sigmoid().unsqueeze(-1)).to(out.dtype), torch.logaddexp(lse, sinks)


def _include_sink_in(out_THd: Tensor, lse_HT: Tensor, sinks_H: Tensor) -> tuple[Tensor, Tensor]:
    """`_include_sink` on a GPU: in one pass and in place where there is Triton. Returns (T, H, d), (H, T)."""
    if pick_kernels(out_THd.device, out_THd.dtype) == "triton":
        from ossia.kernels.gpu.rows import include_sink_

        include_sink_(out_THd, lse_HT, sinks_H)
        return out_THd, lse_HT
    out_THd, lse_TH = _include_sink(out_THd, lse_HT.transpose(0, 1), sinks_H.float())
    return out_THd, lse_TH.transpose(0, 1).contiguous()


class _CpuSink(torch.autograd.Function):
    """torch's flash attention for CPU with a sink; is_causal where no bias is given."""

    @staticmethod
    def forward(ctx, q_BHLd, k_BKLd, v_BKLd, sinks_H, bias, scale):
        out, lse_BHL = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            q_BHLd, k_BKLd, v_BKLd, 0.0, bias is None, attn_mask=bias, scale=scale
        )
        out, lse_BHL = _include_sink(out, lse_BHL, sinks_H.float()[:, None])
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
            share_BHL = (sinks_H.float()[:, None] - lse).exp()
            dsinks = -(share_BHL * (grad_out.float() * out.float()).sum(-1)).sum((0, 2)).to(sinks_H.dtype)
        return dq, dk, dv, dsinks, None, None


class _CudaSink(torch.autograd.Function):
    """torch's varlen flash attention for CUDA with a sink."""

    @staticmethod
    def forward(ctx, q_THd, k_TKd, v_TKd, sinks_H, segments, window, scale):
        cu = segments.starts.to(torch.int32).to(q_THd.device)
        bounds = {"scale": scale, "window_size_left": -1 if window is None else window - 1, "window_size_right": 0}
        out, lse_HT, rng, unused, _ = torch.ops.aten._flash_attention_forward(
            q_THd, k_TKd, v_TKd, cu, cu, segments.longest, segments.longest, 0.0, True, False, **bounds
        )
        out, lse_HT = _include_sink_in(out, lse_HT, sinks_H)
        ctx.save_for_backward(q_THd, k_TKd, v_TKd, out, lse_HT, sinks_H, cu, rng, unused)
        ctx.longest, ctx.bounds = segments.longest, bounds
        return out

    @staticmethod
    def backward(ctx, grad_out):
        q, k, v, out, lse_HT, sinks_H, cu, rng, unused = ctx.saved_tensors
        dq, dk, dv = torch.ops.aten._flash_attention_backward(
            grad_out.contiguous(), q, k, v, out, lse_HT, cu, cu, ctx.longest, ctx.longest, 0.0, True, rng, unused,
            **ctx.bounds,
        )  # fmt: skip
        dsinks = None
        if ctx.needs_input_grad[3]:
            share_TH = (sinks_H.float()[:, None] - lse_HT).exp().transpose(0, 1)
            dsinks = -(share_TH * (grad_out.float() * out.float()).sum(-1)).sum(0).to(sinks_H.dtype)
        return dq, dk, dv, dsinks, None, None, None
