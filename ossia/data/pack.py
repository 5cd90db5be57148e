"""Samples -> packs of a fixed token budget, in a seeded order that resumes at the same sample.

Documents in a pack stay apart: `starts` bounds attention, positions restart, and no prediction crosses a boundary.
The stream looks at a window of samples in shuffled order. A pack begins with the oldest of them, so that none waits for
ever, and is filled with the longest that still fits. Of several processes each makes the same choice, so they divide
what one would have had; what is saved is the window's row numbers, never tokens.
Own code because a sampler that packs offline has to render everything first, and can't resume in the middle.
Letters: T tokens of a pack, N tokens of a sample, D documents.
"""

from __future__ import annotations

from bisect import bisect_right, insort
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from ossia.data.dataset import Dataset, EpochOrder, Lengths, Statistics
from ossia.data.sample import Sample
from ossia.errors import DataError, RecipeError, RunError

_WINDOW_SAMPLES = 512  # with fewer the fill suffers, with more a resumed run re-reads more; see tests/data/test_pack.py
_WINDOW_PACKS = 64  # ... and no more tokens than these hold: long samples would cost memory and fit anyway


@dataclass(frozen=True, slots=True, eq=False)
class Pack:
    """Whole documents in a row, aligned to predictions: position t, having seen up to ids[t], predicts targets[t].

    ids      (T,) int64
    targets  (T,) int64, the token after position t in its document; the last position of a document repeats its own id
    weights  (T,) float32, of that prediction; 0 at the last position of each document
    starts   (D + 1,) int64: document d is [starts[d], starts[d + 1])
    sources  D times "file:line"
    unfold   (U,) int64: where documents share the rows of their beginnings, the row of each document's tokens; `starts`
             then bounds documents among these U. None: no row is shared, U = T
    routes   (T, L, k) int16: experts that were chosen when the tokens were sampled, to be used again; -1 where none was
             recorded. None: nothing is replayed
    """

    ids: Tensor
    targets: Tensor
    weights: Tensor
    starts: Tensor
    sources: tuple[str, ...]
    routes: Tensor | None = None
    unfold: Tensor | None = None

    @classmethod
    def from_samples(cls, samples: Sequence[Sample]) -> Self:
        """One pack of these samples, in this order; nothing is padded, so T is their total length."""
        starts = np.zeros(len(samples) + 1, np.int64)
        np.cumsum([len(sample) for sample in samples], out=starts[1:])
        ids = np.empty(starts[-1], np.int64)
        targets, weights = np.empty_like(ids), np.empty(starts[-1], np.float32)
        for sample, start, end in zip(samples, starts[:-1], starts[1:], strict=True):
            ids[start:end], targets[start:end], weights[start:end] = _aligned(sample, 0)
        return cls(*map(torch.from_numpy, (ids, targets, weights, starts)), tuple(sample.source for sample in samples))

    @classmethod
    def sharing(cls, begun: Sequence[tuple[int, Sequence[Sample]]]) -> Self:
        """One pack of samples that begin alike: what a group has in common is there, and computed, once.

        begun  of each group how many ids its samples have in common, which must count as nothing, and the samples. The
               last common id is each sample's own all the same: every sample predicts another one from it
        """
        parts, sources, unfold, ends = list[tuple[np.ndarray, ...]](), list[str](), list[np.ndarray](), [0]
        at = 0
        for num_common, samples in begun:
            head = num_common - 1
            first, common = samples[0], np.arange(at, at + head)
            assert not first.weights[:num_common].any(), first.source
            parts.append((first.ids[:head], first.ids[1:num_common], np.zeros(head, np.float32)))
            at += head
            for sample in samples:
                own = len(sample) - head
                assert np.array_equal(sample.ids[:num_common], first.ids[:num_common]), sample.source
                parts.append(_aligned(sample, head))
                unfold += [common, np.arange(at, at + own)]
                sources.append(sample.source)
                ends.append(ends[-1] + len(sample))
                at += own
        ids, targets, weights = (np.concatenate(column) for column in zip(*parts, strict=True))
        tensors = (ids.astype(np.int64), targets.astype(np.int64), weights, np.array(ends, np.int64))
        rows = torch.from_numpy(np.concatenate(unfold))
        return cls(*map(torch.from_numpy, tensors), tuple(sources), unfold=rows)

    @property
    def num_tokens(self) -> int:
        """T, all documents together; rows that documents share count once."""
        return len(self.ids)

    @property
    def num_trained(self) -> int:
        """Positions whose prediction counts."""
        return int(torch.count_nonzero(self.weights))

    @property
    def positions(self) -> Tensor:
        """(U,) int64: 0, 1, ... from the start of each document."""
        lengths = self.starts.diff()
        return torch.arange(int(self.starts[-1]), device=self.ids.device) - self.starts[:-1].repeat_interleave(lengths)

    def to(self, device: torch.device | str) -> Self:
        """The same pack on another device."""
        tensors = (tensor.to(device) for tensor in (self.ids, self.targets, self.weights, self.starts))
        optional = (None if tensor is None else tensor.to(device) for tensor in (self.routes, self.unfold))
        return type(self)(*tensors, self.sources, *optional)


