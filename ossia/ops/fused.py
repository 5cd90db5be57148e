"""The parts of a layer between its matrix products: in torch, or fused into few passes: Triton on a GPU, C on a CPU.

`Parts` is what a layer calls; `TORCH` is the reference, and `parts_for` picks. All give the same numbers up to the
order of a few roundings: the kernels compute in float32 what torch rounds after every operation.
Letters as in `ops.moe`; J = 2 I.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Protocol

import torch
from torch import Tensor

from ossia.kernels import Kernels, passes_for
from ossia.ops.linear import rms_norm
from ossia.ops.moe import Expert, Route, Sort, adapter_part, base_part, mixture, sort_by_expert
from ossia.ops.rope import apply_rope

Adapt = Callable[[Tensor, int], Tensor | None]
"""(input of an adapter, which one) -> what the adapter gets instead, or None for the input itself (dropout)."""


Mixture = Callable[[Tensor, Tensor, Route, Expert, Expert, float, float, Adapt], Tensor]
"""(residual_TD, x_TD, routing, gate_up, down, limit, alpha, adapt) -> (T, D), see `ops.moe.mixture`."""


@dataclass(frozen=True, slots=True)
class Parts:
    """One way to compute them; see the functions of the same names."""

    rms_norm: Callable[[Tensor, Tensor, float], Tensor]
    apply_rope: Callable[[Tensor, Tensor, Tensor], Tensor]
    sort: Sort
    mixture: Mixture


TORCH = Parts(rms_norm, apply_rope, sort_by_expert, mixture)


class Passes(Protocol):
    """Kernels that the fused parts are made of: `kernels.cpu.passes` and `kernels.gpu.passes`, which describe them."""

    def together(self, product_NO: Tensor, extra_NO: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """What is kept until backward of a product and what its adapter adds."""

    swiglu: Callable[..., Tensor]
    swiglu_backward: Callable[..., Tensor]
    combine: Callable[..., Tensor]
    combine_backward: Callable[..., tuple[Tensor, Tensor]]
    sum_rows: Callable[[Tensor, Tensor], Tensor]
    sum_by_expert: Callable[[Tensor, Tensor], Tensor]
    rms_norm: Callable[[Tensor, Tensor, float], tuple[Tensor, Tensor]]
    rms_norm_backward: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
    rms_norm_weight_gradient: Callable[[Tensor, Tensor, Tensor], Tensor]
    rotate: Callable[..., Tensor]


def parts_for(kernels: Kernels, dtype: torch.dtype = torch.float32) -> Parts:
    """The parts by name, for activations of a dtype."""
    if kernels == "torch":
        return TORCH
    passes = passes_for(kernels)
    if dtype == torch.float16:  # the fused sum of experts knows no outputs beyond it
        return replace(TORCH, rms_norm=partial(_rms_norm, passes), apply_rope=partial(_apply_rope, passes))
    sort = passes.sort if kernels == "c" else sort_by_expert  # a GPU is best served by torch's own
    return Parts(partial(_rms_norm, passes), partial(_apply_rope, passes), sort, partial(_mixture, passes))


def _rms_norm(passes: Passes, x_TD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    return _RmsNorm.apply(passes, x_TD, weight_D, eps)


def _apply_rope(passes: Passes, x_THd: Tensor, cos_TF: Tensor, sin_TF: Tensor) -> Tensor:
    return _Rotate.apply(passes, x_THd, cos_TF, sin_TF)


def _mixture(
    passes: Passes,
    residual_TD: Tensor,
    x_TD: Tensor,
    routing: Route,
    gate_up: Expert,
    down: Expert,
    limit: float,
    alpha: float,
    adapt: Adapt,
) -> Tensor:
    ends_E = routing.ends_E
    expert_N = routing.experts_TK.flatten().index_select(0, routing.order_N)
    x_ND = _ToExperts.apply(passes, x_TD, routing.token_N, routing.row_TK)
    h_NJ = base_part(x_ND, gate_up, ends_E)
    h_NJ, extra_NJ = passes.together(h_NJ, adapter_part(x_ND, gate_up, ends_E, adapt(x_ND, 5)))
    hidden_NI = _Swiglu.apply(passes, h_NJ, extra_NJ, gate_up.bias, expert_N, ends_E, limit, alpha)
    y_ND = base_part(hidden_NI, down, ends_E)
    y_ND, extra_ND = passes.together(y_ND, adapter_part(hidden_NI, down, ends_E, adapt(hidden_NI, 6)))
    return _Combine.apply(passes, residual_TD, y_ND, extra_ND, down.bias, routing.weights_TK, routing)


class _RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, passes, x_TD, weight_D, eps):
        x_TD = x_TD.contiguous()
        out, inverse_T = passes.rms_norm(x_TD, weight_D, eps)
        ctx.passes = passes
        ctx.save_for_backward(x_TD, weight_D, inverse_T)
        return out

    @staticmethod
    def backward(ctx, grad_TD):
        x_TD, weight_D, inverse_T = ctx.saved_tensors
        grad_TD = grad_TD.contiguous()
        dx = ctx.passes.rms_norm_backward(grad_TD, x_TD, weight_D, inverse_T)
        if not ctx.needs_input_grad[2]:
            return None, dx, None, None
        return None, dx, ctx.passes.rms_norm_weight_gradient(grad_TD, x_TD, inverse_T).to(weight_D.dtype), None


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx, passes, x_THd, cos_TF, sin_TF):
        ctx.passes = passes
        ctx.save_for_backward(cos_TF, sin_TF)
        return passes.rotate(x_THd, cos_TF, sin_TF, back=False)

    @staticmethod
    def backward(ctx, grad_THd):
        return None, ctx.passes.rotate(grad_THd, *ctx.saved_tensors, back=True), None, None


class _ToExperts(torch.autograd.Function):
    """Each token's row, once for each of its experts; backward is a sum over them, in order."""

    @staticmethod
    def forward(ctx, passes, x_TD, token_N, row_TK):
        ctx.passes = passes
        ctx.save_for_backward(row_TK)
        return x_TD.index_select(0, token_N)

    @staticmethod
    def backward(ctx, grad_ND):
        (row_TK,) = ctx.saved_tensors
        return None, ctx.passes.sum_rows(grad_ND.contiguous(), row_TK), None, None


