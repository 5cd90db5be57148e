"""MXFP4 to floats, by arithmetic; reference: `ops.mxfp4.dequantize_mxfp4`. A pass at the speed of memory.

Letters: E experts, O rows, G groups of 32 weights.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_GROUPS = 128  # of a program: 4,096 weights


@triton.jit
def _code_value(code):
    """Twice the value of a 4-bit code, without its sign: 0, 1, 2, 3, 4, 6, 8, 12."""
    size = code & 7
    # the shift is of no account below 2, but has to be one
    return tl.where(size < 2, size, (2 + (size & 1)) << (tl.maximum(size >> 1, 1) - 1))


@triton.jit
def _half_scale(byte):
    """2^(byte - 128) as float32 from its bits; NaN for 255. Half, since `_code_value` gives twice the value."""
    bits = tl.where(byte > 1, (byte - 1) << 23, tl.where(byte == 1, 0x00400000, 0x00200000))
    return tl.where(byte == 255, 0x7FC00000, bits).to(tl.float32, bitcast=True)


@triton.jit
def _expand(
    blocks, scales, out, num_groups, rows, groups_a_row, SPLIT: tl.constexpr, GROUPS: tl.constexpr
):  # fmt: skip
    group = tl.program_id(0).to(tl.int64) * GROUPS + tl.arange(0, GROUPS)
    inside = group < num_groups
    place = group % groups_a_row
    row = group // groups_a_row
    if SPLIT:  # output row r of an expert is packed row 2 r, and of the second half 2 (r - half) + 1
        expert, r = row // rows, row % rows
        half = rows // 2
        row = expert * rows + tl.where(r < half, 2 * r, 2 * (r - half) + 1)
    source = row * groups_a_row + place
    half_scale = _half_scale(tl.load(scales + source, mask=inside, other=0).to(tl.int32))
    byte = tl.load(blocks + source[:, None] * 16 + tl.arange(0, 16)[None], mask=inside[:, None], other=0).to(tl.int32)
    low, high = byte & 15, byte >> 4
    # a product by -1 keeps the sign of zero
    low_value = _code_value(low).to(tl.float32) * tl.where(low < 8, 1.0, -1.0) * half_scale[:, None]
    high_value = _code_value(high).to(tl.float32) * tl.where(high < 8, 1.0, -1.0) * half_scale[:, None]
    value = tl.interleave(low_value, high_value)
    place_out = group[:, None] * 32 + tl.arange(0, 32)[None]
    tl.store(out + place_out, value.to(out.dtype.element_ty), mask=inside[:, None])


def dequantize(blocks: Tensor, scales: Tensor, dtype: torch.dtype, *, split: bool) -> Tensor:
    """The weights of packed experts.

    blocks  (E, O, G, 16) uint8, contiguous; scales (E, O, G) uint8, contiguous
    split   rows from the checkpoint's order g0 u0 g1 u1 ... to g0 g1 ... u0 u1 ...
    Returns (E, O, 32 G) of `dtype`
    """
    assert blocks.is_contiguous()
    assert scales.is_contiguous()
    num_experts, rows, groups = scales.shape
    out = torch.empty(num_experts, rows, groups * 32, dtype=dtype, device=blocks.device)
    total = scales.numel()
    _expand[(triton.cdiv(total, _GROUPS),)](blocks, scales, out, total, rows, groups, SPLIT=split, GROUPS=_GROUPS)
    return out
