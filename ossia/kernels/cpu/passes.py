"""`passes.c` on tensors, under the names that `ops.fused` and `ops.loss` call; `gpu/passes.py` is the same for a GPU.

Tensors are contiguous, of one dtype (float32 or bfloat16) where nothing else is said, and on the CPU.
Letters as in `passes.c`.
"""

from __future__ import annotations

import ctypes
from ctypes import c_float, c_int32, c_int64, c_void_p
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from ossia.kernels.cpu.build import Library, Unavailable, load_library

DTYPES = (torch.float32, torch.bfloat16)
_SOURCES = ("passes.c", "parts.h", "matrix.h", "tiles.h")
_ALONE = 1 << 14  # elements that a thread is done with before another would have begun


class _Choices(ctypes.Structure):
    """As in passes.c."""

    _fields_ = [
        ("y", c_void_p),
        ("bias", c_void_p),
        ("weights", c_void_p),
        ("row", c_void_p),
        ("expert", c_void_p),
        ("top_k", c_int64),
        ("width", c_int64),
    ]


class Passes:
    """The loaded library."""

    def __init__(self, library: Library) -> None:
        self._library = library.functions

    def _call(self, name: str, over: Tensor, *arguments: Tensor | _Choices | float | int | None) -> None:
        """A function of the library; `over` is the tensor whose dtype counts, and whose size decides on threads."""
        plain = [_plain(argument) for argument in arguments]
        threads = c_int32(1 if over.numel() < _ALONE else torch.get_num_threads())
        self._library[f"ossia_{name}"](c_int32(over.dtype == torch.bfloat16), *plain, threads)

    def together(self, product_NO: Tensor, extra_NO: Tensor | None) -> tuple[Tensor, None]:
        """A product and what its adapter adds, as one tensor: half of the memory until backward."""
        return product_NO if extra_NO is None else product_NO.add_(extra_NO), None

    def swiglu(
        self, h_NJ: Tensor, extra: None, bias_EJ: Tensor, expert_N: Tensor, limit: float, alpha: float
    ) -> Tensor:
        """Clamped SwiGLU of h + bias, J = 2 I: the gate half, then the up half. Returns (N, I)."""
        rows, width = len(h_NJ), h_NJ.shape[1] // 2
        out = h_NJ.new_empty(rows, width)
        self._call("swiglu", h_NJ, h_NJ, bias_EJ.contiguous(), expert_N, out, rows, width, limit, alpha)
        return out

    def swiglu_backward(
        self, grad_NI: Tensor, h_NJ: Tensor, extra: None, bias_EJ: Tensor, expert_N: Tensor, limit: float, alpha: float
    ) -> Tensor:
        """The gradient in h, and row by row in the bias: (N, 2 I)."""
        dh = torch.empty_like(h_NJ)
        where = (*grad_NI.shape, limit, alpha)
        self._call("swiglu_back", h_NJ, grad_NI, h_NJ, bias_EJ.contiguous(), expert_N, dh, *where)
        return dh

    def combine(
        self,
        y_ND: Tensor,
        extra: None,
        bias_ED: Tensor,
        weights_TK: Tensor,
        row_TK: Tensor,
        experts_TK: Tensor,
        residual_TD: Tensor,
    ) -> Tensor:
        """residual + sum over k of weight * (y + bias of the expert). Returns (T, D)."""
        out = torch.empty_like(residual_TD)
        choices = _choices(y_ND, bias_ED, weights_TK, row_TK, experts_TK)
        self._call("combine", y_ND, choices, residual_TD, out, len(out))
        return out

    def combine_backward(
        self,
        grad_TD: Tensor,
        y_ND: Tensor,
        extra: None,
        bias_ED: Tensor,
        weights_TK: Tensor,
        row_TK: Tensor,
        experts_TK: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """The gradients in y, which is row by row the bias's too, (N, D), and in the weights, (T, K)."""
        dy, dweights = torch.empty_like(y_ND), torch.empty_like(weights_TK)
        choices = _choices(y_ND, bias_ED, weights_TK, row_TK, experts_TK)
        self._call("combine_back", y_ND, choices, grad_TD, dy, dweights, len(grad_TD))
        return dy, dweights

    def sum_rows(self, x_ND: Tensor, row_TK: Tensor) -> Tensor:
        """The sum of each token's rows, (T, D): the gradient of having copied a token to its experts."""
        out = x_ND.new_empty(len(row_TK), x_ND.shape[1])
        self._call("sum_rows", x_ND, x_ND, row_TK, out, *row_TK.shape, x_ND.shape[1])
        return out

    def sort(self, experts_TK: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
        """See `ops.moe.sort_by_expert`."""
        order_N, row_N = (torch.empty(experts_TK.numel(), dtype=torch.int64) for _ in range(2))
        ends_E = torch.empty(num_experts, dtype=torch.int32)
        self._call("sort", experts_TK, experts_TK, order_N, row_N, ends_E, len(order_N), num_experts)
        return order_N, row_N, ends_E

    def sum_by_expert(self, x_NO: Tensor, ends_E: Tensor) -> Tensor:
        """The sum of each expert's rows: (E, O)."""
        out = x_NO.new_empty(len(ends_E), x_NO.shape[1])
        self._call("sum_columns", x_NO, x_NO, None, None, ends_E, out, *out.shape)
        return out

    def rms_norm(self, x_TD: Tensor, weight_D: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        """The normed rows, (T, D), and 1 / their root mean square, (T,) float32."""
        out, inverse = torch.empty_like(x_TD), x_TD.new_empty(len(x_TD), dtype=torch.float32)
        self._call("norm", x_TD, x_TD, weight_D, out, inverse, *x_TD.shape, eps)
        return out, inverse

    def rms_norm_backward(self, grad_TD: Tensor, x_TD: Tensor, weight_D: Tensor, inverse_T: Tensor) -> Tensor:
        """The gradient in x: (T, D)."""
        dx = torch.empty_like(x_TD)
        self._call("norm_back", x_TD, grad_TD, x_TD, weight_D, inverse_T, dx, *x_TD.shape)
        return dx

    def rms_norm_weight_gradient(self, grad_TD: Tensor, x_TD: Tensor, inverse_T: Tensor) -> Tensor:
        """The gradient in the weight: (D,)."""
        out = x_TD.new_empty(1, x_TD.shape[1])
        end = torch.tensor([len(x_TD)], dtype=torch.int32)
        self._call("sum_columns", x_TD, grad_TD, x_TD, inverse_T, end, out, *out.shape)
        return out[0]

    def rotate(self, x_THd: Tensor, cos_TF: Tensor, sin_TF: Tensor, *, back: bool) -> Tensor:
        """Each head turned by its position's angle, or turned back, which is the gradient. (T, H, d), any strides."""
        if x_THd.stride(2) != 1:
            x_THd = x_THd.contiguous()
        tokens, heads, size = x_THd.shape
        out = x_THd.new_empty(tokens, heads, size)
        strides, sign = x_THd.stride()[:2], -1.0 if back else 1.0
        address = c_void_p(x_THd.data_ptr())
        self._call("rotate", out, address, cos_TF, sin_TF, out, tokens, heads, size // 2, *strides, sign)
        return out

    def exponentials_(self, logits_NB: Tensor, column_N: Tensor, top_N: Tensor, total_N: Tensor) -> Tensor:
        """See `ops.loss`, whose reference takes the same; rows of any stride."""
        assert logits_NB.stride(1) == 1
        shrink_N = torch.empty_like(total_N)
        sums, where = (column_N, top_N, total_N, shrink_N), (*logits_NB.shape, logits_NB.stride(0))
        self._call("exponentials", logits_NB, c_void_p(logits_NB.data_ptr()), *sums, *where)
        return shrink_N


def _choices(y_ND: Tensor, bias_ED: Tensor, weights_TK: Tensor, row_TK: Tensor, experts_TK: Tensor) -> _Choices:
    tensors = (y_ND, bias_ED, weights_TK, row_TK, experts_TK)
    assert all(tensor.is_contiguous() for tensor in tensors), [tensor.stride() for tensor in tensors]
    return _Choices(*(tensor.data_ptr() for tensor in tensors), weights_TK.shape[1], y_ND.shape[1])


def _plain(argument: Tensor | _Choices | c_void_p | float | int | None) -> object:
    """An argument as C takes it."""
    match argument:
        case Tensor():
            assert argument.is_contiguous(), argument.stride()
            return c_void_p(argument.data_ptr())
        case _Choices():
            return ctypes.byref(argument)
        case float():
            return c_float(argument)
        case int():
            return c_int64(argument)
    return argument


@cache
def load_passes() -> Passes | Unavailable:
    """The library, compiled first if this machine's isn't there yet (a second or two)."""
    found = load_library([Path(__file__).with_name(name) for name in _SOURCES])
    return found if isinstance(found, Unavailable) else Passes(found)
