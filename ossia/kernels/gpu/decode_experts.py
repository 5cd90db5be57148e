"""Experts of a decode step, computed from their packed weights, which are read once and as they are.

Shifts bring the bits of a code to where a float has them, several codes at a time. The n-th codes of neighbouring
units of u codes are multiplied together, so inputs are arranged as (u, D / u) beforehand: what they meet is together.
A few tokens: each choice by itself, its expert's rows times one vector, in float32; units are words of eight codes.
More tokens: rows sorted by expert, in tiles on the tensor cores, weights first, since an expert's few rows fill no
tile. Units are halves of four codes: of two halves in a register, the n-th codes are two bfloat16 after four
instructions, where the tensor cores want them, and never pass through shared memory.
Nothing waits for the device or has a shape that depends on what is there.
Reference: `ops.moe`. Letters: B sequences, E experts, k experts a token, N = B * k choices, D hidden, I expert width,
r rank, W words of a packed row, G = W / 4 groups of 32 weights.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from ossia.kernels.gpu.decode import INTERPRETED, _choose, _tile, sort
from ossia.kernels.gpu.decode_dense import _inverse, _normed
from ossia.kernels.gpu.experts import combine

Projection = tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]
"""Blocks (E, out, G, 16) and scales (E, out, G), uint8, rows in the checkpoint's order; bias (E, out) and adapter
(E, r, in), (E, out, r), gate rows before up rows, or None."""

ALONE = 2  # tokens up to which each choice goes by itself
ALONE_ROWS, ALONE_GROUPS = 32, 16  # of a program, and at a time
FIRST_TILE, MOST_TOKENS = 16, 64  # of a tile
TILES = {16: (64, 64, 3, 4), 32: (128, 32, 3, 4), 64: (128, 32, 3, 4)}
"""By a tile's tokens: its rows of weights, halves at a time, stages, warps."""
FLOAT_TILE = (64, 32, 2, 8)  # of inputs in float32
LARGEST_SCALE = 128  # up to which a code takes one product to be its value in bfloat16
_LIFT = tl.constexpr(2.0**100)  # of inputs, or their products with codes, which are tiny, would lose bits
_LOWER = tl.constexpr(2.0**26)  # codes are 2^-126 of their values: 2^126 / _LIFT


@triton.jit
def _code(words, n: tl.constexpr):
    """2^-126 of the value of each word's n-th code: sign, exponent and mantissa where a float32 has them."""
    # the shift to the right repeats the sign, and the mask keeps one of it
    return (((words << (28 - 4 * n)) >> 6) & -2118123520).to(tl.float32, bitcast=True)


@triton.jit
def _power(byte):
    """2^(byte - 127), from 1 to 254."""
    return (byte.to(tl.int32) << 23).to(tl.float32, bitcast=True)