class _Swiglu(torch.autograd.Function):
    @staticmethod
    def forward(ctx, passes, h_NJ, extra_NJ, bias_EJ, expert_N, ends_E, limit, alpha):
        bias_EJ = bias_EJ.contiguous()
        ctx.passes, ctx.bounds = passes, (limit, alpha)
        ctx.save_for_backward(h_NJ, extra_NJ, bias_EJ, expert_N, ends_E)
        return passes.swiglu(h_NJ, extra_NJ, bias_EJ, expert_N, limit, alpha)

    @staticmethod
    def backward(ctx, grad_NI):
        h_NJ, extra_NJ, bias_EJ, expert_N, ends_E = ctx.saved_tensors
        dh = ctx.passes.swiglu_backward(grad_NI.contiguous(), h_NJ, extra_NJ, bias_EJ, expert_N, *ctx.bounds)
        dbias = ctx.passes.sum_by_expert(dh, ends_E).to(bias_EJ.dtype) if ctx.needs_input_grad[3] else None
        return None, dh, None if extra_NJ is None else dh, dbias, None, None, None, None


class _Combine(torch.autograd.Function):
    @staticmethod
    def forward(ctx, passes, residual_TD, y_ND, extra_ND, bias_ED, weights_TK, routing):
        places = routing.row_TK, routing.experts_TK
        bias_ED = bias_ED.contiguous()
        ctx.passes = passes
        ctx.save_for_backward(y_ND, extra_ND, bias_ED, weights_TK, *places, routing.ends_E)
        return passes.combine(y_ND, extra_ND, bias_ED, weights_TK, *places, residual_TD.contiguous())

    @staticmethod
    def backward(ctx, grad_TD):
        *given, ends_E = ctx.saved_tensors
        extra_ND, bias_ED = given[1], given[2]
        dy, dweights = ctx.passes.combine_backward(grad_TD.contiguous(), *given)
        dbias = ctx.passes.sum_by_expert(dy, ends_E).to(bias_ED.dtype) if ctx.needs_input_grad[4] else None
        return None, grad_TD, dy, None if extra_ND is None else dy, dbias, dweights, None
