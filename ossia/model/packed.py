"""Experts in MXFP4 with what training changed merged in: what an export writes, and what `qat: mxfp4` computes with.

One function for both, so that what a run computed with is bit for bit what is exported. A delta is summed in float64
and added before the one rounding to float32, so that no machine's order of summing decides on a code. An expert without
a delta keeps its bytes, codes for -0.0 included.
Letters: E experts, O out, D in, G = D / 32 blocks, r rank.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from ossia.ops.mxfp4 import BLOCK, dequantize_mxfp4, quantize_mxfp4

_PIECE = 1 << 24  # weights merged at a time; a float64 copy of them is 128 MiB
_CPU_PIECE = 1 << 19  # whose copies stay in the second-level cache or near it


class Packed(NamedTuple):
    """Experts' weights in MXFP4.

    blocks  (E, O, G, 16) uint8
    scales  (E, O, G) uint8
    """

    blocks: Tensor
    scales: Tensor

    def expand(self, dtype: torch.dtype, *, split: bool = False) -> Tensor:
        """(E, O, D). split: gate and up rows, which come in turn, one after the other."""
        return dequantize_mxfp4(self.blocks, self.scales, dtype, split=split)


class Factors(NamedTuple):
    """An adapter's delta scale * B A; float32, rows of B in the order of the base's rows.

    a  (E, r, D)
    b  (E, O, r)
    """

    a: Tensor
    b: Tensor
    scale: float


Base = Packed | Tensor
"""Experts before training, or as it left them: in MXFP4, or (E, O, D) of any float dtype and with any strides."""


def merged_experts(base: Base, delta: Factors | None) -> Tensor:
    """The base plus the delta, rounded once. Returns (E, O, D) float32."""
    weight_EOD = (
        base.expand(torch.float32) if isinstance(base, Packed) else base.to(torch.float32, copy=delta is not None)
    )
    if delta is None:
        return weight_EOD
    rows = max(1, (_CPU_PIECE if weight_EOD.device.type == "cpu" else _PIECE) // weight_EOD.shape[2])
    for expert, changed in enumerate(_changed(delta).tolist()):
        a_rD = delta.a[expert].double()
        parts = zip(weight_EOD[expert].split(rows), delta.b[expert].split(rows), strict=True) if changed else ()
        for weight, b in parts:
            weight.copy_(torch.addmm(weight.double(), b.double(), a_rD, alpha=delta.scale))
    return weight_EOD


def rounded_experts(base: Base, delta: Factors | None, merged_EOD: Tensor) -> Packed:
    """Merged weights in MXFP4, each block under the scale with the least squared error.

    merged_EOD  what `merged_experts` gives; MXFP4 experts without a delta keep their bytes, whatever it is there
    Raises      CheckpointError if a weight is not finite
    """
    found = Packed(*quantize_mxfp4(merged_EOD))
    if not isinstance(base, Packed):
        return found
    assert delta is not None, "nothing to round: the base is in MXFP4 already"
    changed_E = _changed(delta)
    return Packed(
        torch.where(changed_E[:, None, None, None], found.blocks, base.blocks),
        torch.where(changed_E[:, None, None], found.scales, base.scales),
    )


def packed_experts(base: Base, delta: Factors | None) -> Packed:
    """Base and delta merged and rounded to MXFP4, some experts at a time."""
    if isinstance(base, Packed) and delta is None:
        return base
    found = [rounded_experts(*some, merged_experts(*some)) for some in pieces(base, delta)]
    return found[0] if len(found) == 1 else Packed(*(torch.cat(parts) for parts in zip(*found, strict=True)))


def pieces(base: Base, delta: Factors | None, at_once: int | None = None) -> Iterator[tuple[Base, Factors | None]]:
    """Some experts after the other of both, `at_once` (None: as many as keep a float64 copy small)."""
    num_experts, fan_out = (base.blocks if isinstance(base, Packed) else base).shape[:2]
    fan_in = base.blocks.shape[2] * BLOCK if isinstance(base, Packed) else base.shape[2]
    at_once = at_once or max(1, _PIECE // (fan_out * fan_in))
    for start in range(0, num_experts, at_once):
        some = slice(start, start + at_once)
        part = Packed(base.blocks[some], base.scales[some]) if isinstance(base, Packed) else base[some]
        yield part, None if delta is None else Factors(delta.a[some], delta.b[some], delta.scale)


def _changed(delta: Factors) -> Tensor:
    """(E,) bool: which experts have a delta at all. Those that no token was sent to in training have none."""
    return delta.a.flatten(1).any(1) & delta.b.flatten(1).any(1)