@triton.jit
def _arranged(column, WIDTH: tl.constexpr, UNIT: tl.constexpr):
    """Where an input is, arranged as (UNIT, WIDTH / UNIT)."""
    return column % UNIT * (WIDTH // UNIT) + column // UNIT


@triton.jit
def _route(
    logits, experts, shares, row, x, norm, arranged, num_experts, eps,
    K: tl.constexpr, SLOTS: tl.constexpr, EXPERTS: tl.constexpr, WIDTH: tl.constexpr, UNIT: tl.constexpr,
    NORM: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A token's experts and their shares, its choices' rows in their own order, and its inputs, normed and arranged;
    where each choice goes by itself (UNIT 8), lifted and in float32."""
    _choose(logits, experts, shares, num_experts, K, SLOTS, EXPERTS)
    choice = tl.program_id(0).to(tl.int64) * K + tl.arange(0, SLOTS)
    tl.store(row + choice, choice, mask=tl.arange(0, SLOTS) < K)
    place = tl.arange(0, BLOCK)
    inside = place < WIDTH
    at = tl.program_id(0).to(tl.int64) * WIDTH
    if NORM:
        value = _normed(x + at, norm, place, inside, _inverse(x + at, WIDTH, BLOCK, eps))
    else:
        value = tl.load(x + at + place, mask=inside, other=0).to(tl.float32)
    if UNIT == 8:
        value *= _LIFT
    tl.store(arranged + at + _arranged(place, WIDTH, UNIT), value.to(arranged.dtype.element_ty), mask=inside)


@triton.jit
def _shrink(
    x, lora_a, experts, order, out, top_k, rank, PER_TOKEN: tl.constexpr, ALONE: tl.constexpr, WORDS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """One number of A x of one row, whose x is its token's (PER_TOKEN) or its own; rounded as a product would be."""
    row, r = tl.program_id(0).to(tl.int64), tl.program_id(1)
    choice = row if ALONE else tl.load(order + row)
    expert = tl.load(experts + choice)
    x_at = (choice // top_k if PER_TOKEN else row) * 8 * WORDS
    column = tl.arange(0, BLOCK)
    inside = column < 8 * WORDS
    if ALONE:
        value = tl.load(x + x_at + _arranged(column, 8 * WORDS, 8), mask=inside, other=0) / _LIFT
    else:
        value = tl.load(x + x_at + _arranged(column, 8 * WORDS, 4), mask=inside, other=0).to(tl.float32)
    factor = tl.load(lora_a + (expert * rank + r) * 8 * WORDS + column, mask=inside, other=0).to(tl.float32)
    tl.store(out + row * rank + r, tl.sum(factor * value, 0).to(out.dtype.element_ty))


@triton.jit
def _swiglu(gate, up, limit, alpha):
    gate = tl.minimum(gate, limit)
    up = tl.minimum(tl.maximum(up, -limit), limit)
    return gate * tl.sigmoid(alpha * gate) * (up + 1)


@triton.jit
def _alone(x, blocks, scales, row, WORDS: tl.constexpr, GROUPS: tl.constexpr):
    """Rows of packed weights times a lifted vector: (rows,) float32. A thread takes whole groups of 32 weights."""
    first_word, first_group = tl.arange(0, 4 * GROUPS)[None], tl.arange(0, GROUPS)[None]
    words_at, scale_at = blocks + row[:, None] * WORDS, scales + row[:, None] * (WORDS // 4)
    total = tl.zeros((row.shape[0], GROUPS), tl.float32)
    words = tl.load(words_at + first_word, mask=first_word < WORDS, other=0)
    byte = tl.load(scale_at + first_group, mask=first_group < WORDS // 4, other=0)
    for start in range(0, WORDS // 4, GROUPS):
        # the next ones are on their way while these are computed
        word, group = 4 * (start + GROUPS) + first_word, start + GROUPS + first_group
        next_words = tl.load(words_at + word, mask=word < WORDS, other=0)
        next_byte = tl.load(scale_at + group, mask=group < WORDS // 4, other=0)
        word -= 4 * GROUPS
        part = tl.zeros(words.shape, tl.float32)
        for n in tl.static_range(8):
            part += _code(words, n) * tl.load(x + n * WORDS + word, mask=word < WORDS, other=0)
        part = tl.sum(tl.reshape(part, (words.shape[0], GROUPS, 4)), 2)
        total += part * _LOWER * _power(byte)
        words, byte = next_words, next_byte
    return tl.sum(total, 1)


@triton.jit
def _gate_up_alone(
    x, experts, blocks, scales, bias, a_x, lora_b, out, top_k, rank, limit, alpha,
    SIZE: tl.constexpr, WORDS: tl.constexpr, ROWS: tl.constexpr, GROUPS: tl.constexpr, RANK: tl.constexpr,
):  # fmt: skip
    choice = tl.program_id(1).to(tl.int64)
    expert = tl.load(experts + choice)
    row = tl.minimum(tl.program_id(0) * ROWS + tl.arange(0, ROWS), 2 * SIZE - 1)
    blocks += expert * 2 * SIZE * WORDS
    scales += expert * 2 * SIZE * (WORDS // 4)
    # the checkpoint's rows are g0 u0 g1 u1 ...
    gate, up = tl.split(
        tl.reshape(_alone(x + choice // top_k * 8 * WORDS, blocks, scales, row, WORDS, GROUPS), (ROWS // 2, 2))
    )
    column = tl.program_id(0) * (ROWS // 2) + tl.arange(0, ROWS // 2)
    inside = column < SIZE
    at = expert * 2 * SIZE + column
    if RANK > 0:
        r = tl.arange(0, RANK)
        shrunk = tl.load(a_x + choice * rank + r, mask=r < rank, other=0).to(tl.float32)[None]
        there = inside[:, None] & (r[None] < rank)
        factor = lora_b + at[:, None] * rank + r[None]
        gate += tl.sum(tl.load(factor, mask=there, other=0).to(tl.float32) * shrunk, 1)
        up += tl.sum(tl.load(factor + SIZE * rank, mask=there, other=0).to(tl.float32) * shrunk, 1)
    gate += tl.load(bias + at, mask=inside, other=0).to(tl.float32)
    up += tl.load(bias + at + SIZE, mask=inside, other=0).to(tl.float32)
    hidden = _swiglu(gate, up, limit, alpha).to(bias.dtype.element_ty).to(tl.float32) * _LIFT
    tl.store(out + choice * SIZE + _arranged(column, SIZE, 8), hidden, mask=inside)


@triton.jit
def _down_alone(
    x, experts, blocks, scales, a_x, lora_b, out, rank,
    SIZE: tl.constexpr, WORDS: tl.constexpr, ROWS: tl.constexpr, GROUPS: tl.constexpr, RANK: tl.constexpr,
):  # fmt: skip
    choice = tl.program_id(1).to(tl.int64)
    expert = tl.load(experts + choice)
    column = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = column < SIZE
    blocks += expert * SIZE * WORDS
    scales += expert * SIZE * (WORDS // 4)
    y = _alone(x + choice * 8 * WORDS, blocks, scales, tl.minimum(column, SIZE - 1), WORDS, GROUPS)
    if RANK > 0:
        r = tl.arange(0, RANK)
        shrunk = tl.load(a_x + choice * rank + r, mask=r < rank, other=0).to(tl.float32)[None]
        at = (expert * SIZE + column[:, None]) * rank + r[None]
        factor = tl.load(lora_b + at, mask=inside[:, None] & (r[None] < rank), other=0).to(tl.float32)
        y += tl.sum(factor * shrunk, 1)
    tl.store(out + choice * SIZE + column, y.to(out.dtype.element_ty), mask=inside)


_SHIFTS = ("shl.b32 sign, $1, 12; shl.b32 rest, $1, 6;", "shl.b32 sign, $1, 8; shl.b32 rest, $1, 2;",
           "shl.b32 sign, $1, 4; shr.b32 rest, $1, 2;", "mov.b32 sign, $1; shr.b32 rest, $1, 6;")  # fmt: skip
_MASKED = "and.b32 rest, rest, 0x01C001C0; lop3.b32 $0, sign, 0x80008000, rest, 0xEA;"  # 0xEA: (sign & mask) | rest
_TAKE = tuple(tl.constexpr(f"{{ .reg .b32 sign, rest; {shifts} {_MASKED} }}") for shifts in _SHIFTS)
_TAKE_0, _TAKE_1, _TAKE_2, _TAKE_3 = _TAKE


@triton.jit
def _nth(halves, n: tl.constexpr):
    """2^-126 of the value of each half's n-th code, in bfloat16; two halves are in one register."""
    take: tl.constexpr = _TAKE_0 if n == 0 else _TAKE_1 if n == 1 else _TAKE_2 if n == 2 else _TAKE_3
    return tl.inline_asm_elementwise(take, "=r,r", [halves], dtype=tl.bfloat16, is_pure=True, pack=2)


@triton.jit
def _weights(
    halves, byte, n: tl.constexpr, ROWS: tl.constexpr, STEP: tl.constexpr, WIDE: tl.constexpr, AS_FLOAT: tl.constexpr
):  # fmt: skip
    """The values of each half's n-th code, (rows, halves)."""
    if AS_FLOAT:
        code = _code(halves.to(tl.int32), n) * 8.507059173023462e37  # 2^126
        power = _power(byte)
    else:
        code = _nth(halves, n)
        if WIDE:
            code *= 8.507059173023462e37
            bits = byte.to(tl.int16) << 7  # from 1 to 254
        else:
            bits = (byte.to(tl.int16) + 126) << 7  # 2^(byte - 1)
        power = bits.to(tl.bfloat16, bitcast=True)
    return code * tl.reshape(tl.broadcast_to(power[:, :, None], (ROWS, STEP // 8, 8)), (ROWS, STEP))


@triton.jit
def _together(
    x, x_at, x_inside, blocks, scales, row,
    HALVES: tl.constexpr, ROWS: tl.constexpr, TOKENS: tl.constexpr, STEP: tl.constexpr, STAGES: tl.constexpr,
    WIDE: tl.constexpr, AS_FLOAT: tl.constexpr,
):  # fmt: skip
    """Rows of packed weights times a tile of inputs: (rows, tokens) float32."""
    total = tl.zeros((ROWS, TOKENS), tl.float32)
    first, first_group = tl.arange(0, STEP), tl.arange(0, STEP // 8)[None]
    halves_at, scale_at = blocks + row[:, None] * HALVES + first[None], scales + row[:, None] * (HALVES // 8)
    x_at = x + x_at[None] + first[:, None]
    byte = tl.load(scale_at + first_group, mask=first_group < HALVES // 8, other=0)
    for start in tl.range(0, HALVES, STEP, num_stages=STAGES):
        inside = start + first < HALVES
        halves = tl.load(halves_at + start, mask=inside[None], other=0)
        # single bytes can't be fetched ahead by the compiler, so the next step's are here
        next_group = (start + STEP) // 8 + first_group
        next_byte = tl.load(scale_at + next_group, mask=next_group < HALVES // 8, other=0)
        for n in tl.static_range(4):
            values = tl.load(x_at + (n * HALVES + start), mask=inside[:, None] & x_inside[None], other=0)
            if AS_FLOAT:
                values = values.to(tl.float32)
            weights = _weights(halves, byte, n, ROWS, STEP, WIDE, AS_FLOAT)
            total = tl.dot(weights, values, total, input_precision="ieee")
        byte = next_byte
    return total


@triton.jit
def _adapt(
    total, a_x, lora_b, at, inside, row, row_inside, rank, RANK: tl.constexpr, AS_FLOAT: tl.constexpr
):  # fmt: skip
    """total + B (A x)^T, (rows of B, tokens); `at` are the rows of B, over all experts."""
    r = tl.arange(0, RANK)
    there = r < rank
    shrunk = tl.load(a_x + row[None] * rank + r[:, None], mask=row_inside[None] & there[:, None], other=0)
    factor = tl.load(lora_b + at[:, None] * rank + r[None], mask=inside[:, None] & there[None], other=0)
    if AS_FLOAT:
        return tl.dot(factor.to(tl.float32), shrunk.to(tl.float32), total, input_precision="ieee")
    return tl.dot(factor, shrunk, total, input_precision="ieee")


@triton.jit
def _gate_up_tile(
    x, order, ends, blocks, scales, bias, a_x, lora_b, out, num_experts, top_k, rank, limit, alpha,
    SIZE: tl.constexpr, HALVES: tl.constexpr, EXPERTS: tl.constexpr, TOKENS: tl.constexpr, ROWS: tl.constexpr,
    STEP: tl.constexpr, RANK: tl.constexpr, AS_FLOAT: tl.constexpr, STAGES: tl.constexpr,
    WIDE: tl.constexpr,
):  # fmt: skip
    expert, first, end = _tile(ends, tl.program_id(0), num_experts, EXPERTS, TOKENS)
    if first < end:
        row = first + tl.arange(0, TOKENS)
        row_inside = row < end
        x_at = (tl.load(order + row, mask=row_inside, other=0) // top_k).to(tl.int32) * (4 * HALVES)
        first_row = expert.to(tl.int64) * 2 * SIZE
        # the tile's rows are those of gates, then those of ups; the checkpoint's are g0 u0 g1 u1 ...
        place = tl.arange(0, ROWS)
        column = tl.program_id(1) * (ROWS // 2) + place % (ROWS // 2)
        inside = column < SIZE
        packed = 2 * tl.minimum(column, SIZE - 1) + place // (ROWS // 2)
        total = _together(
            x, x_at, row_inside, blocks + first_row * HALVES, scales + first_row * (HALVES // 8), packed,
            HALVES, ROWS, TOKENS, STEP, STAGES, WIDE, AS_FLOAT,
        )  # fmt: skip
        at = first_row + place // (ROWS // 2) * SIZE + column
        if RANK > 0:
            total = _adapt(total, a_x, lora_b, at, inside, row, row_inside, rank, RANK, AS_FLOAT)
        total += tl.load(bias + at, mask=inside, other=0).to(tl.float32)[:, None]
        gate, up = tl.split(tl.permute(tl.reshape(total, (2, ROWS // 2, TOKENS)), (1, 2, 0)))
        hidden = _swiglu(gate, up, limit, alpha)
        column = tl.program_id(1) * (ROWS // 2) + tl.arange(0, ROWS // 2)
        there = row_inside[None] & (column < SIZE)[:, None]
        at = out + row[None] * SIZE + _arranged(column, SIZE, 4)[:, None]
        tl.store(at, hidden.to(out.dtype.element_ty), mask=there)


@triton.jit
def _down_tile(
    x, ends, blocks, scales, a_x, lora_b, out, num_experts, rank,
    SIZE: tl.constexpr, HALVES: tl.constexpr, EXPERTS: tl.constexpr, TOKENS: tl.constexpr, ROWS: tl.constexpr,
    STEP: tl.constexpr, RANK: tl.constexpr, AS_FLOAT: tl.constexpr, STAGES: tl.constexpr,
    WIDE: tl.constexpr,
):  # fmt: skip
    expert, first, end = _tile(ends, tl.program_id(0), num_experts, EXPERTS, TOKENS)
    if first < end:
        row = first + tl.arange(0, TOKENS)
        row_inside = row < end
        column = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
        inside = column < SIZE
        first_row = expert.to(tl.int64) * SIZE
        y = _together(
            x, row * (4 * HALVES), row_inside, blocks + first_row * HALVES, scales + first_row * (HALVES // 8),
            tl.minimum(column, SIZE - 1), HALVES, ROWS, TOKENS, STEP, STAGES, WIDE, AS_FLOAT,
        )  # fmt: skip
        if RANK > 0:
            y = _adapt(y, a_x, lora_b, first_row + column, inside, row, row_inside, rank, RANK, AS_FLOAT)
        there = row_inside[None] & inside[:, None]
        tl.store(out + row[None] * SIZE + column[:, None], y.to(out.dtype.element_ty), mask=there)


def mixture(
    residual_BD: Tensor, x_BD: Tensor, logits_BE: Tensor, top_k: int, gate_up: Projection, down: Projection,
    limit: float, alpha: float, *, norm: tuple[Tensor, float] | None = None, alone: bool | None = None,
    wide: bool = True,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Each token through its experts, and their weighted sum on top of the residual.

    norm     weights (D,) and epsilon, where x is not normed yet
    alone    each choice by itself instead of in tiles; None: for few tokens
    wide     whether a scale may be above LARGEST_SCALE
    Returns  (B, D), and the chosen experts (B, k) int64
    """
    (rows, width), num_experts, device = x_BD.shape, logits_BE.shape[1], x_BD.device
    choices, size = rows * top_k, gate_up[0].shape[1] // 2
    assert x_BD.is_contiguous()
    alone = rows <= ALONE if alone is None else alone
    experts, row = (torch.empty((rows, top_k), dtype=torch.int64, device=device) for _ in range(2))
    shares = torch.empty((rows, top_k), dtype=logits_BE.dtype, device=device)
    x = torch.empty((rows, width), dtype=torch.float32 if alone else x_BD.dtype, device=device)
    norm_D, eps = norm or (x_BD, 0.0)
    _route[(rows,)](
        logits_BE, experts, shares, row, x_BD, norm_D, x, num_experts, eps, K=top_k,
        SLOTS=triton.next_power_of_2(top_k), EXPERTS=triton.next_power_of_2(num_experts), WIDTH=width,
        UNIT=8 if alone else 4, NORM=norm is not None, BLOCK=triton.next_power_of_2(width),
    )  # fmt: skip
    order, ends = experts, experts  # not read where each choice goes by itself
    if not alone:
        order, row, ends = sort(experts, num_experts)
    routed = _Routed(experts, order, ends, x_BD.dtype, alone, wide)
    hidden = torch.empty((choices, size), dtype=x.dtype, device=device)
    routed.project(x, gate_up, hidden, (limit, alpha))
    y = torch.empty((choices, width), dtype=x_BD.dtype, device=device)
    routed.project(hidden, down, y, None)
    return combine(y, None, down[2], shares, row, experts, residual_BD), experts


@dataclass(frozen=True, slots=True)
class _Routed:
    """A step's choices, see `choose`, and arranged inputs. `alone`: they aren't sorted, and the inputs are lifted."""

    experts_Bk: Tensor
    order_N: Tensor
    ends_E: Tensor
    dtype: torch.dtype
    alone: bool
    wide: bool = True

    def project(self, x: Tensor, projection: Projection, out: Tensor, bounds: tuple[float, float] | None) -> None:
        """`bounds`: limit and alpha of gate_up, whose x is a token's; None: down, whose x is a choice's."""
        packed, scales, bias, lora_a, lora_b = projection
        top_k, (choices, size), num_experts = self.experts_Bk.shape[1], out.shape, len(packed)
        a_x, rank, sizes = x, 0, {"SIZE": out.shape[1], "WORDS": x.shape[1] // 8}
        if lora_a is not None:
            rank = lora_a.shape[1]
            a_x = torch.empty((choices, rank), dtype=self.dtype, device=x.device)
            _shrink[(choices, rank)](
                x, lora_a, self.experts_Bk, self.order_N, a_x, top_k, rank, PER_TOKEN=bounds is not None,
                ALONE=self.alone, WORDS=sizes["WORDS"], BLOCK=triton.next_power_of_2(x.shape[1]),
            )  # fmt: skip
        factors = bias if lora_b is None else lora_b
        if self.alone:
            sizes |= {"ROWS": ALONE_ROWS, "GROUPS": ALONE_GROUPS, "RANK": rank and triton.next_power_of_2(rank)}
            grid = (triton.cdiv(size if bounds is None else 2 * size, ALONE_ROWS), choices)
            inputs = x, self.experts_Bk, packed.view(torch.int32), scales
            if bounds is not None:
                _gate_up_alone[grid](*inputs, bias, a_x, factors, out, top_k, rank, *bounds, **sizes)
            else:
                _down_alone[grid](*inputs, a_x, factors, out, rank, **sizes)
            return
        tokens = min(max(FIRST_TILE, triton.next_power_of_2(triton.cdiv(2 * choices, num_experts))), MOST_TOKENS)
        as_float = INTERPRETED or x.dtype == torch.float32
        rows, step, stages, warps = FLOAT_TILE if as_float else TILES[tokens]
        sizes |= {"EXPERTS": triton.next_power_of_2(num_experts), "TOKENS": tokens, "ROWS": rows, "STEP": step}
        sizes |= {"RANK": rank and max(16, triton.next_power_of_2(rank)), "STAGES": stages, "WIDE": self.wide}
        sizes |= {"AS_FLOAT": as_float, "HALVES": 2 * sizes.pop("WORDS")}
        most = min(choices, num_experts) + choices // tokens  # tiles
        if bounds is not None:
            _gate_up_tile[(most, triton.cdiv(2 * size, rows))](
                x, self.order_N, self.ends_E, packed.view(torch.int16), scales, bias, a_x, factors, out, num_experts,
                top_k, rank, *bounds, **sizes, num_warps=warps,
            )  # fmt: skip
        else:
            _down_tile[(most, triton.cdiv(size, rows))](
                x, self.ends_E, packed.view(torch.int16), scales, a_x, factors, out, num_experts, rank, **sizes,
                num_warps=warps,
            )  # fmt: skip
