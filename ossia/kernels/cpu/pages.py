"""Tensors in large pages, aligned: what a decode step reads from beginning to end, it reads about twice as fast.

A weight in a memory-mapped checkpoint lies across cache lines as its file has it, in pages of 4 KiB, whose addresses
are looked up for every few rows. Anonymous memory can have pages of 2 MiB where the system grants them
(`/sys/kernel/mm/transparent_hugepage/enabled` says `madvise` or `always`); without, a copy is aligned at least.
"""

from __future__ import annotations

import mmap

import torch
from torch import Tensor


_LARGE, _LINE = 1 << 21, 64


class Pages:
    """Memory that tensors are copied into, one after the other; it is there as long as one of them is."""

    def __init__(self, num_bytes: int) -> None:
        memory = mmap.mmap(-1, num_bytes + _LARGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        if "MADV_HUGEPAGE" in vars(mmap):  # Linux
            memory.madvise(mmap.MADV_HUGEPAGE)
        self._bytes = torch.frombuffer(memory, dtype=torch.uint8)
        self._at = -self._bytes.data_ptr() % _LARGE

    def copy(self, tensor: Tensor) -> Tensor:
        """The same values, contiguous and on a cache line of their own."""
        num_bytes = tensor.numel() * tensor.itemsize
        mine = self._bytes[self._at : self._at + num_bytes]
        assert len(mine) == num_bytes, "more than was asked for"
        self._at += -(-num_bytes // _LINE) * _LINE
        return mine.view(tensor.dtype).view(tensor.shape).copy_(tensor.detach())


def large_copy(tensor: Tensor) -> Tensor:
    """The same values in pages of their own."""
    return Pages(tensor.numel() * tensor.itemsize + _LINE).copy(tensor)
