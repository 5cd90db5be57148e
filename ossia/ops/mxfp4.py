"""MXFP4, the four-bit format of the released experts: exact to floats and back.

32 weights along the input axis share one scale byte s; each is a 4-bit e2m1 code (sign, 2 exponent bits, 1 mantissa
bit) whose value is 0, 0.5, 1, 1.5, 2, 3, 4 or 6, times 2^(s - 127). Byte j of a block holds element 2j in its low
nibble and 2j + 1 in its high one. Own code: the checkpoint's bytes must survive untouched, on any device.
Source: OCP Microscaling Formats v1.0; the tensors of openai/gpt-oss-20b.
Letters: K weights along the input axis, B = K / 32 blocks.
"""

from __future__ import annotations

from functools import cache
from typing import Literal, get_args

import torch
from torch import Tensor

from ossia.errors import CheckpointError
from ossia.kernels.cpu.build import Unavailable
from ossia.kernels.cpu.mxfp4 import Mxfp4, load_mxfp4

BLOCK = 32
_MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_CPU_CHUNK = 1 << 14  # blocks at a time: index, result and table stay in the second-level cache
_DEVICE_CHUNK = 1 << 22
_LARGEST_SCALE = 252  # 6 * 2^(252 - 127) is still below float32's largest

ScaleRule = Literal["error", "largest"]
"""How a block's scale is chosen, see `quantize_mxfp4`."""
Kernels = Literal["torch", "c"]
"""c: on a CPU alone, the same bits some times as fast."""


