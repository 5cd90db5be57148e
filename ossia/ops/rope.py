"""Rotary position embedding with YaRN, as gpt-oss uses it: frequencies blended by wavelength, cos and sin scaled.

Own code because `truncate: false` in the released config is what other readers of the format get wrong (they round the
correction range to whole dimensions), and it changes every logit. Oracle: transformers' `GptOssRotaryEmbedding`.
Letters: T tokens, H heads, d head dimension, F = d / 2 frequencies.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Yarn:
    """YaRN's constants. `truncate` rounds the correction range to whole dimensions; the released config says false."""

    head_dim: int
    theta: float
    factor: float
    beta_fast: float
    beta_slow: float
    original_positions: int
    truncate: bool


def yarn_frequencies(yarn: Yarn) -> tuple[Tensor, float]:
    """Angular frequency of each rotary pair, and the factor that scales cos and sin.

    Returns  (F,) float32 radians per position; a plain float
    Source   YaRN, arXiv:2309.00071, sections 3.2 and 3.4
    """
    half = yarn.head_dim // 2
    base_F = yarn.theta ** (torch.arange(0, half, dtype=torch.float32) * 2 / yarn.head_dim)
    if yarn.factor <= 1.0:
        return 1.0 / base_F, 1.0

    def dimension_of(turns: float) -> float:
        """The (fractional) dimension that makes `turns` rotations over the original context."""
        return yarn.head_dim * math.log(yarn.original_positions / (turns * 2 * math.pi)) / (2 * math.log(yarn.theta))

    low, high = dimension_of(yarn.beta_fast), dimension_of(yarn.beta_slow)
    if yarn.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, yarn.head_dim - 1)
    if low == high:
        high += 0.001
    ramp_F = ((torch.arange(half, dtype=torch.float32) - low) / (high - low)).clamp(0, 1)
    frequencies_F = (1.0 / (yarn.factor * base_F)) * ramp_F + (1.0 / base_F) * (1 - ramp_F)
    return frequencies_F, 0.1 * math.log(yarn.factor) + 1.0


def rope_tables(yarn: Yarn, positions_T: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """cos and sin of every position, already scaled.

    positions_T  (T,) int64, from 0 in each document
    Returns      two (T, F) of `dtype`; the angles are computed in float32
    """
    frequencies_F, scale = yarn_frequencies(yarn)
    angles_TF = positions_T.to(torch.float32)[:, None] * frequencies_F.to(positions_T.device)
    return (angles_TF.cos() * scale).to(dtype), (angles_TF.sin() * scale).to(dtype)


def apply_rope(x_THd: Tensor, cos_TF: Tensor, sin_TF: Tensor) -> Tensor:
    """Rotates pair (i, i + d/2) of every head by its position's angle.

    x_THd    (T, H, d), any floating dtype; the tables in the same dtype
    Returns  (T, H, d)
    """
    first, second = x_THd.chunk(2, dim=-1)
    cos, sin = cos_TF[:, None], sin_TF[:, None]
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
