"""The kernels under the names that `ops.fused` and `ops.loss` call; `cpu/passes.py` is the same for a CPU."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from ossia.kernels.gpu.experts import combine, combine_backward, sum_rows, swiglu, swiglu_backward
from ossia.kernels.gpu.rows import exponentials_, rms_norm, rms_norm_backward, rotate

__all__ = [
    "combine",
    "combine_backward",
    "exponentials_",
    "rms_norm",
    "rms_norm_backward",
    "rms_norm_weight_gradient",
    "rotate",
    "sum_by_expert",
    "sum_rows",
    "swiglu",
    "swiglu_backward",
    "together",
]


def together(product_NO: Tensor, extra_NO: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Both apart: the kernels add them on the way, which saves a pass."""
    return product_NO, extra_NO


def sum_by_expert(rows_NO: Tensor, ends_E: Tensor) -> Tensor:
    """The sum of each expert's rows, (E, O): a product with ones, which repeats bit for bit where atomics don't."""
    ones_8N = rows_NO.new_ones(len(rows_NO), 8).t()  # whole 16 bytes of it, which the grouped product asks for
    return F.grouped_mm(ones_8N, rows_NO, offs=ends_E)[:, 0]


def rms_norm_weight_gradient(grad_TD: Tensor, x_TD: Tensor, inverse_T: Tensor) -> Tensor:
    """The gradient in the weight: (D,)."""
    return (grad_TD.float() * x_TD.float() * inverse_T[:, None]).sum(0).to(x_TD.dtype)
