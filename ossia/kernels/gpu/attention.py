"""Attention with sinks over packed documents, forward and backward, for GPUs without a flash attention kernel.

Every query sees the keys from a first one, which its document and the window say, to its own; so packing and windows
are two numbers a token, and blocks of keys that nobody sees are not read. The query heads of a key-value head are rows
of one tile: keys and values are read once for all of them, and their gradients are summed without atomics. The sink is
where the running softmax begins. Reference: `ops.attention.reference`.
Letters: T tokens, S keys, H query heads, K key-value heads, d head size.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

INTERPRETED = triton.knobs.runtime.interpret  # there tl.dot of bfloat16 is wrong: operands go in as float32
SIZES = (16, 32, 64, 128)  # of a head


@dataclass(frozen=True, slots=True)
class Tile:
    """rows: tokens times the query heads of a key-value head; keys; warps, and those of the keys' gradients."""

    rows: int
    keys: int
    warps: int
    key_warps: int


# Larger ones spill registers: for tensor cores on sm_120, without them on sm_75, for which there are none in Triton.
TENSOR_CORES, NO_TENSOR_CORES = Tile(64, 64, 4, 8), Tile(32, 32, 8, 8)


@triton.jit
def _dot(a, b, AS_FLOAT: tl.constexpr):
    if AS_FLOAT:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), input_precision="ieee")
    return tl.dot(a, b, input_precision="ieee")


@triton.jit
def _forward(
    q, k, v, sinks, first_T, out, lse_HT, tokens, before, scale,
    KV: tl.constexpr, GROUP: tl.constexpr, SIZE: tl.constexpr, TOKENS: tl.constexpr, ROWS: tl.constexpr,
    KEYS: tl.constexpr, AS_FLOAT: tl.constexpr,
):  # fmt: skip
    begin, kv = tl.program_id(0) * TOKENS, tl.program_id(1)
    row, dim = tl.arange(0, ROWS), tl.arange(0, SIZE)
    token, head = begin + row // GROUP, kv * GROUP + row % GROUP
    inside = (row < TOKENS * GROUP) & (token < tokens)
    at = (token.to(tl.int64) * KV * GROUP + head)[:, None] * SIZE + dim[None]
    query = tl.load(q + at, mask=inside[:, None], other=0)
    first = tl.load(first_T + token, mask=inside, other=2147483647)
    top = tl.load(sinks + head, mask=inside, other=0).to(tl.float32)
    total = tl.full((ROWS,), 1.0, tl.float32)
    acc = tl.zeros((ROWS, SIZE), tl.float32)
    end = tl.minimum(begin + TOKENS, tokens) + before
    for start in range(tl.load(first_T + begin), end, KEYS):
        place = start + tl.arange(0, KEYS)
        key_at = (place.to(tl.int64) * KV + kv)[:, None] * SIZE + dim[None]
        key = tl.load(k + key_at, mask=(place < end)[:, None], other=0)
        value = tl.load(v + key_at, mask=(place < end)[:, None], other=0)
        seen = (place[None] >= first[:, None]) & (place[None] <= (token + before)[:, None])
        score = tl.where(seen, _dot(query, tl.trans(key), AS_FLOAT) * scale, -float("inf"))
        new_top = tl.maximum(top, tl.max(score, 1))
        shrink = tl.exp(top - new_top)
        weight = tl.exp(score - new_top[:, None])
        total = total * shrink + tl.sum(weight, 1)
        acc = acc * shrink[:, None] + _dot(weight.to(value.dtype), value, AS_FLOAT)
        top = new_top
    tl.store(out + at, (acc / total[:, None]).to(out.dtype.element_ty), mask=inside[:, None])
    tl.store(lse_HT + head.to(tl.int64) * tokens + token, top + tl.log(total), mask=inside)


