"""Where the documents of a pack are, and how those that share their beginnings attend without computing it again.

Letters: T packed tokens, U tokens of all documents together, B blocks, L queries of a block, S keys.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

CPU = torch.device("cpu")


@dataclass(slots=True)
class Segments:
    """Where the documents of a pack begin and end; attention never crosses from one into another.

    starts  (num_docs + 1,) int64 on CPU: 0, ..., U, strictly rising
    unfold  (U,) int64 on CPU: the row of each document's tokens among the pack's T, where documents that begin alike
            share the rows of their beginning; None: each has its own, U = T
    """

    starts: Tensor
    device: torch.device = CPU
    unfold: Tensor | None = None
    lengths: list[int] = field(init=False)
    positions_T: Tensor = field(init=False)
    doc_T: Tensor = field(init=False)
    shared: Shared | None = field(init=False, default=None)
    _blocks: dict[int, Tensor] = field(init=False, default_factory=dict)
    _bounds: dict[int | None, tuple[Tensor, Tensor]] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        lengths = self.starts.diff()
        assert int(self.starts[0]) == 0, self.starts
        assert bool((lengths > 0).all()), self.starts
        self.lengths = lengths.tolist()
        doc_T = torch.repeat_interleave(torch.arange(len(self.lengths)), lengths)
        positions_T = torch.arange(self.num_tokens) - self.starts[doc_T]
        if self.unfold is not None:
            self.shared = Shared.of(self.unfold, Segments(self.starts, self.device))
            first_T = self.shared.first_T.cpu()
            doc_T, positions_T = doc_T[first_T], positions_T[first_T]
        self.positions_T, self.doc_T = positions_T.to(self.device), doc_T.to(self.device)

    @property
    def num_tokens(self) -> int:
        """U, all documents together."""
        return int(self.starts[-1])

    @property
    def longest(self) -> int:
        return max(self.lengths, default=0)

    def bounds(self, window: int | None) -> tuple[Tensor, Tensor]:
        """The first key that each token sees, and the last token that sees it: (U,) int32 each, never falling.

        Not for documents that share rows: ask those that lie apart.
        """
        assert self.unfold is None
        if window not in self._bounds:
            at_U, doc_U = torch.arange(self.num_tokens, device=self.device), self.doc_T
            starts = self.starts.to(self.device)
            first_U, last_U = starts[doc_U], starts[doc_U + 1] - 1
            if window is not None:
                first_U, last_U = first_U.maximum(at_U - window + 1), last_U.minimum(at_U + window - 1)
            self._bounds[window] = first_U.to(torch.int32), last_U.to(torch.int32)
        return self._bounds[window]

    def block_mask(self, window: int) -> Tensor:
        """Which of the 2 * window keys (previous block and own) each query of a block sees: (B, 1, L, 2L) bool.

        Queries past the end of the pack see themselves, so that no row is empty.
        """
        if window not in self._blocks:
            num_blocks = -(-self.num_tokens // window)
            doc = torch.full(((num_blocks + 1) * window,), -1, device=self.device)
            doc[window : window + self.num_tokens] = self.doc_T
            doc_q_BL = doc[window:].view(num_blocks, window)
            doc_k_BL = torch.cat((doc[:-window].view(num_blocks, window), doc_q_BL), dim=1)
            offset_q = torch.arange(window, 2 * window, device=self.device)[:, None]
            offset_k = torch.arange(2 * window, device=self.device)[None]
            near = (offset_k <= offset_q) & (offset_k > offset_q - window)
            mask_BLL = near & (doc_q_BL[:, :, None] == doc_k_BL[:, None, :])
            # a padding query has document -1, like the block before the first: it must not reach back into it
            mask_BLL &= (doc_q_BL[:, :, None] >= 0) | (offset_k == offset_q)
            self._blocks[window] = mask_BLL[:, None]
        return self._blocks[window]


@dataclass(slots=True)
class Shared:
    """Rows that documents share, for attention.

    apart     the same documents, each with rows of its own
    unfold_U  (U,) int64: the row of each of their tokens; first_T (T,) int64: where each row comes up first among these
    """

    apart: Segments
    unfold_U: Tensor
    first_T: Tensor
    _families: dict[int | None, Families | None] = field(init=False, default_factory=dict)

    @classmethod
    def of(cls, unfold: Tensor, apart: Segments) -> Shared:
        """unfold  as that of Segments"""
        assert len(unfold) == apart.num_tokens, (unfold.shape, apart.starts)
        first_T = torch.full((int(unfold.max()) + 1,), apart.num_tokens)
        first_T.scatter_reduce_(0, unfold, torch.arange(apart.num_tokens), "amin")
        return cls(apart, unfold.to(apart.device), first_T.to(apart.device))

    def families(self, window: int | None) -> Families | None:
        """How documents that share rows attend without these being computed again; None where that would cost more."""
        if window not in self._families:
            found = Families.of(self.unfold_U, self.apart.starts.tolist(), window)
            apart = sum(n * min(n, 2 * (window or n)) for n in self.apart.lengths)
            self._families[window] = found if found.num_pairs <= min(apart, _MOST_PAIRS) else None
        return self._families[window]


_MOST_PAIRS = 1 << 24  # of a query and a key: the bias has a number for each


@dataclass(frozen=True, slots=True)
class Padded:
    """Rows of queries and of keys, in a batch of equal sizes; what is padding is seen by none and read by none.

    rows_q  (B, L) int64; rows_k (B, S) int64: rows of the pack, row 0 where there is none
    real_q  (B, L) bool: whether a query is no padding
    seen    (B, L, S) bool; a query that is padding sees one key
    """

    rows_q: Tensor
    rows_k: Tensor
    real_q: Tensor
    seen: Tensor

    @classmethod
    def of(cls, parts: list[tuple[range, range]], window: int | None) -> Padded:
        """parts  rows that documents share, and rows of one document after them, which are its queries"""
        num_before, num_own = (max(len(rows) for rows in column) for column in zip(*parts, strict=True))
        before_B, own_B = (torch.tensor([len(rows) for rows in column])[:, None] for column in zip(*parts, strict=True))
        first_before_B, first_own_B = (
            torch.tensor([rows.start for rows in c])[:, None] for c in zip(*parts, strict=True)
        )
        at_before, at_own = torch.arange(num_before)[None], torch.arange(num_own)[None]
        is_before, is_own = at_before < before_B, at_own < own_B
        rows_q = torch.where(is_own, first_own_B + at_own, 0)
        rows_k = torch.cat((torch.where(is_before, first_before_B + at_before, 0), rows_q), 1)
        position_q = before_B + at_own
        position_k = torch.cat((at_before.expand(len(parts), -1), position_q), 1)
        apart = position_q[:, :, None] - position_k[:, None, :]
        seen = (apart >= 0) & torch.cat((is_before, is_own), 1)[:, None, :]
        if window is not None:
            seen &= apart < window
        seen[:, :, 0] |= ~is_own
        return cls(rows_q, rows_k, is_own, seen)


def _of_like_lengths(parts: list[tuple[range, range]]) -> Iterator[list[tuple[range, range]]]:
    """Parts whose queries are of three quarters of the longest one's length and more, eight at least: padding costs."""
    left = sorted(parts, key=lambda part: len(part[1]), reverse=True)
    while left:
        like = sum(4 * len(queries) >= 3 * len(left[0][1]) for _, queries in left)
        yield left[: max(like, 8)]
        left = left[max(like, 8) :]


