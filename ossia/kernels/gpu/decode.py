"""Decoding: attention of one token a sequence over the paged cache, and experts computed from their packed weights.

Nothing here waits for the device or has a shape that depends on what is there, so a CUDA graph can hold a step.
Reference: `engine.cache.attend_cached`, `ops.moe`. Letters: B sequences, H query heads, K key-value heads, G = H / K, d
head size, R rows of the block table, M blocks of a row, E experts, k experts a token, N = B * k rows sorted by expert,
I expert width, D hidden, r rank.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

INTERPRETED = triton.knobs.runtime.interpret  # there tl.dot of bfloat16 is wrong: operands go in as float32
_SLOTS = 64  # of the cache that a program looks at together
_PROGRAMS = 512  # that keep a GPU busy
# For tiles of so many rows: warps, and bytes of a packed row at a time. With fewer or more, registers spill.
_SHAPES = {16: (4, 64), 32: (4, 32), 64: (8, 32)}


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
    row, order = torch.empty_like(experts), torch.empty_like(experts).view(-1)
    ends = torch.empty(num_experts, dtype=torch.int32, device=logits_BE.device)
    padded, choices = triton.next_power_of_2(num_experts), rows * top_k
    slots = triton.next_power_of_2(top_k)
    _choose[(rows,)](logits_BE, experts, shares, num_experts, K=top_k, SLOTS=slots, EXPERTS=padded, num_warps=1)
    _sort[(triton.cdiv(choices, 32),)](
        experts, order, row, ends, choices, num_experts, ROWS=32, EXPERTS=padded, MINE=32
    )
    return experts, shares, order, row, ends


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


@triton.jit
def _unpacked(code, scale):
    """Values of 4-bit codes and scale bytes. A code's bits are a tiny float32's, which 2^126 brings to its value."""
    bits = ((code & 7) << 22) | ((code & 8) << 28)
    value = bits.to(tl.float32, bitcast=True) * 8.507059173023462e37
    power = tl.where(scale == 0, 0x00400000, tl.where(scale == 255, 0x7FC00000, scale << 23))
    return value * power.to(tl.float32, bitcast=True)


@triton.jit
def _multiply(
    total, x, x_at, x_inside, blocks, scales, row, row_inside, width, BYTES: tl.constexpr, AS_FLOAT: tl.constexpr
):  # fmt: skip
    """total + x W^T for a tile of rows of x and of W, which is packed; `width` is in weights."""
    bytes_a_row = width // 2
    for start in range(0, bytes_a_row, BYTES):
        byte = start + tl.arange(0, BYTES)
        inside = byte < bytes_a_row
        at = row[:, None] * bytes_a_row + byte[None]
        there = row_inside[:, None] & inside[None]
        packed = tl.load(blocks + at, mask=there, other=0).to(tl.int32)
        scale = tl.load(scales + row[:, None] * (bytes_a_row // 16) + byte[None] // 16, mask=there, other=0).to(
            tl.int32
        )
        low, high = _unpacked(packed & 15, scale), _unpacked(packed >> 4, scale)
        x_there = x_inside[:, None] & inside[None]
        even = tl.load(x + x_at[:, None] + 2 * byte[None], mask=x_there, other=0)
        odd = tl.load(x + x_at[:, None] + 2 * byte[None] + 1, mask=x_there, other=0)
        if AS_FLOAT:
            total += tl.dot(even.to(tl.float32), tl.trans(low), input_precision="ieee")
            total += tl.dot(odd.to(tl.float32), tl.trans(high), input_precision="ieee")
        else:
            total += tl.dot(even, tl.trans(low.to(even.dtype)), input_precision="ieee")
            total += tl.dot(odd, tl.trans(high.to(even.dtype)), input_precision="ieee")
    return total


@triton.jit
def _adapt(
    total, a_x, lora_b, expert, row, row_inside, out_row, out_inside, fan_out, rank, RANK: tl.constexpr
):  # fmt: skip
    """total + (A x) B^T."""
    r = tl.arange(0, RANK)
    shrunk = tl.load(a_x + row[:, None] * rank + r[None], mask=row_inside[:, None] & (r[None] < rank), other=0)
    b_at = (expert.to(tl.int64) * fan_out + out_row[:, None]) * rank + r[None]
    factor = tl.load(lora_b + b_at, mask=out_inside[:, None] & (r[None] < rank), other=0).to(tl.float32)
    return total + tl.dot(shrunk, tl.trans(factor), input_precision="ieee")


@triton.jit
def _gate_up(
    x, order, ends, blocks, scales, bias, a_x, lora_b, out, num_experts, top_k, width, size, rank, limit, alpha,
    EXPERTS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, BYTES: tl.constexpr, RANK: tl.constexpr,
    AS_FLOAT: tl.constexpr,
):  # fmt: skip
    expert, first, end = _tile(ends, tl.program_id(0), num_experts, EXPERTS, ROWS)
    if first < end:
        row = first + tl.arange(0, ROWS)
        row_inside = row < end
        x_at = tl.load(order + row, mask=row_inside, other=0) // top_k * width
        column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
        inside = column < size
        # the checkpoint's rows are g0 u0 g1 u1 ...
        packed_row = expert.to(tl.int64) * 2 * size + 2 * column
        gate = tl.zeros((ROWS, COLUMNS), tl.float32)
        up = tl.zeros((ROWS, COLUMNS), tl.float32)
        gate = _multiply(gate, x, x_at, row_inside, blocks, scales, packed_row, inside, width, BYTES, AS_FLOAT)
        up = _multiply(up, x, x_at, row_inside, blocks, scales, packed_row + 1, inside, width, BYTES, AS_FLOAT)
        if RANK > 0:
            gate = _adapt(gate, a_x, lora_b, expert, row, row_inside, column, inside, 2 * size, rank, RANK)
            up = _adapt(up, a_x, lora_b, expert, row, row_inside, column + size, inside, 2 * size, rank, RANK)
        bias_at = bias + expert.to(tl.int64) * 2 * size + column
        gate += tl.load(bias_at, mask=inside, other=0).to(tl.float32)[None]
        up += tl.load(bias_at + size, mask=inside, other=0).to(tl.float32)[None]
        gate = tl.minimum(gate, limit)
        up = tl.minimum(tl.maximum(up, -limit), limit)
        hidden = gate * tl.sigmoid(alpha * gate) * (up + 1)
        at = row[:, None].to(tl.int64) * size + column[None]
        tl.store(out + at, hidden.to(out.dtype.element_ty), mask=row_inside[:, None] & inside[None])


@triton.jit
def _down(
    x, ends, blocks, scales, a_x, lora_b, out, num_experts, width, size, rank,
    EXPERTS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, BYTES: tl.constexpr, RANK: tl.constexpr,
    AS_FLOAT: tl.constexpr,
):  # fmt: skip
    expert, first, end = _tile(ends, tl.program_id(0), num_experts, EXPERTS, ROWS)
    if first < end:
        row = first + tl.arange(0, ROWS)
        row_inside = row < end
        column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
        inside = column < size
        packed_row = expert.to(tl.int64) * size + column
        total = tl.zeros((ROWS, COLUMNS), tl.float32)
        x_at = row.to(tl.int64) * width
        total = _multiply(total, x, x_at, row_inside, blocks, scales, packed_row, inside, width, BYTES, AS_FLOAT)
        if RANK > 0:
            total = _adapt(total, a_x, lora_b, expert, row, row_inside, column, inside, size, rank, RANK)
        at = row[:, None].to(tl.int64) * size + column[None]
        tl.store(out + at, total.to(out.dtype.element_ty), mask=row_inside[:, None] & inside[None])


@triton.jit
def _shrink(
    x, lora_a, experts, order, out, top_k, width, rank, PER_TOKEN: tl.constexpr, RANK: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """A x of one row, which is a token's (PER_TOKEN) or its own."""
    row = tl.program_id(0)
    choice = tl.load(order + row)
    expert = tl.load(experts + choice)
    x_at = (choice // top_k if PER_TOKEN else row.to(tl.int64)) * width
    r = tl.arange(0, RANK)
    total = tl.zeros((RANK,), tl.float32)
    for start in range(0, width, BLOCK):
        column = start + tl.arange(0, BLOCK)
        inside = column < width
        value = tl.load(x + x_at + column, mask=inside, other=0).to(tl.float32)
        a_at = (expert * rank + r[:, None]) * width + column[None]
        factor = tl.load(lora_a + a_at, mask=(r[:, None] < rank) & inside[None], other=0).to(tl.float32)
        total += tl.sum(factor * value[None], 1)
    tl.store(out + row * rank + r, total, mask=r < rank)


def mixture(
    residual_BD: Tensor, x_BD: Tensor, logits_BE: Tensor, top_k: int,
    gate_up: tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None],
    down: tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None],
    limit: float, alpha: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Each token through its experts, and their weighted sum on top of the residual.

    gate_up, down  blocks (E, out, G, 16) and scales (E, out, G), uint8, rows in the checkpoint's order; bias (E, out)
                   and adapter (E, r, in), (E, out, r), gate rows before up rows, or None
    Returns        (B, D), and the chosen experts (B, k) int64
    """
    from ossia.kernels.gpu.experts import combine

    experts, shares, order, row, ends = choose(logits_BE, top_k)
    width, choices, num_experts = x_BD.shape[1], order.numel(), logits_BE.shape[1]
    size = gate_up[0].shape[1] // 2
    tile = 16 if choices <= 16 * num_experts else 32 if choices <= 32 * num_experts else 64
    tiles = min(choices, num_experts) + choices // tile
    warps, step = _SHAPES[tile]
    padded = triton.next_power_of_2(num_experts)

    def adapter(lora_a: Tensor | None, x: Tensor, per_token: bool) -> tuple[Tensor, int]:
        if lora_a is None:
            return x, 0
        rank = lora_a.shape[1]
        out = torch.empty((choices, rank), dtype=torch.float32, device=x.device)
        _shrink[(choices,)](
            x, lora_a, experts, order, out, top_k, x.shape[1], rank, PER_TOKEN=per_token,
            RANK=triton.next_power_of_2(rank), BLOCK=256,
        )  # fmt: skip
        return out, rank

    blocks, scales, bias, lora_a, lora_b = gate_up
    a_x, rank = adapter(lora_a, x_BD, True)
    hidden = torch.empty((choices, size), dtype=x_BD.dtype, device=x_BD.device)
    _gate_up[(tiles, triton.cdiv(size, 32))](
        x_BD, order, ends, blocks, scales, bias, a_x, bias if lora_b is None else lora_b, hidden, num_experts, top_k,
        width, size, rank, limit, alpha, EXPERTS=padded, ROWS=tile, COLUMNS=32, BYTES=step,
        RANK=_padded_rank(rank), AS_FLOAT=INTERPRETED, num_warps=warps,
    )  # fmt: skip
    blocks, scales, bias, lora_a, lora_b = down
    a_x, rank = adapter(lora_a, hidden, False)
    y = torch.empty((choices, width), dtype=x_BD.dtype, device=x_BD.device)
    _down[(tiles, triton.cdiv(width, 32))](
        hidden, ends, blocks, scales, a_x, bias if lora_b is None else lora_b, y, num_experts, size, width, rank,
        EXPERTS=padded, ROWS=tile, COLUMNS=32, BYTES=step, RANK=_padded_rank(rank), AS_FLOAT=INTERPRETED,
        num_warps=warps,
    )  # fmt: skip
    return combine(y, None, bias, shares, row, experts, residual_BD), experts


def _padded_rank(rank: int) -> int:
    """What tl.dot takes; 0 stays 0."""
    return rank and max(16, triton.next_power_of_2(rank))
