"""Decoding: attention of one token a sequence over the paged cache, and which experts it goes to.

Nothing here waits for the device or has a shape that depends on what is there, so a CUDA graph can hold a step.
Reference: `engine.cache.attend_cached`, `ops.moe.route`. Letters: B sequences, H query heads, K key-value heads,
G = H / K, d head size, R rows of the block table, M blocks of a row, E experts, k experts a token, N = B * k rows
sorted by expert.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

INTERPRETED = triton.knobs.runtime.interpret  # there tl.dot of bfloat16 is wrong: operands go in as float32
_SLOTS = 64  # of the cache that a program looks at together
_PROGRAMS = 512  # that keep a GPU busy


@triton.jit
def _attend_part(
    q, pool, table_RM, row_B, position_B, out_part, top_part, sum_part,
    q_stride, heads, num_blocks, splits, block, window, scale,
    KV: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr, SIZE: tl.constexpr, SLOTS: tl.constexpr,
    AS_FLOAT: tl.constexpr,
):  # fmt: skip
    """A share of a sequence's slots, for the query heads of one key-value head."""
    sequence, kv, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    length = tl.load(position_B + sequence).to(tl.int32) + 1
    length = tl.minimum(length, window)
    share = tl.cdiv(tl.cdiv(length, splits), SLOTS) * SLOTS
    first, last = split * share, tl.minimum((split + 1) * share, length)
    row = tl.load(row_B + sequence)
    group, dim = tl.arange(0, ROWS), tl.arange(0, SIZE)
    head = kv * GROUP + group
    q_at = sequence.to(tl.int64) * q_stride + head[:, None] * SIZE + dim[None]
    query = tl.load(q + q_at, mask=group[:, None] < GROUP, other=0)
    top = tl.full((ROWS,), -float("inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    out = tl.zeros((ROWS, SIZE), tl.float32)
    for start in range(first, last, SLOTS):
        place = start + tl.arange(0, SLOTS)
        seen = place < last
        number = tl.load(table_RM + row * num_blocks + place // block, mask=seen, other=0).to(tl.int64)
        slot = number * block + place % block
        at = (slot[:, None] * 2 * KV + kv) * SIZE + dim[None]
        key = tl.load(pool + at, mask=seen[:, None], other=0)
        value = tl.load(pool + at + KV * SIZE, mask=seen[:, None], other=0)
        if AS_FLOAT:
            score = tl.dot(query.to(tl.float32), tl.trans(key.to(tl.float32)), input_precision="ieee")
        else:
            score = tl.dot(query, tl.trans(key), input_precision="ieee")
        score = tl.where(seen[None], score * scale, -float("inf"))
        new_top = tl.maximum(top, tl.max(score, 1))
        shrink = tl.exp(top - new_top)
        weight = tl.exp(score - new_top[:, None])
        total = total * shrink + tl.sum(weight, 1)
        if AS_FLOAT:
            part = tl.dot(weight, value.to(tl.float32), input_precision="ieee")
        else:
            part = tl.dot(weight.to(value.dtype), value, input_precision="ieee")
        out = out * shrink[:, None] + part
        top = new_top
    at = (sequence.to(tl.int64) * heads + head) * splits + split
    tl.store(top_part + at, top, mask=group < GROUP)
    tl.store(sum_part + at, total, mask=group < GROUP)
    tl.store(out_part + at[:, None] * SIZE + dim[None], out, mask=group[:, None] < GROUP)


@triton.jit
def _attend_whole(
    out_part, top_part, sum_part, sinks, out, heads, splits, SPLITS: tl.constexpr, SIZE: tl.constexpr
):  # fmt: skip
    """The shares of one head put together, and its sink."""
    at = tl.program_id(0).to(tl.int64)
    split, dim = tl.arange(0, SPLITS), tl.arange(0, SIZE)
    there = split < splits
    top = tl.load(top_part + at * splits + split, mask=there, other=-float("inf"))
    sink = tl.load(sinks + at % heads).to(tl.float32)
    whole_top = tl.maximum(tl.max(top, 0), sink)
    share = tl.exp(top - whole_top)
    total = tl.load(sum_part + at * splits + split, mask=there, other=0) * share
    value = tl.load(out_part + (at * splits + split)[:, None] * SIZE + dim[None], mask=there[:, None], other=0)
    value = tl.sum(value * share[:, None], 0) / (tl.sum(total, 0) + tl.exp(sink - whole_top))
    tl.store(out + at * SIZE + dim, value.to(out.dtype.element_ty))


def attend(
    q_BHd: Tensor, pool_SXd: Tensor, table_RM: Tensor, row_B: Tensor, position_B: Tensor, sinks_H: Tensor, *,
    block: int, window: int | None, scale: float,
) -> Tensor:  # fmt: skip
    """Attention of each sequence's newest token, whose keys and values are in the cache by now.

    q_BHd     rows of any stride, heads next to each other
    pool_SXd  (slots, 2 K, d): a layer's keys, then its values
    block, window  of the lane, see `engine.cache.Lane`
    Returns   (B, H, d)
    """
    (rows, heads, size), kv_heads = q_BHd.shape, pool_SXd.shape[1] // 2
    assert q_BHd.stride()[1:] == (size, 1)
    most = window if window is not None else table_RM.shape[1] * block
    splits = max(1, min(triton.cdiv(_PROGRAMS, rows * kv_heads), triton.cdiv(most, 2 * _SLOTS), 64))
    parts = q_BHd.new_empty((rows, heads, splits, size), dtype=torch.float32)
    tops, sums = (q_BHd.new_empty((rows, heads, splits), dtype=torch.float32) for _ in range(2))
    group = heads // kv_heads
    _attend_part[(rows, kv_heads, splits)](
        q_BHd, pool_SXd, table_RM, row_B, position_B, parts, tops, sums, q_BHd.stride(0), heads, table_RM.shape[1],
        splits, block, most, scale, KV=kv_heads, GROUP=group, ROWS=max(16, triton.next_power_of_2(group)), SIZE=size,
        SLOTS=_SLOTS, AS_FLOAT=INTERPRETED,
    )  # fmt: skip
    out = torch.empty((rows, heads, size), dtype=q_BHd.dtype, device=q_BHd.device)
    _attend_whole[(rows * heads,)](
        parts, tops, sums, sinks_H, out, heads, splits, SPLITS=triton.next_power_of_2(splits), SIZE=size
    )
    return out


@triton.jit
def _choose(
    logits, experts, shares, num_experts, K: tl.constexpr, SLOTS: tl.constexpr, EXPERTS: tl.constexpr
):  # fmt: skip
    """The k largest logits of a token, and their softmax."""
    token = tl.program_id(0)
    expert = tl.arange(0, EXPERTS)
    logit = tl.load(logits + token * num_experts + expert, mask=expert < num_experts, other=-float("inf"))
    logit = logit.to(tl.float32)
    largest = tl.max(logit, 0)
    slot = tl.arange(0, SLOTS)
    chosen = tl.zeros((SLOTS,), tl.int64)
    share = tl.zeros((SLOTS,), tl.float32)
    for choice in tl.static_range(K):
        top = tl.max(logit, 0)
        which = tl.min(tl.where(logit == top, expert, EXPERTS), 0)
        chosen = tl.where(slot == choice, which.to(tl.int64), chosen)
        share = tl.where(slot == choice, tl.exp(top - largest), share)
        logit = tl.where(expert == which, -float("inf"), logit)
    share /= tl.sum(share, 0)
    tl.store(experts + token * K + slot, chosen, mask=slot < K)
    tl.store(shares + token * K + slot, share.to(shares.dtype.element_ty), mask=slot < K)


@triton.jit
def _sort(
    experts, order, row, ends, num_rows, num_experts, ROWS: tl.constexpr, EXPERTS: tl.constexpr, MINE: tl.constexpr
):  # fmt: skip
    """Each choice's place when they are sorted by expert, stably; and where each expert's rows end."""
    mine = tl.program_id(0) * MINE + tl.arange(0, MINE)
    inside = mine < num_rows
    my_expert = tl.load(experts + mine, mask=inside, other=0)
    before = tl.zeros((MINE,), tl.int64)
    expert = tl.arange(0, EXPERTS)
    up_to = tl.zeros((EXPERTS,), tl.int32)
    for start in range(0, num_rows, ROWS):
        other = start + tl.arange(0, ROWS)
        theirs = tl.load(experts + other, mask=other < num_rows, other=EXPERTS)
        first = (theirs[None] < my_expert[:, None]) | (
            (theirs[None] == my_expert[:, None]) & (other[None] < mine[:, None])
        )
        before += tl.sum(first.to(tl.int64), 1)
        up_to += tl.sum((theirs[None] <= expert[:, None]).to(tl.int32), 1)
    tl.store(row + mine, before, mask=inside)
    tl.store(order + before, mine.to(tl.int64), mask=inside)
    if tl.program_id(0) == 0:
        tl.store(ends + expert, up_to, mask=expert < num_experts)


def choose(logits_BE: Tensor, top_k: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """`ops.moe.route` in two launches.

    Returns  experts (B, k) int64, their shares (B, k), order (N,) int64, row (B, k) int64, ends (E,) int32
    """
    rows, num_experts = logits_BE.shape
    experts = torch.empty((rows, top_k), dtype=torch.int64, device=logits_BE.device)
    shares = torch.empty((rows, top_k), dtype=logits_BE.dtype, device=logits_BE.device)
    slots, padded = triton.next_power_of_2(top_k), triton.next_power_of_2(num_experts)
    _choose[(rows,)](logits_BE, experts, shares, num_experts, K=top_k, SLOTS=slots, EXPERTS=padded, num_warps=1)
    return experts, shares, *sort(experts, num_experts)


def sort(experts_Bk: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """Choices sorted by expert, stably: order (N,) int64, row (B, k) int64, ends (E,) int32."""
    row, order = torch.empty_like(experts_Bk), torch.empty_like(experts_Bk).view(-1)
    ends = torch.empty(num_experts, dtype=torch.int32, device=experts_Bk.device)
    choices = experts_Bk.numel()
    _sort[(triton.cdiv(choices, 32),)](
        experts_Bk, order, row, ends, choices, num_experts, ROWS=32, EXPERTS=triton.next_power_of_2(num_experts),
        MINE=32,
    )  # fmt: skip
    return order, row, ends


@triton.jit
def _tile(ends, tile, num_experts, EXPERTS: tl.constexpr, ROWS: tl.constexpr):
    """Expert, first row and end of a tile: up to ROWS rows of one expert; the end is 0 where there is no such tile."""
    expert = tl.arange(0, EXPERTS)
    inside = expert < num_experts
    end = tl.load(ends + expert, mask=inside, other=0)
    begin = tl.load(ends + expert - 1, mask=inside & (expert > 0), other=0)
    tiles = tl.where(inside, tl.cdiv(end - begin, ROWS), 0)
    until = tl.cumsum(tiles, 0)
    which = tl.sum((until <= tile).to(tl.int32), 0)
    here = expert == which
    first = tl.sum(tl.where(here, begin + (tile - until + tiles) * ROWS, 0), 0)
    return which, first, tl.sum(tl.where(here, end, 0), 0)