def _aligned(sample: Sample, first: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """ids, targets and weights of a sample's rows from `first` on, aligned to predictions."""
    aligned = sample.ids if sample.targets is None else sample.targets
    targets, weights = (np.append(x[first + 1 :], last) for x, last in ((aligned, sample.ids[-1]), (sample.weights, 0)))
    return sample.ids[first:], targets, weights.astype(np.float32)


def pack_samples(samples: Iterable[Sample], tokens_per_pack: int) -> list[Pack]:
    """Every sample once, in order, a new pack where the next one doesn't fit: for evaluation.

    Raises  RecipeError for a sample longer than `tokens_per_pack`
    """
    groups: list[list[Sample]] = []
    room = 0
    for sample in samples:
        _check_length(sample, tokens_per_pack)
        if len(sample) > room:
            groups.append([])
            room = tokens_per_pack
        groups[-1].append(sample)
        room -= len(sample)
    return [Pack.from_samples(group) for group in groups]


def _check_length(sample: Sample, tokens_per_pack: int) -> None:
    if len(sample) > tokens_per_pack:
        raise RecipeError(
            f"{sample.source}: a sample of {len(sample):,} tokens doesn't fit into a pack of {tokens_per_pack:,}\n"
            "  next: raise train.tokens_per_pack, or lower max_length"
        )


class Window:
    """Samples waiting to be packed: the oldest first, then the longest that fits."""

    def __init__(self) -> None:
        self._waiting: dict[int, tuple[int, Any]] = {}  # ticket -> (length, item), oldest first
        self._by_length: list[tuple[int, int]] = []  # (length, -ticket): of equals the older is the later
        self._tickets = 0
        self.num_tokens = 0

    def __len__(self) -> int:
        return len(self._waiting)

    def add(self, length: int, item: Any) -> None:
        """Let an item of `length` tokens wait."""
        self._waiting[self._tickets] = (length, item)
        insort(self._by_length, (length, -self._tickets))
        self._tickets += 1
        self.num_tokens += length

    def items(self) -> list[Any]:
        """What waits, oldest first."""
        return [item for _, item in self._waiting.values()]

    def take_pack(self, budget: int) -> list[Any]:
        """Items of at most `budget` tokens together; at least one, if any waits."""
        taken, room = [], budget
        ticket = next(iter(self._waiting), None)
        while ticket is not None:
            length, item = self._waiting.pop(ticket)
            del self._by_length[bisect_right(self._by_length, (length, -ticket)) - 1]
            taken.append(item)
            room -= length
            fitting = bisect_right(self._by_length, (room, 0))
            ticket = -self._by_length[fitting - 1][1] if fitting else None
        self.num_tokens -= budget - room
        return taken


class PackedStream:
    """Steps of packs from weighted datasets, in a shuffled order that only `seed` decides.

    tokens_per_step  at most so many tokens in a step: tokens_per_step // tokens_per_pack packs
    epochs           when to stop; None goes on for ever. A pack never mixes two epochs, a step may.

    Raises RecipeError where the sizes don't fit each other; reading may raise DataError.
    """

    def __init__(
        self,
        datasets: Sequence[Dataset],
        *,
        tokens_per_step: int,
        tokens_per_pack: int,
        seed: int,
        epochs: float | None = None,
    ) -> None:
        if tokens_per_step < tokens_per_pack:
            raise RecipeError(
                f"train.tokens_per_step: {tokens_per_step:,} is less than one pack of {tokens_per_pack:,} tokens\n"
                "  next: raise it, or lower train.tokens_per_pack"
            )
        self.packs_per_step = tokens_per_step // tokens_per_pack
        self.datasets, self.tokens_per_pack, self.seed = tuple(datasets), tokens_per_pack, seed
        self.epochs = epochs
        self.statistics = Statistics()
        self._epoch, self._cursor, self._steps = 0, 0, 0
        self._order = EpochOrder(self.datasets, seed, 0)
        self._window = Window()

    @property
    def finished(self) -> bool:
        """Whether no step is left."""
        self._refill()
        return not self._window

    @property
    def epoch(self) -> float:
        """Epochs done so far; a row of which a sample still waits in the window isn't done."""
        waiting = {position for (position, _), _ in self._window.items()}
        return self._epoch + (self._cursor - len(waiting)) / len(self._order)

    def next_step(self) -> list[Pack]:
        """The packs of the next step.

        The last step of a finite stream may hold fewer packs than the others; once `finished`, []
        """
        groups = []
        while len(groups) < self.packs_per_step and (group := self._next_group()):
            groups.append(group)
        self._steps += bool(groups)
        return [Pack.from_samples([sample for _, sample in group]) for group in groups]

    def count_steps(self, lengths: Lengths) -> int:
        """How many steps the whole stream has, by the lengths of its datasets' samples; nothing is read for it.

        Raises RecipeError if `epochs` is so little that there are none
        """
        if self.epochs is None:
            raise RunError("a stream without an end has no number of steps; set train.steps or train.epochs")
        packer = _LengthPacker(self, lengths)
        num_packs = 0
        while packer._next_group():
            num_packs += 1
        if not num_packs:
            num_rows = sum(map(len, self.datasets))
            raise RecipeError(
                f"train.epochs: {self.epochs:g} of {num_rows:,} rows gives nothing to train on\n"
                "  next: raise it, or give train.steps"
            )
        return -(-num_packs // self.packs_per_step)

    def state(self) -> dict[str, Any]:
        """Where the stream stands, for JSON."""
        return {
            **self._identity(),
            "epoch": self._epoch,
            "cursor": self._cursor,
            "steps": self._steps,
            "window": [key for key, _ in self._window.items()],
            "statistics": self.statistics.to_json(),
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Go on exactly where `state` was taken.

        Raises  RunError if the data, the seed or the sizes are not those of the saved run
        """
        for name, value in self._identity().items():
            if state[name] != value:
                raise RunError(
                    f"the run can't be resumed: its {name} was {state[name]}, now it is {value}\n"
                    "  next: put the data and the recipe back as they were, or start a new run"
                )
        self._epoch, self._cursor, self._steps = state["epoch"], state["cursor"], state["steps"]
        self._order = EpochOrder(self.datasets, self.seed, self._epoch)
        self.statistics = Statistics.from_json(state["statistics"])
        self._window = Window()
        last_position, samples = -1, []
        for position, number in state["window"]:
            if position != last_position:
                dataset, row = self._order[position]
                last_position, samples = position, dataset.read(row).samples
            self._window.add(len(samples[number]), ([position, number], samples[number]))

    def _identity(self) -> dict[str, Any]:
        """What has to be the same for a saved position to mean the same."""
        return {
            "seed": self.seed,
            "tokens_per_pack": self.tokens_per_pack,
            "packs_per_step": self.packs_per_step,
            "data": [dataset.fingerprint for dataset in self.datasets],
        }

    def _next_group(self) -> list[tuple[list[int], Sample]]:
        """The samples of the next pack; [] at the end."""
        self._refill()
        return self._window.take_pack(self.tokens_per_pack)

    def _refill(self) -> None:
        """Read on until the window is full; into the next epoch only when this one is used up."""
        while not self._window or self._cursor < self._limit():
            if self._cursor < self._limit():
                full = self._window.num_tokens >= _WINDOW_PACKS * self.tokens_per_pack
                if full or len(self._window) >= _WINDOW_SAMPLES:
                    return
                self._read_row()
            elif self.epochs is not None and self._epoch + 1 >= self.epochs:
                return
            else:
                self._start_next_epoch()

    def _limit(self) -> int:
        """How many rows of this epoch's order are read."""
        share = 1.0 if self.epochs is None else min(1.0, self.epochs - self._epoch)
        return round(share * len(self._order))

    def _read_row(self) -> None:
        dataset, row = self._order[self._cursor]
        result = dataset.read(row)
        self.statistics.add(result)
        for number, sample in enumerate(result.samples):
            _check_length(sample, self.tokens_per_pack)
            self._window.add(len(sample), ([self._cursor, number], sample))
        self._cursor += 1

    def _start_next_epoch(self) -> None:
        if not self.statistics.samples:
            found = "\n  ".join(self.statistics.warnings())
            raise DataError(f"a whole epoch of {self.statistics.rows:,} rows gave no sample to train on\n  {found}")
        self._epoch, self._cursor = self._epoch + 1, 0
        self._order = EpochOrder(self.datasets, self.seed, self._epoch)


class _LengthPacker(PackedStream):
    """The packs of a stream, from its beginning, made of lengths alone."""

    def __init__(self, stream: PackedStream, lengths: Lengths) -> None:
        super().__init__(
            stream.datasets,
            tokens_per_step=stream.packs_per_step * stream.tokens_per_pack,
            tokens_per_pack=stream.tokens_per_pack,
            seed=stream.seed,
            epochs=stream.epochs,
        )
        self._lengths = lengths

    def _read_row(self) -> None:
        dataset, row = self._order[self._cursor]
        for length in filter(None, self._lengths[dataset][row].tolist()):
            self.statistics.samples += 1
            self._window.add(length, None)
        self._cursor += 1
