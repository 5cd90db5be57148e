"""`quantize.c` on tensors. Reference: `ops.mxfp4.quantize_mxfp4`, which says what the arguments are."""

from __future__ import annotations

import ctypes
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from ossia.kernels.cpu.build import Library, Unavailable, load_library

_ALONE = 1 << 10  # blocks that a thread is done with before another would have begun


class Quantize:
    """The loaded library."""

    def __init__(self, library: Library) -> None:
        self._function = library.functions.ossia_quantize_mxfp4
        self._function.restype = ctypes.c_int64

    def __call__(self, weights_N32: Tensor, blocks_N16: Tensor, scales_N: Tensor, *, halve: bool) -> bool:
        """Fill blocks and scales, uint8, from float32 weights, all contiguous on the CPU.

        halve    take half the scale where that has the smaller squared error
        Returns  whether all weights are finite; blocks that hold one that isn't are left as they were
        """
        tensors = (weights_N32, blocks_N16, scales_N)
        assert all(tensor.is_contiguous() and tensor.device.type == "cpu" for tensor in tensors)
        assert weights_N32.dtype == torch.float32
        threads = 1 if len(scales_N) < _ALONE else torch.get_num_threads()
        addresses = (ctypes.c_void_p(tensor.data_ptr()) for tensor in tensors)
        sizes = ctypes.c_int64(len(scales_N)), ctypes.c_int32(halve), ctypes.c_int32(threads)
        return self._function(*addresses, *sizes) == 0


@cache
def load_quantize() -> Quantize | Unavailable:
    """The library, compiled first if this machine's isn't there yet (a second)."""
    found = load_library([Path(__file__).with_name("quantize.c")])
    return found if isinstance(found, Unavailable) else Quantize(found)
