"""Attention over a pack whose tokens are divided over processes: each attends with some of the heads over all tokens.

Before attention every process gives each other one that one's heads of its own tokens, and after it gets the results of
its tokens back, so that the kernel in between is the one that a single process uses: documents, windows, sinks and
gradients are as exact as there, and the work is equal however long the documents are. Everything else of a layer looks
at one token at a time and needs nobody.
Source: arXiv:2309.14509 (Ulysses). Letters: N processes, t own tokens, T all tokens of the pack, H heads, K key-value
heads, d head size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

Attend = Callable[[Tensor, Tensor, Tensor, Tensor, int | None], Tensor]
"""(q_THd, k_TKd, v_TKd, sinks_H, window) -> (T, H, d)"""


class Members(Protocol):
    """The processes that share packs, one of which this is; all call everything in the same order."""

    rank: int
    size: int

    def exchange(self, rows: Tensor, given: Sequence[int], taken: Sequence[int]) -> Tensor:
        """The first `given[0]` rows go to member 0, the next ones to member 1; `taken[n]` come from each member n.

        Returns  (sum of taken, ...), by member
        """


def tokens_of(num_tokens: int, rank: int, size: int) -> slice:
    """The tokens of a pack that are a member's: equal parts but for one token, empty where there are too few."""
    return slice(rank * num_tokens // size, (rank + 1) * num_tokens // size)


def divided(attend: Attend, members: Members, num_tokens: int) -> Attend:
    """Attention for one member: takes and gives its own tokens' rows, and `attend` sees all `num_tokens` of the pack.

    `attend` is called with H / N and K / N heads; N has to divide both.
    """
    size = members.size
    parts = [tokens_of(num_tokens, rank, size) for rank in range(size)]
    lengths = [part.stop - part.start for part in parts]

    def attended(q_tHd: Tensor, k_tKd: Tensor, v_tKd: Tensor, sinks_H: Tensor, window: int | None) -> Tensor:
        own, num_heads, width = q_tHd.shape
        each = [x.shape[1] // size for x in (q_tHd, k_tKd, v_tKd)]
        of_members = [x.unflatten(1, (size, -1)).transpose(0, 1) for x in (q_tHd, k_tKd, v_tKd)]
        given = torch.cat(of_members, dim=2).flatten(0, 1)
        taken = exchanged(given, members, [own] * size, lengths)
        q, k, v = (x.contiguous() for x in taken.split(each, dim=1))
        y = attend(q, k, v, sinks_H.view(size, -1)[members.rank], window)
        back = exchanged(y, members, lengths, [own] * size)
        return back.view(size, own, num_heads // size, width).transpose(0, 1).reshape(own, num_heads, width)

    return attended


def exchanged(rows: Tensor, members: Members, given: Sequence[int], taken: Sequence[int]) -> Tensor:
    """`Members.exchange`, differentiable in the rows."""
    return _Exchange.apply(rows.contiguous(), members, given, taken)


class _Exchange(torch.autograd.Function):
    """`Members.exchange`; its gradient goes the way back."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, members: Members, given: Sequence[int], taken: Sequence[int]) -> Tensor:
        ctx.members, ctx.given, ctx.taken = members, given, taken
        return members.exchange(rows, given, taken)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        return ctx.members.exchange(grads[0].contiguous(), ctx.taken, ctx.given), None, None, None
