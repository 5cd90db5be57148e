"""A projection with bias and low-rank adapter, RMS normalisation, and dropout that a recomputation repeats exactly.

Letters: T tokens, D in, O out, r rank.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Linear:
    """weight (O, D); bias (O,) or None; lora_a (r, D) and lora_b (O, r), already scaled, or None."""

    weight: Tensor
    bias: Tensor | None = None
    lora_a: Tensor | None = None
    lora_b: Tensor | None = None


@dataclass(frozen=True, slots=True)
class Dropout:
    """Zeroes a share of an adapter's inputs; the mask follows from the seed and the name, so it can be drawn again."""

    share: float
    seed: int

    def __call__(self, x: Tensor, name: int) -> Tensor:
        """x with about `share` of its elements zeroed and the rest scaled to keep the mean."""
        generator = torch.Generator(device=x.device).manual_seed((self.seed * 1_000_003 + name) % 2**63)
        kept = torch.rand(x.shape, generator=generator, device=x.device, dtype=torch.float32) >= self.share
        return x * kept * (1.0 / (1.0 - self.share))


def linear(x_TD: Tensor, layer: Linear, lora_x_TD: Tensor | None = None) -> Tensor:
    """x W^T + b, and the adapter's (x A^T) B^T on top, never merged into W.

    lora_x_TD  the adapter's input where it differs from x (dropout)
    Returns    (T, O) of x's dtype
    Source     LoRA, arXiv:2106.09685
    """
    y_TO = F.linear(x_TD, layer.weight, layer.bias)
    if layer.lora_a is None or layer.lora_b is None:
        return y_TO
    a_Tr = F.linear(x_TD if lora_x_TD is None else lora_x_TD, layer.lora_a)
    return torch.addmm(y_TO, a_Tr, layer.lora_b.t())


def wide_linear(x_TD: Tensor, layer: Linear, lora_x_TD: Tensor | None = None) -> Tensor:
    """`linear` onto the residual stream, where a few tokens' numbers are beyond what float16 holds (65,504).

    Returns  (T, O) of x's dtype; float32 where that is float16, see `NARROW`
    """
    if x_TD.dtype != torch.float16:
        return linear(x_TD, layer, lora_x_TD)
    small = Linear(layer.weight, None, layer.lora_a, layer.lora_b)
    y_TO = linear(x_TD * NARROW, small, None if lora_x_TD is None else lora_x_TD * NARROW).float() / NARROW
    return y_TO if layer.bias is None else y_TO + layer.bias.float()


NARROW = 2.0**-6
"""What float16 inputs are multiplied with, and the product, in float32, divided by: results up to four million don't
overflow, and what becomes too small on the way is below 2e-6, which no residual stream shows."""


def rms_norm(x_TD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight, computed in float32 and rounded once. Returns (T, D) of weight's dtype."""
    return _RmsNorm.apply(x_TD, weight_D, eps)


class _RmsNorm(torch.autograd.Function):
    """Keeps x and one number a row; autograd's own would keep three float32 copies of x."""

    @staticmethod
    def forward(ctx, x_TD, weight_D, eps):
        x = x_TD.float()
        inverse_T1 = torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
        ctx.save_for_backward(x_TD, weight_D, inverse_T1)
        return (x * inverse_T1 * weight_D.float()).to(weight_D.dtype)

    @staticmethod
    def backward(ctx, grad_TD):
        x_TD, weight_D, inverse_T1 = ctx.saved_tensors
        normed_TD, grad = x_TD.float() * inverse_T1, grad_TD.float()
        dnormed_TD = grad * weight_D.float()
        dx = (dnormed_TD - normed_TD * (dnormed_TD * normed_TD).mean(-1, keepdim=True)) * inverse_T1
        dweight = (grad * normed_TD).sum(0).to(weight_D.dtype) if ctx.needs_input_grad[1] else None
        return dx.to(x_TD.dtype), dweight, None
