"""Frozen weights cut over the ranks, in the checkpoint's own bytes: experts in MXFP4 stay packed, and travel packed.

A layer is one row of bytes: its tensors one after the other, each from a multiple of 16 on, the end padded so that it
divides by the ranks. A rank holds one piece of it, read from the file by slices that are its own, and one all-gather
makes the row, whose tensors are views. Two rows are there at a time: while a layer computes, the next one comes. Of the
embedding a rank looks up rows in the file; the head is gathered once a step, beginning with the last layer.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from ossia.model.arch import TensorSpec
from ossia.model.budget.weights import HEAD
from ossia.model.checkpoint import TORCH_DTYPES, Checkpoint
from ossia.model.cut.home import Home
from ossia.model.cut.ranks import Ranks
from ossia.model.cut.slots import TwoSlots
from ossia.ops.memory import leave_to_the_file

ALIGNED = 16  # bytes: of tensors in a row, and of parts


class Row:
    """Where tensors are in a row of bytes, the same for all layers.

    num_bytes  of the row, a multiple of 16 times the ranks
    """

    def __init__(self, specs: Mapping[str, TensorSpec], size: int) -> None:
        self.specs, self.starts, end = specs, dict[str, int](), 0
        for name, spec in specs.items():
            self.starts[name] = end
            end += -(-spec.num_bytes // ALIGNED) * ALIGNED
        self.num_bytes = -(-end // (size * ALIGNED)) * size * ALIGNED

    def views(self, row: Tensor) -> dict[str, Tensor]:
        """The tensors in a row, by name."""
        found = {}
        for name, spec in self.specs.items():
            raw = row[self.starts[name] : self.starts[name] + spec.num_bytes]
            found[name] = raw.view(TORCH_DTYPES[spec.dtype]).view(spec.shape)
        return found

    def read(self, tensor_of: Callable[[str], Tensor], start: int, stop: int) -> Tensor:
        """The bytes from `start` to `stop` of a row of mapped tensors; of those only what is asked for is read."""
        part = torch.zeros(stop - start, dtype=torch.uint8)
        for name, spec in self.specs.items():
            first, last = max(self.starts[name], start), min(self.starts[name] + spec.num_bytes, stop)
            if first < last:
                tensor = tensor_of(name)
                raw = tensor.view(-1).view(torch.uint8)
                part[first - start : last - start] = raw[first - self.starts[name] : last - self.starts[name]]
                leave_to_the_file(tensor)
        return part


class FrozenParts(TwoSlots):
    """This rank's parts of a checkpoint's layers and head, and the layers that were gathered of all ranks' parts.

    num_bytes  of its parts; gathered: bytes that were gathered so far, its own among them
    """

    def __init__(self, checkpoint: Checkpoint, ranks: Ranks, home: Home) -> None:
        arch, specs = checkpoint.arch, checkpoint.specs
        super().__init__(arch.num_layers)
        self._ranks, self._home, self._device, self.gathered = ranks, home, home.device, 0
        prefixes = [f"model.layers.{layer}." for layer in range(arch.num_layers)]
        first = {name: spec for name, spec in specs.items() if name.startswith(prefixes[0])}
        self._row = Row({name.removeprefix(prefixes[0]): spec for name, spec in first.items()}, ranks.size)
        self._head_row = Row({HEAD: specs[HEAD]}, ranks.size)
        self._parts = [self._own(self._row, checkpoint, prefix) for prefix in prefixes]
        self._head_part = self._own(self._head_row, checkpoint, "")
        self._rows = [torch.empty(self._row.num_bytes, dtype=torch.uint8, device=self._device) for _ in range(2)]
        self._views = [self._row.views(row) for row in self._rows]
        self._arriving: list[Callable[[], None] | None] = [None, None]
        self._head: Tensor | None = None
        self._head_arriving: Callable[[], None] | None = None

    @property
    def num_bytes(self) -> int:
        return sum(part.nbytes for part in (*self._parts, self._head_part))

    def has(self, name: str) -> bool:
        """Whether a tensor is cut: one of a layer's, or the head."""
        return name == HEAD or name.startswith("model.layers.")

    def tensor(self, name: str) -> Tensor:
        """A tensor as the checkpoint holds it, on the device: until two other layers are asked for, of the head one."""
        if name == HEAD:
            return self._whole_head()
        layer, leaf = name.removeprefix("model.layers.").split(".", 1)
        index, before = int(layer), self._at
        slot = self.slot_of(index)
        if index != before:
            self._end_head()
            if index == self._num_layers - 1:
                self._begin_head()  # the step turns round after it
        return self._views[slot][leaf]

    def _own(self, row: Row, checkpoint: Checkpoint, prefix: str) -> Tensor:
        each = row.num_bytes // self._ranks.size
        start = self._ranks.rank * each
        return self._home.keep(row.read(lambda name: checkpoint.tensor(prefix + name), start, start + each))

    def _send(self, index: int, slot: int) -> None:
        self._arriving[slot] = self._begin(self._rows[slot], self._parts[index])

    def _wait(self, slot: int) -> None:
        if (arriving := self._arriving[slot]) is not None:
            arriving()
            self._arriving[slot] = None

    def _begin(self, row: Tensor, part: Tensor) -> Callable[[], None]:
        self.gathered += row.nbytes
        return self._home.begin_gather(self._ranks, row, part)

    def _begin_head(self) -> None:
        self._head = torch.empty(self._head_row.num_bytes, dtype=torch.uint8, device=self._device)
        self._head_arriving = self._begin(self._head, self._head_part)

    def _whole_head(self) -> Tensor:
        if self._head is None:
            self._begin_head()
        if self._head_arriving is not None:
            self._head_arriving()
            self._head_arriving = None
        assert self._head is not None
        return self._head_row.views(self._head)[HEAD]

    def _end_head(self) -> None:
        """Let go of the head, which whoever uses it still has."""
        if self._head_arriving is not None:
            self._head_arriving()
        self._head, self._head_arriving = None, None