def dequantize_mxfp4(
    blocks: Tensor,
    scales: Tensor,
    dtype: torch.dtype,
    out: Tensor | None = None,
    kernels: Kernels | None = None,
    *,
    split: bool = False,
) -> Tensor:
    """The weights that packed bytes stand for, each correctly rounded to `dtype`.

    blocks  (..., B, 16) uint8, contiguous, any device
    scales  (..., B) uint8, contiguous; 255 is the format's NaN and gives NaN
    dtype   bfloat16 and float32 are exact below their overflow to inf; float16 is within 2^-14 .. 65504
    out     (..., 32 B) of `dtype`, contiguous, written in place if given
    kernels None: C where there is a compiler, but for float16
    split   rows (the axis before B) come in turn, g0 u0 g1 u1 ..., and go to g0 g1 ... u0 u1 ...
    Returns (..., 32 B) of `dtype`; code 8 is -0.0
    """
    assert blocks.dtype == scales.dtype == torch.uint8
    assert blocks.shape == (*scales.shape, BLOCK // 2), f"blocks {blocks.shape} don't fit scales {scales.shape}"
    shape = (*scales.shape[:-1], scales.shape[-1] * BLOCK)
    if out is None:
        out = torch.empty(shape, dtype=dtype, device=blocks.device)
    assert out.is_contiguous()
    assert (out.shape, out.dtype) == (shape, dtype), f"out is {out.shape} {out.dtype}, to be {shape} {dtype}"
    if dtype != torch.float16 and (fast := _in_c(blocks.device, kernels)) is not None:
        fast.dequantize(blocks, scales, out, split=split)
        return out
    if split:  # reordering the packed bytes is four times less than the expanded ones
        blocks = torch.cat((blocks[..., 0::2, :, :], blocks[..., 1::2, :, :]), dim=-3)
        scales = torch.cat((scales[..., 0::2, :], scales[..., 1::2, :]), dim=-2)
    blocks_N16, scales_N, out_N32 = blocks.view(-1, BLOCK // 2), scales.view(-1), out.view(-1, BLOCK)
    chunk = _CPU_CHUNK if blocks.device.type == "cpu" else _DEVICE_CHUNK
    for start in range(0, len(scales_N), chunk):
        rows = slice(start, start + chunk)
        _dequantize_chunk(blocks_N16[rows], scales_N[rows], out_N32[rows])
    return out


def _dequantize_chunk(blocks_N16: Tensor, scales_N: Tensor, out_N32: Tensor) -> None:
    """One table look-up for two bytes (bfloat16) or one (float32), then one multiplication by the scale, in place."""
    scale_N1 = _scale_table(blocks_N16.device).index_select(0, scales_N.int()).unsqueeze(1)
    if out_N32.dtype == torch.bfloat16:
        if blocks_N16.storage_offset() % 2:  # an odd address can't be read as 16-bit words
            blocks_N16 = blocks_N16.clone()
        words = blocks_N16.view(torch.uint16).int().view(-1)
        torch.index_select(_bf16_quads(blocks_N16.device), 0, words, out=out_N32.view(torch.int64).view(-1))
        out_N32.mul_(scale_N1.bfloat16())
        return
    pairs = _float32_pairs(blocks_N16.device).index_select(0, blocks_N16.int().view(-1))
    wide_N32 = pairs.view(torch.float32).view(-1, BLOCK)
    out_N32.copy_(wide_N32.mul_(scale_N1))


def quantize_mxfp4(weights: Tensor, rule: ScaleRule = "error", kernels: Kernels | None = None) -> tuple[Tensor, Tensor]:
    """Round weights to MXFP4 along their last axis; weights already on a block's grid come back exactly.

    `error`: each block's scale is the one with the least squared error among all that the format has (of equals, the
    larger). `largest`: the smallest with which the block's largest weight doesn't saturate (OpenAI's choice; llama.cpp
    takes floor(log2 largest) - 2, which is that one or the one below). Codes round to nearest with ties to even, and
    keep the sign of a weight that becomes zero. Scale bytes written are 1 .. 252: 0 is below what every reader keeps,
    above 252 a code can be beyond float32.
    Bytes survive dequantize -> quantize where the block's largest code is 4 or 6; a block whose largest is smaller
    comes back as the same weights under a smaller scale.

    weights  (..., K) float32, bfloat16 or float16, any strides; K a multiple of 32
    kernels  None: C where there is a compiler
    Returns  blocks (..., K/32, 16) uint8, scales (..., K/32) uint8
    Raises   CheckpointError if a weight is not finite
    """
    assert rule in get_args(ScaleRule), rule
    *lead, fan_in = weights.shape
    assert fan_in % BLOCK == 0, f"{fan_in} inputs are not a multiple of {BLOCK}"
    blocks = torch.empty((*lead, fan_in // BLOCK, BLOCK // 2), dtype=torch.uint8, device=weights.device)
    scales = torch.empty((*lead, fan_in // BLOCK), dtype=torch.uint8, device=weights.device)
    weights_N32, blocks_N16, scales_N = weights.reshape(-1, BLOCK), blocks.view(-1, BLOCK // 2), scales.view(-1)
    fast = _in_c(weights.device, kernels)
    chunk = _CPU_CHUNK if weights.device.type == "cpu" and fast is None else _DEVICE_CHUNK
    for start in range(0, len(scales_N), chunk):
        rows = slice(start, start + chunk)
        some = weights_N32[rows].float().contiguous(), blocks_N16[rows], scales_N[rows]
        finite = _quantize_chunk(*some, rule) if fast is None else fast.quantize(*some, halve=rule == "error")
        if not finite:
            raise CheckpointError(
                "a weight is not finite (inf or nan) and MXFP4 can't hold it; the training run diverged"
            )
    return blocks, scales


def _in_c(device: torch.device, kernels: Kernels | None) -> Mxfp4 | None:
    if device.type != "cpu" or kernels == "torch":
        return None
    found = load_mxfp4()
    if isinstance(found, Unavailable):
        assert kernels is None, found.reason
        return None
    return found


def _quantize_chunk(weights_N32: Tensor, blocks_N16: Tensor, scales_N: Tensor, rule: ScaleRule) -> bool:
    """The reference; whether all weights are finite, else nothing is written."""
    size_N32 = weights_N32.abs()
    largest_N = size_N32.amax(dim=1)
    if not largest_N.isfinite().all():
        return False
    # Float32's exponent field is the scale byte's own form. 6 = 1.5 * 2^2: two below the largest weight's exponent,
    # one more where its mantissa is above 1.5, which the addition carries into the exponent.
    scale_N = (((largest_N.view(torch.int32) + 0x3FFFFF) >> 23) - 2).clamp_(1, _LARGEST_SCALE)
    size_N32.mul_(_inverse(scale_N).unsqueeze(1))
    code_N32 = _codes(size_N32)
    if rule == "error":
        _halve_where_better(size_N32, largest_N, scale_N, code_N32)
    code_N32 = code_N32.to(torch.uint8)
    code_N32 |= weights_N32.signbit().to(torch.uint8) << 3
    blocks_N16.copy_(code_N32[:, 0::2] | (code_N32[:, 1::2] << 4))
    scales_N.copy_(scale_N)
    return True


def _halve_where_better(size_N32: Tensor, largest_N: Tensor, scale_N: Tensor, code_N32: Tensor) -> None:
    """Take half the scale, in place, in blocks where that has the smaller squared error.

    No other scale has to be looked at. In units of the smallest scale that doesn't saturate, where the largest weight m
    is in (3, 6]: a larger scale's values up to 6 are among this one's, so no weight gets nearer. A scale smaller by 2^k
    loses (m - 6 / 2^k)^2 less this one's error in m, at least 2.25 for k >= 2, and wins at most 1/16 in each of the
    other 31 weights, all of it below 2, where this one's values are 1/2 apart: 31/16 = 1.94. For k = 1 the loss stays
    below that up to m = 4.47.
    """
    few = ((largest_N * _inverse(scale_N) < 4.5) & (scale_N > 1)).nonzero()[:, 0]
    size_R32, code_R32 = size_N32.index_select(0, few), code_N32.index_select(0, few)
    halved_R32 = _codes(size_R32 * 2)
    whole, half = _values(code_R32).double(), _values(halved_R32).mul_(0.5).double()
    # (x - whole)^2 - (x - half)^2; exact in any order: where it isn't 0 all are multiples of 2^-30, and below 2^10
    won_R = ((half - whole) * (2 * size_R32.double() - whole - half)).sum(1)
    better_R = won_R > 0
    code_N32.index_copy_(0, few, torch.where(better_R.unsqueeze(1), halved_R32, code_R32))
    scale_N.index_add_(0, few, better_R.to(scale_N.dtype), alpha=-1)


def _inverse(scale_N: Tensor) -> Tensor:
    """1 / 2^(s - 127) of scale bytes, int32, as float32."""
    return ((254 - scale_N) << 23).view(torch.float32)


def _codes(size: Tensor) -> Tensor:
    """The codes 0 .. 7, as floats, of sizes in units of their scale.

    Codes count halves up to 2, ones up to 4, twos above; torch.round takes ties to even, here the even codes.
    """
    code = torch.minimum((size * 2).round_(), size.round().add_(2))
    return torch.minimum(code, (size * 0.5).round_().add_(4)).clamp_(max=7)


def _values(code: Tensor) -> Tensor:
    """The sizes that such codes stand for: 0, 0.5, 1, 1.5, 2, 3, 4, 6."""
    return torch.maximum(torch.maximum(code * 0.5, code - 2), code * 2 - 8)


@cache
def _scale_table(device: torch.device) -> Tensor:
    """(256,) float32: 2^(s - 127), and NaN for 255."""
    exponent_S = torch.arange(256, dtype=torch.float64, device="cpu") - 127
    table_S = torch.exp2(exponent_S).float()
    table_S[255] = torch.nan
    return table_S.to(device)


def _code_values(codes: Tensor) -> Tensor:
    """float32 values of e2m1 codes 0..15."""
    values = [*_MAGNITUDES, *(-size for size in _MAGNITUDES)]
    return torch.tensor(values, dtype=torch.float32, device="cpu").index_select(0, codes)


@cache
def _float32_pairs(device: torch.device) -> Tensor:
    """(256,) int64, each the two float32 values of a byte."""
    byte = torch.arange(256, device="cpu")
    return torch.stack((_code_values(byte & 15), _code_values(byte >> 4)), dim=1).view(torch.int64).view(-1).to(device)


@cache
def _bf16_quads(device: torch.device) -> Tensor:
    """(65536,) int64, each the four bfloat16 values of two bytes (little-endian)."""
    word = torch.arange(1 << 16, device="cpu")
    nibbles = torch.stack([_code_values((word >> shift) & 15) for shift in (0, 4, 8, 12)], dim=1)
    return nibbles.bfloat16().view(torch.int64).view(-1).to(device)
