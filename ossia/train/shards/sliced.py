"""Trained tensors of which rows can be had without the rest: from a sharded checkpoint, or from the ranks of a run.

Whoever writes a model from them holds some rows at a time, never a whole tensor.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ossia.train.shards.form import Part, Shards
from ossia.train.state import read_state

if TYPE_CHECKING:
    from ossia.train.ranks.world import World


class Sliced(Mapping[str, Tensor], ABC):
    """Tensors by name. Asked for whole, those of one layer are kept until another's are asked for."""

    def __init__(self, shapes: Mapping[str, Sequence[int]]) -> None:
        self.shapes = {name: tuple(shape) for name, shape in shapes.items()}
        self._layer, self._whole = "", dict[str, Tensor]()

    @abstractmethod
    def read(self, name: str, start: int, count: int) -> Tensor:
        """So many numbers of a tensor that is seen flat."""

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """From one row of the first axis to before another, (stop - start, ...)."""
        first, *rest = self.shapes[name]
        assert 0 <= start <= stop <= first
        return self.read(name, start * prod(rest), (stop - start) * prod(rest)).view(stop - start, *rest)

    def __getitem__(self, name: str) -> Tensor:
        shape, layer = self.shapes[name], ".".join(name.split(".")[:3])
        if layer != self._layer:
            self._layer, self._whole = layer, {}
        if name not in self._whole:
            self._whole[name] = self.read(name, 0, prod(shape)).view(shape)
        return self._whole[name]

    def __contains__(self, name: object) -> bool:
        return name in self.shapes  # Mapping's own would read the tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes)

    def __len__(self) -> int:
        return len(self.shapes)


def rows_of(tensors: Mapping[str, Tensor], name: str, start: int, stop: int) -> Tensor:
    """Rows of a tensor's first axis, of a mapping that may be `Sliced`."""
    return tensors.rows(name, start, stop) if isinstance(tensors, Sliced) else tensors[name][start:stop]


def shape_of(tensors: Mapping[str, Tensor], name: str) -> tuple[int, ...]:
    """The shape of a tensor, of a mapping that may be `Sliced`."""
    return tensors.shapes[name] if isinstance(tensors, Sliced) else tuple(tensors[name].shape)


class InShards(Sliced):
    """The trained tensors of a sharded checkpoint, by the names that they have in the model."""

    def __init__(self, path: Path) -> None:
        """`path` is the checkpoint's folder. Raises CheckpointError if it can't be read."""
        self.path, self._shards = path, Shards(path)
        moments = ("exp_avg.", "exp_avg_sq.", "master.")
        super().__init__({n: shape for n, shape in read_state(path)["shapes"].items() if not n.startswith(moments)})

    def read(self, name: str, start: int, count: int) -> Tensor:
        """Raises CheckpointError if a file can't be read."""
        return self._shards.read(name, start, count)


class _OfRanks(Sliced):
    """What is cut over the ranks, on rank 0, while the others answer."""

    def __init__(self, world: World, parts: Mapping[str, Part], shapes: Mapping[str, Sequence[int]]) -> None:
        super().__init__(shapes)
        self._world, self._parts = world, parts

    def read(self, name: str, start: int, count: int) -> Tensor:
        self._world.from_first([name, start, count])
        return _together(self._world, self._parts[name], start, count)


@contextmanager
def on_first(
    world: World, parts: Mapping[str, Part], shapes: Mapping[str, Sequence[int]]
) -> Iterator[Mapping[str, Tensor] | None]:
    """On rank 0 all tensors, of which it asks the other ranks for their parts; on the others None, once rank 0 has all
    it wanted. Every rank holds no more than the rows asked for.

    parts   this rank's of each tensor, by name; float32
    shapes  of the tensors, before they were made flat
    """
    if world.leads:
        with world.busy("writing the model"):
            yield _OfRanks(world, parts, shapes)
            world.from_first(None)
        return
    while (asked := world.from_first(None)) is not None:
        name, start, count = asked
        _together(world, parts[name], start, count)
    yield None


def _together(world: World, part: Part, start: int, count: int) -> Tensor:
    """A range of a tensor out of the ranks' parts: each puts in its numbers, and bytes are summed, so bits stay."""
    whole = torch.zeros(count, dtype=part.local.dtype, device=world.device)
    first, last = max(start, part.start), min(start + count, part.start + len(part.local))
    if first < last:
        whole[first - start : last - start] = part.local[first - part.start : last - part.start]
    world.sum_over_ranks([whole.view(torch.uint8)])
    return whole.cpu()
