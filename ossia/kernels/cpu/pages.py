"""Tensors in large pages: no addresses to look up every 4 KiB, and a thousandth of the faults when they are first used.

The system grants pages of 2 MiB where `/sys/kernel/mm/transparent_hugepage/enabled` says `madvise` or `always`; else
these are ordinary ones.
"""

from __future__ import annotations

import math
import mmap
from collections.abc import Sequence

import torch
from torch import Tensor

_LARGE, _LINE = 1 << 21, 64


class Pages:
    """Memory that tensors are taken from, one after the other; it is there as long as one of them is."""

    def __init__(self, num_bytes: int) -> None:
        memory = mmap.mmap(-1, num_bytes + _LARGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        if "MADV_HUGEPAGE" in vars(mmap):  # Linux
            memory.madvise(mmap.MADV_HUGEPAGE)
        self._bytes = torch.frombuffer(memory, dtype=torch.uint8)
        self._at = -self._bytes.data_ptr() % _LARGE

    def zeros(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """The next tensor, on a cache line of its own."""
        num_bytes = math.prod(shape) * dtype.itemsize
        mine = self._bytes[self._at : self._at + num_bytes]
        assert len(mine) == num_bytes, "more than was asked for"
        self._at += -(-num_bytes // _LINE) * _LINE
        return mine.view(dtype).view(shape)

    def copy(self, tensor: Tensor) -> Tensor:
        """The same values, contiguous."""
        return self.zeros(tensor.shape, tensor.dtype).copy_(tensor)


class Room:
    """Memory for one tensor at a time, in large pages: what was in it is overwritten by the next one.

    On a CPU the first touch of new memory takes several times as long as expanding weights into it.
    """

    def __init__(self) -> None:
        self._bytes = torch.empty(0, dtype=torch.uint8)

    def take(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """A tensor of any content."""
        num_bytes = math.prod(shape) * dtype.itemsize
        if len(self._bytes) < num_bytes:
            self._bytes = torch.empty(0, dtype=torch.uint8)  # the smaller one first goes
            self._bytes = large_zeros((num_bytes,), torch.uint8)
        return self._bytes[:num_bytes].view(dtype).view(*shape)


def large_zeros(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Zeros in pages of their own; smaller ones than a large page as torch makes them."""
    num_bytes = math.prod(shape) * dtype.itemsize
    return torch.zeros(shape, dtype=dtype) if num_bytes < _LARGE else Pages(num_bytes).zeros(shape, dtype)