@triton.jit
def _backward_queries(
    grad, q, k, v, out, lse_HT, first_T, dq, slope_HT, tokens, scale,
    KV: tl.constexpr, GROUP: tl.constexpr, SIZE: tl.constexpr, TOKENS: tl.constexpr, ROWS: tl.constexpr,
    KEYS: tl.constexpr, AS_FLOAT: tl.constexpr,
):  # fmt: skip
    """dq; and slope = sum of grad * out of each row, which the keys' gradient needs too."""
    begin, kv = tl.program_id(0) * TOKENS, tl.program_id(1)
    row, dim = tl.arange(0, ROWS), tl.arange(0, SIZE)
    token, head = begin + row // GROUP, kv * GROUP + row % GROUP
    inside = (row < TOKENS * GROUP) & (token < tokens)
    at = (token.to(tl.int64) * KV * GROUP + head)[:, None] * SIZE + dim[None]
    number = head.to(tl.int64) * tokens + token
    query = tl.load(q + at, mask=inside[:, None], other=0)
    dout = tl.load(grad + at, mask=inside[:, None], other=0)
    slope = tl.sum(dout.to(tl.float32) * tl.load(out + at, mask=inside[:, None], other=0).to(tl.float32), 1)
    tl.store(slope_HT + number, slope, mask=inside)
    lse = tl.load(lse_HT + number, mask=inside, other=0)
    first = tl.load(first_T + token, mask=inside, other=2147483647)
    acc = tl.zeros((ROWS, SIZE), tl.float32)
    end = tl.minimum(begin + TOKENS, tokens)
    for start in range(tl.load(first_T + begin), end, KEYS):
        place = start + tl.arange(0, KEYS)
        key_at = (place.to(tl.int64) * KV + kv)[:, None] * SIZE + dim[None]
        key = tl.load(k + key_at, mask=(place < end)[:, None], other=0)
        value = tl.load(v + key_at, mask=(place < end)[:, None], other=0)
        seen = (place[None] >= first[:, None]) & (place[None] <= token[:, None])
        score = tl.where(seen, _dot(query, tl.trans(key), AS_FLOAT) * scale, -float("inf"))
        weight = tl.exp(score - lse[:, None])
        dscore = weight * (_dot(dout, tl.trans(value), AS_FLOAT) - slope[:, None])
        acc += _dot(dscore.to(key.dtype), key, AS_FLOAT)
    tl.store(dq + at, (acc * scale).to(dq.dtype.element_ty), mask=inside[:, None])


@triton.jit
def _backward_keys(
    grad, q, k, v, lse_HT, slope_HT, first_T, last_S, dk, dv, tokens, scale,
    KV: tl.constexpr, GROUP: tl.constexpr, SIZE: tl.constexpr, TOKENS: tl.constexpr, ROWS: tl.constexpr,
    KEYS: tl.constexpr, AS_FLOAT: tl.constexpr,
):  # fmt: skip
    begin, kv = tl.program_id(0) * KEYS, tl.program_id(1)
    place, row, dim = begin + tl.arange(0, KEYS), tl.arange(0, ROWS), tl.arange(0, SIZE)
    key_at = (place.to(tl.int64) * KV + kv)[:, None] * SIZE + dim[None]
    key = tl.load(k + key_at, mask=(place < tokens)[:, None], other=0)
    value = tl.load(v + key_at, mask=(place < tokens)[:, None], other=0)
    dkey = tl.zeros((KEYS, SIZE), tl.float32)
    dvalue = tl.zeros((KEYS, SIZE), tl.float32)
    # the last token that sees the last of these keys: none later sees any of them
    last = tl.load(last_S + tl.minimum(begin + KEYS, tokens) - 1)
    for start in range(begin, last + 1, TOKENS):
        token, head = start + row // GROUP, kv * GROUP + row % GROUP
        inside = (row < TOKENS * GROUP) & (token <= last)
        at = (token.to(tl.int64) * KV * GROUP + head)[:, None] * SIZE + dim[None]
        number = head.to(tl.int64) * tokens + token
        query = tl.load(q + at, mask=inside[:, None], other=0)
        dout = tl.load(grad + at, mask=inside[:, None], other=0)
        lse = tl.load(lse_HT + number, mask=inside, other=0)
        slope = tl.load(slope_HT + number, mask=inside, other=0)
        first = tl.load(first_T + token, mask=inside, other=2147483647)
        seen = (place[:, None] >= first[None]) & (place[:, None] <= token[None])
        score = tl.where(seen, _dot(key, tl.trans(query), AS_FLOAT) * scale, -float("inf"))
        weight = tl.exp(score - lse[None])
        dvalue += _dot(weight.to(dout.dtype), dout, AS_FLOAT)
        dscore = weight * (_dot(value, tl.trans(dout), AS_FLOAT) - slope[None])
        dkey += _dot(dscore.to(query.dtype), query, AS_FLOAT)
    tl.store(dk + key_at, (dkey * scale).to(dk.dtype.element_ty), mask=(place < tokens)[:, None])
    tl.store(dv + key_at, dvalue.to(dv.dtype.element_ty), mask=(place < tokens)[:, None])


