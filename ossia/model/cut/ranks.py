"""What cut weights need of the other ranks, and which part of a tensor is whose."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from torch import Tensor


class Numbered(Protocol):
    """One of several processes: its number, and how many there are."""

    rank: int
    size: int


class Ranks(Protocol):
    """The processes that hold the parts; all of them call everything here in the same order. `train.ranks.World` is
    one."""

    rank: int
    size: int

    def begin_gather(self, whole: Tensor, part: Tensor) -> Callable[[], None]:
        """Begin to put every rank's `part`, in the order of ranks, into `whole`; what is returned waits for the end.

        What was launched on the device before this is done before `whole` is written to, and what is launched after
        the wait finds it written; the host itself needn't wait.
        """

    def begin_sum(self, part: Tensor, whole: Tensor) -> Callable[[], None]:
        """Begin to put this rank's part of the sum over ranks of every rank's `whole` into `part`: a reduce-scatter. As
        `begin_gather`; until the wait is over both belong to it."""


def experts_of(num_experts: int, ranks: Numbered) -> slice:
    """The experts that are a rank's where they stay put, all equally many: `part_of` of any tensor of theirs."""
    assert num_experts % ranks.size == 0, (num_experts, ranks.size)
    each = num_experts // ranks.size
    return slice(ranks.rank * each, (ranks.rank + 1) * each)


def part_size(numel: int, size: int) -> int:
    """Numbers of the largest part."""
    return -(-numel // size)


def part_of(numel: int, rank: int, size: int) -> slice:
    """The numbers of a flat tensor that are a rank's: its piece by `torch.chunk`, empty where the pieces run out.

    That is how DTensor's `Shard(0)` lays a flat tensor out, so any size divides over any number of ranks.
    """
    each = part_size(numel, size)
    return slice(min(rank * each, numel), min((rank + 1) * each, numel))
