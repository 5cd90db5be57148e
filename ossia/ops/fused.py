"""The parts of a layer between its matrix products: in torch, or fused into few passes by Triton kernels on a GPU.

`Parts` is what a layer calls; `TORCH` is the reference, and `parts_for` picks. Both give the same numbers up to the
order of a few roundings: the kernels compute in float32 what torch rounds after every operation.
Letters as in `ops.moe`; J = 2 I.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ossia.kernels import Kernels
from ossia.ops.linear import rms_norm
from ossia.ops.moe import Expert, Route, adapter_part, mixture
from ossia.ops.rope import apply_rope

Adapt = Callable[[Tensor, int], Tensor | None]
"""(input of an adapter, which one) -> what the adapter gets instead, or None for the input itself (dropout)."""


@dataclass(frozen=True, slots=True)
class Parts:
    """One way to compute them; see the functions of the same names.

    mixture  (residual_TD, x_TD, routing, gate_up, down, limit, alpha, adapt) -> (T, D), see `ops.moe.mixture`
    """

    rms_norm: Callable[[Tensor, Tensor, float], Tensor]
    apply_rope: Callable[[Tensor, Tensor, Tensor], Tensor]
    mixture: Callable[[Tensor, Tensor, Route, Expert, Expert, float, float, Adapt], Tensor]


TORCH = Parts(rms_norm, apply_rope, mixture)


def parts_for(kernels: Kernels) -> Parts:
    """The parts by name."""
    return TORCH if kernels == "torch" else Parts(_rms_norm, _apply_rope, _mixture)


def _rms_norm(x_TD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    return _RmsNorm.apply(x_TD, weight_D, eps)


def _apply_rope(x_THd: Tensor, cos_TF: Tensor, sin_TF: Tensor) -> Tensor:
    return _Rotate.apply(x_THd, cos_TF, sin_TF)


def _mixture(
    residual_TD: Tensor,
    x_TD: Tensor,
    routing: Route,
    gate_up: Expert,
    down: Expert,
    limit: float,
    alpha: float,
    adapt: Adapt,
) -> Tensor:
    expert_N = routing.experts_TK.flatten().index_select(0, routing.order_N)
    x_ND = _ToExperts.apply(x_TD, routing.token_N, routing.row_TK)
    h_NJ = F.grouped_mm(x_ND, gate_up.weight.transpose(1, 2), offs=routing.ends_E)
    extra = adapter_part(x_ND, gate_up, routing.ends_E, adapt(x_ND, 5))
    hidden_NI = _Swiglu.apply(h_NJ, extra, gate_up.bias, expert_N, routing.ends_E, limit, alpha)
    y_ND = F.grouped_mm(hidden_NI, down.weight.transpose(1, 2), offs=routing.ends_E)
    extra = adapter_part(hidden_NI, down, routing.ends_E, adapt(hidden_NI, 6))
    return _Combine.apply(residual_TD, y_ND, extra, down.bias, routing.weights_TK, routing)


def _bias_gradient(rows_NO: Tensor, ends_E: Tensor) -> Tensor:
    """The sum of each expert's rows, (E, O): a product with ones, which repeats bit for bit where atomics don't."""
    ones_8N = rows_NO.new_ones(len(rows_NO), 8).t()  # whole 16 bytes of it, which the grouped product asks for
    return F.grouped_mm(ones_8N, rows_NO, offs=ends_E)[:, 0]


class _RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_TD, weight_D, eps):
        from ossia.kernels.gpu import rows

        out, inverse_T = rows.rms_norm(x_TD, weight_D, eps)
        ctx.save_for_backward(x_TD, weight_D, inverse_T)
        return out

    @staticmethod
    def backward(ctx, grad_TD):
        from ossia.kernels.gpu import rows

        x_TD, weight_D, inverse_T = ctx.saved_tensors
        grad_TD = grad_TD.contiguous()
        dx = rows.rms_norm_backward(grad_TD, x_TD, weight_D, inverse_T)
        if not ctx.needs_input_grad[1]:
            return dx, None, None
        return dx, (grad_TD.float() * x_TD.float() * inverse_T[:, None]).sum(0).to(weight_D.dtype), None


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_THd, cos_TF, sin_TF):
        from ossia.kernels.gpu import rows

        ctx.save_for_backward(cos_TF, sin_TF)
        return rows.rotate(x_THd.contiguous(), cos_TF, sin_TF, back=False)

    @staticmethod
    def backward(ctx, grad_THd):
        from ossia.kernels.gpu import rows

        return rows.rotate(grad_THd.contiguous(), *ctx.saved_tensors, back=True), None, None


class _ToExperts(torch.autograd.Function):
    """Each token's row, once for each of its experts; backward is a sum over them, in order."""

    @staticmethod
    def forward(ctx, x_TD, token_N, row_TK):
        ctx.save_for_backward(row_TK)
        return x_TD.index_select(0, token_N)

    @staticmethod
    def backward(ctx, grad_ND):
        from ossia.kernels.gpu import experts

        (row_TK,) = ctx.saved_tensors
        return experts.sum_rows(grad_ND.contiguous(), row_TK), None, None


class _Swiglu(torch.autograd.Function):
    @staticmethod
    def forward(ctx, h_NJ, extra_NJ, bias_EJ, expert_N, ends_E, limit, alpha):
        from ossia.kernels.gpu import experts

        ctx.save_for_backward(h_NJ, extra_NJ, bias_EJ, expert_N, ends_E)
        ctx.bounds = limit, alpha
        return experts.swiglu(h_NJ, extra_NJ, bias_EJ, expert_N, limit, alpha)

    @staticmethod
    def backward(ctx, grad_NI):
        from ossia.kernels.gpu import experts

        h_NJ, extra_NJ, bias_EJ, expert_N, ends_E = ctx.saved_tensors
        dh = experts.swiglu_backward(grad_NI.contiguous(), h_NJ, extra_NJ, bias_EJ, expert_N, *ctx.bounds)
        dbias = _bias_gradient(dh, ends_E).to(bias_EJ.dtype) if ctx.needs_input_grad[2] else None
        return dh, None if extra_NJ is None else dh, dbias, None, None, None, None


class _Combine(torch.autograd.Function):
    @staticmethod
    def forward(ctx, residual_TD, y_ND, extra_ND, bias_ED, weights_TK, routing):
        from ossia.kernels.gpu import experts

        ctx.save_for_backward(
            y_ND, extra_ND, bias_ED, weights_TK, routing.row_TK, routing.experts_TK, routing.ends_E
        )  # fmt: skip
        return experts.combine(
            y_ND, extra_ND, bias_ED, weights_TK, routing.row_TK, routing.experts_TK, residual_TD.contiguous()
        )

    @staticmethod
    def backward(ctx, grad_TD):
        from ossia.kernels.gpu import experts

        y_ND, extra_ND, bias_ED, weights_TK, row_TK, experts_TK, ends_E = ctx.saved_tensors
        dy, dweights = experts.combine_backward(
            grad_TD.contiguous(), y_ND, extra_ND, bias_ED, weights_TK, row_TK, experts_TK
        )
        dbias = _bias_gradient(dy, ends_E).to(bias_ED.dtype) if ctx.needs_input_grad[3] else None
        return grad_TD, dy, None if extra_ND is None else dy, dbias, dweights, None
