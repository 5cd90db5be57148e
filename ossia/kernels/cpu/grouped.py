"""A grouped product of bfloat16 matrices on a CPU, in few sizes.

oneDNN, which multiplies bfloat16 for torch, generates code for every number of rows that it meets, and experts have
ever new ones: that took several times as long as multiplying. Here an expert's rows go on into the next one's, up to
one of eight sizes in every doubling; the next one then writes its own over what that left there.
Letters: N rows sorted by expert, E experts, D in, O out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

Product = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(x_ND, weight_EDO, ends_E) -> (N, O)."""


def plain_grouped_mm(x_ND: Tensor, weight_EDO: Tensor, ends_E: Tensor) -> Tensor:
    """torch's own, which asks for no number on the host. Returns (N, O)."""
    return F.grouped_mm(x_ND, weight_EDO, offs=ends_E)


def grouped_mm(x_ND: Tensor, weight_EDO: Tensor, ends_E: Tensor) -> Tensor:
    """For many rows: the plain one, but for bfloat16 on a CPU. Returns (N, O)."""
    if goes_in_few_sizes(x_ND):
        return _GroupedMm.apply(x_ND, weight_EDO, ends_E)
    return plain_grouped_mm(x_ND, weight_EDO, ends_E)


def _unit(count: int) -> int:
    """Multiples of it are the sizes around `count`."""
    return 1 << max(0, count.bit_length() - 4)


def _pieces(ends: list[int]) -> Iterator[tuple[int, int, int]]:
    """Expert, first row and end of each product, to be made in this order."""
    start, num_rows = 0, ends[-1]
    for expert, end in enumerate(ends):
        while start < end:
            count = end - start
            unit = _unit(count)
            stop = start + -(-count // unit) * unit
            if stop > num_rows:  # no rows are left to go on into
                stop = end - count % unit
            yield expert, start, stop
            start = min(stop, end)


def goes_in_few_sizes(x_ND: Tensor) -> bool:
    """Whether `grouped_mm` multiplies these rows itself."""
    return x_ND.device.type == "cpu" and x_ND.dtype == torch.bfloat16


def multiply_each(x_ND: Tensor, matrix: Callable[[int], Tensor], width: int, ends: list[int]) -> Tensor:
    """Each expert's rows times its matrix, in few sizes. Returns (N, width).

    matrix  expert -> (D, width); asked in the experts' order, only of those that have rows
    ends    of the experts' rows
    """
    out_NO = x_ND.new_empty(len(x_ND), width)
    for expert, start, end in _pieces(ends):
        torch.mm(x_ND[start:end], matrix(expert), out=out_NO[start:end])
    return out_NO


def _multiply(x_ND: Tensor, weight_EDO: Tensor, ends: list[int]) -> Tensor:
    return multiply_each(x_ND, weight_EDO.__getitem__, weight_EDO.shape[2], ends)


class _GroupedMm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_ND, weight_EDO, ends_E):
        ends = ends_E.tolist()
        assert ends[-1] == len(x_ND), (ends, x_ND.shape)
        ctx.ends = ends
        ctx.save_for_backward(x_ND if ctx.needs_input_grad[1] else None, weight_EDO)
        return _multiply(x_ND, weight_EDO, ends)

    @staticmethod
    def backward(ctx, grad_NO):
        x_ND, weight_EDO = ctx.saved_tensors
        dx = _multiply(grad_NO, weight_EDO.transpose(1, 2), ctx.ends) if ctx.needs_input_grad[0] else None
        if not ctx.needs_input_grad[1]:
            return dx, None, None
        dweight = torch.empty_like(weight_EDO)
        for one, start, end in zip(dweight, [0, *ctx.ends], ctx.ends, strict=False):
            lacking = -(end - start) % _unit(end - start)  # rows of zeros, which add nothing
            x_nD, grad_nO = (F.pad(rows[start:end], (0, 0, 0, lacking)) for rows in (x_ND, grad_NO))
            torch.mm(x_nD.t(), grad_nO, out=one)
        return dx, dweight, None
