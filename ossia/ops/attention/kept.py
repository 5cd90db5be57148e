"""Attention's results, kept from a forward without a graph for the one that computes the layer again.

Attention over a long document costs more than all else in a layer, and its results are small beside it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

from torch import Tensor


class Kept:
    """What a layer's calls of a kernel found, in their order. `again`: from now on they are taken, each once."""

    def __init__(self) -> None:
        self.again = False
        self._found: deque[tuple[Tensor, ...]] = deque()

    def or_found(self, compute: Callable[[], tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
        """What `compute` returns, or returned when the layer was computed first."""
        if self.again:
            return self._found.popleft()
        self._found.append(compute())
        return self._found[-1]


def found(kept: Kept | None, compute: Callable[[], tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
    """`compute()`, unless it is kept."""
    return compute() if kept is None else kept.or_found(compute)