@dataclass(frozen=True, slots=True)
class Families:
    """Documents that share their beginnings: each beginning attends once, then each document's own rows to both.

    place_T  (T,) int64: where each row of the pack is among the queries of all parts
    """

    parts: list[Padded]
    place_T: Tensor

    @classmethod
    def of(cls, unfold: Tensor, starts: list[int], window: int | None) -> Families:
        """unfold and starts as those of Segments"""
        documents = [unfold[start:end].tolist() for start, end in itertools.pairwise(starts)]
        beginnings, owns = list[tuple[range, range]](), list[tuple[range, range]]()
        for _, family in itertools.groupby(documents, key=lambda rows: rows[0]):
            members = list(family)
            common = next((i for i, row in enumerate(members[-1]) if row != members[0][0] + i), 0)
            shared = range(members[0][0], members[0][0] + common)
            if common:
                beginnings.append((range(0), shared))
            owns += [(shared, range(rows[common], rows[-1] + 1)) for rows in members]
        parts = [Padded.of(found, window) for found in (*_of_like_lengths(beginnings), *_of_like_lengths(owns))]
        rows, real = (
            torch.cat([x.flatten() for x in xs]) for xs in zip(*((p.rows_q, p.real_q) for p in parts), strict=True)
        )
        place_T = torch.empty(int(unfold.max()) + 1, dtype=torch.int64)
        place_T[rows[real]] = real.nonzero()[:, 0]
        return cls(parts, place_T)

    @property
    def num_pairs(self) -> int:
        """Of a query and a key, padding included."""
        return sum(part.seen.numel() for part in self.parts)