def _tile(x: Tensor) -> Tile:
    if x.device.type != "cuda":  # the interpreter
        return TENSOR_CORES
    cores = x.dtype != torch.float32 and torch.cuda.get_device_capability(x.device) >= (8, 0)
    return TENSOR_CORES if cores else NO_TENSOR_CORES


def _sizes(q_THd: Tensor, k_SKd: Tensor, tile: Tile) -> dict[str, int | bool]:
    (_, heads, size), kv_heads = q_THd.shape, k_SKd.shape[1]
    group = heads // kv_heads
    assert size in SIZES, size
    assert group <= tile.rows, (heads, kv_heads)
    as_float = INTERPRETED and q_THd.dtype == torch.bfloat16
    return {
        "KV": kv_heads, "GROUP": group, "SIZE": size, "TOKENS": tile.rows // group, "ROWS": tile.rows,
        "KEYS": tile.keys, "AS_FLOAT": as_float,
    }  # fmt: skip


def forward(
    q_THd: Tensor, k_SKd: Tensor, v_SKd: Tensor, sinks_H: Tensor, first_T: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """Attention of T queries over S >= T keys, the last query standing at the last key.

    All contiguous and of one dtype. first_T  (T,) int32, never falling: the first key that each query sees
    Returns  (T, H, d), and the log-sum-exp with the sink in it, (H, T) float32
    """
    tokens, heads, _ = q_THd.shape
    tile = _tile(q_THd)
    sizes = _sizes(q_THd, k_SKd, tile)
    out, lse_HT = torch.empty_like(q_THd), torch.empty(heads, tokens, dtype=torch.float32, device=q_THd.device)
    grid = triton.cdiv(tokens, sizes["TOKENS"]), sizes["KV"]
    _forward[grid](
        q_THd, k_SKd, v_SKd, sinks_H, first_T, out, lse_HT, tokens, len(k_SKd) - tokens, scale, **sizes,
        num_warps=tile.warps,
    )  # fmt: skip
    return out, lse_HT


def backward(
    grad_THd: Tensor, q_THd: Tensor, k_TKd: Tensor, v_TKd: Tensor, out_THd: Tensor, lse_HT: Tensor, first_T: Tensor,
    last_T: Tensor, scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """The gradients in q, k and v of a pack's attention with itself; and the sum of grad * out, (H, T) float32.

    last_T  (T,) int32, never falling: the last token that sees each key
    """
    tokens, tile = len(q_THd), _tile(q_THd)
    sizes = _sizes(q_THd, k_TKd, tile)
    dq, dk, dv = (torch.empty_like(x) for x in (q_THd, k_TKd, v_TKd))
    slope_HT = torch.empty_like(lse_HT)
    grid = triton.cdiv(tokens, sizes["TOKENS"]), sizes["KV"]
    _backward_queries[grid](
        grad_THd, q_THd, k_TKd, v_TKd, out_THd, lse_HT, first_T, dq, slope_HT, tokens, scale, **sizes,
        num_warps=tile.warps,
    )  # fmt: skip
    grid = triton.cdiv(tokens, tile.keys), sizes["KV"]
    _backward_keys[grid](
        grad_THd, q_THd, k_TKd, v_TKd, lse_HT, slope_HT, first_T, last_T, dk, dv, tokens, scale, **sizes,
        num_warps=tile.key_warps,
    )  # fmt: skip
    return dq, dk, dv, slope_HT
