"""A run whose trained tensors are cut over its ranks: what of parameters and optimizer is saved, and put back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ossia.train.optim import AdamW
from ossia.train.shards.form import Part, range_of
from ossia.train.shards.read import restore_parts
from ossia.train.shards.save import Saver
from ossia.train.state import SavedState

if TYPE_CHECKING:
    from ossia.train.ranks.world import World

Shapes = Mapping[str, Sequence[int]]


class CutRun:
    """Saves and restores this rank's part of a run; all ranks do the same together."""

    def __init__(
        self,
        run: Path,
        world: World,
        params: Mapping[str, Tensor],
        optimizer: AdamW,
        shapes: Shapes,
        *,
        start: int,
        keep: int,
        beside: bool,
    ) -> None:
        """As `Saver`; `params` are this rank's flat parts of tensors of these shapes, which the optimizer updates.

        Raises  RunError as `Saver`, and if a disk couldn't hold even one checkpoint
        """
        self._run, self._world, self._params, self._optimizer = run, world, params, optimizer
        later = {**params, **optimizer.empty_state(1)}
        self._shapes = {name: tuple(shapes[_parameter(name, shapes)]) for name, own in later.items() if own.ndim}
        self._saver = Saver(run, world, self._shapes, start=start, keep=keep, beside=beside)
        self._saver.check_room(cut_parts(later, self._shapes, world))
        self.check, self.wait = self._saver.check, self._saver.wait

    def save(self, step: int, progress: Mapping[str, Any]) -> None:
        """As `Saver.save`."""
        self._saver.save(step, self._parts(), num_updates=self._optimizer.num_updates, progress=progress)

    def restore(self, saved: SavedState) -> None:
        """As `restore_parts`."""
        restore_parts(self._world, self._run, saved, self._ready, self._shapes)

    def _ready(self, num_updates: int) -> dict[str, Part]:
        self._optimizer.load_state_dict(self._optimizer.empty_state(num_updates))
        return self._parts()

    def _parts(self) -> dict[str, Part]:
        return cut_parts({**self._params, **self._optimizer.state_dict()}, self._shapes, self._world)


def cut_parts(tensors: Mapping[str, Tensor], shapes: Shapes, world: World) -> dict[str, Part]:
    """This rank's flat pieces of tensors of these shapes, as parts; what is a scalar isn't one."""
    parts = {}
    for name, own in tensors.items():
        if own.ndim:
            total = torch.Size(shapes[name]).numel()
            start, count = range_of(total, world.rank, world.size)
            assert own.shape == (count,), (name, own.shape, count)
            parts[name] = Part(total, start, own.detach())
    return parts


def _parameter(name: str, shapes: Shapes) -> str:
    """The parameter that a tensor of the optimizer's state belongs to."""
    return name if name in shapes else name.partition(".")[2]
