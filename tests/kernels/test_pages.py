"""Tensors in large pages are tensors like others."""

from __future__ import annotations

import gc

import pytest
import torch

from ossia.kernels.cpu.pages import Pages, large_zeros


def test_copies_lie_side_by_side_and_outlive_their_pages() -> None:
    pages = Pages(1 << 20)
    first = torch.randn(7, 5).t()
    copies = [pages.copy(first), pages.copy(torch.arange(3)), pages.zeros((2, 0), torch.float32)]
    assert all(copy.data_ptr() % 64 == 0 for copy in copies[:2])
    assert copies[0].is_contiguous()
    del pages
    gc.collect()
    copies[1] += 1
    assert torch.equal(copies[0], first)
    assert copies[1].tolist() == [1, 2, 3]


def test_more_than_was_asked_for_is_refused() -> None:
    with pytest.raises(AssertionError, match="more than was asked for"):
        Pages(1 << 20).zeros((1 << 23,), torch.uint8)


@pytest.mark.parametrize("count", [5, 1 << 20])
def test_large_zeros_are_zeros(count: int) -> None:
    found = large_zeros((count, 3), torch.bfloat16)
    assert found.shape == (count, 3)
    assert not found.any()
    assert not found.add_(1).ne(1).any()
