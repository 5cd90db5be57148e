"""`mxfp4.c` on tensors. Reference: `ops.mxfp4`, which says what the arguments are."""

from __future__ import annotations

import ctypes
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from ossia.kernels.cpu.build import Library, Unavailable, load_library

_ALONE = 1 << 10  # blocks that a thread is done with before another would have begun


class Mxfp4:
    """The loaded library."""

    def __init__(self, library: Library) -> None:
        self._functions = library.functions
        self._functions.ossia_quantize_mxfp4.restype = ctypes.c_int64
        self._functions.ossia_dequantize_mxfp4.restype = None

    def dequantize(self, blocks: Tensor, scales: Tensor, out: Tensor, *, split: bool) -> None:
        """Fill `out` (..., 32 B), bfloat16 or float32, from blocks (..., B, 16) and scales (..., B), uint8, all
        contiguous on the CPU. split  see `ops.mxfp4.dequantize_mxfp4`"""
        bf16 = out.dtype == torch.bfloat16
        assert bf16 or out.dtype == torch.float32, out.dtype
        width, half = scales.shape[-1], scales.shape[-2] // 2 if split else 0
        sizes = ctypes.c_int64(scales.numel() // width if width else 0), ctypes.c_int64(width), ctypes.c_int32(half)
        arguments = ctypes.c_int32(bf16), *_on_cpu(blocks, scales, out), *sizes, _threads(scales)
        self._functions.ossia_dequantize_mxfp4(*arguments)

    def quantize(self, weights_N32: Tensor, blocks_N16: Tensor, scales_N: Tensor, *, halve: bool) -> bool:
        """Fill blocks and scales, uint8, from float32 weights, all contiguous on the CPU.

        halve    take half the scale where that has the smaller squared error
        Returns  whether all weights are finite; blocks that hold one that isn't are left as they were
        """
        assert weights_N32.dtype == torch.float32
        arguments = _on_cpu(weights_N32, blocks_N16, scales_N)
        sizes = ctypes.c_int64(len(scales_N)), ctypes.c_int32(halve), _threads(scales_N)
        return self._functions.ossia_quantize_mxfp4(*arguments, *sizes) == 0


def _on_cpu(*tensors: Tensor) -> tuple[ctypes.c_void_p, ...]:
    """Their addresses."""
    assert all(tensor.is_contiguous() and tensor.device.type == "cpu" for tensor in tensors)
    return tuple(ctypes.c_void_p(tensor.data_ptr()) for tensor in tensors)


def _threads(scales: Tensor) -> ctypes.c_int32:
    return ctypes.c_int32(1 if scales.numel() < _ALONE else torch.get_num_threads())


@cache
def load_mxfp4() -> Mxfp4 | Unavailable:
    """The library, compiled first if this machine's isn't there yet (a second)."""
    found = load_library([Path(__file__).with_name(name) for name in ("mxfp4.c", "matrix.h")])
    return found if isinstance(found, Unavailable) else Mxfp4(found)
