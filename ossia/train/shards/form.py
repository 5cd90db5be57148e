"""A sharded checkpoint's files: PyTorch's distributed checkpoint (DCP), whose planner and storage do the work.

```text
__0_0.distcp, __1_0.distcp, ...   each rank's part of every tensor, in pieces
.metadata                         which piece is where; DCP's own
```
Tensors are flat there, and a piece is small, so that any range of a tensor is read in memory that doesn't grow with it.
`torch.distributed.checkpoint.load` reads these files too. What DCP says between ranks by collectives we say by words
(`World.gather`), because then a rank that fails or is gone has a name. `.metadata` is a pickle: only DCP's own classes
are taken from it.
"""

from __future__ import annotations

import pickle
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor
from torch.distributed.checkpoint import (
    DefaultLoadPlanner,
    DefaultSavePlanner,
    FileSystemReader,
    FileSystemWriter,
    LoadPlan,
    SavePlan,
)
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list
from torch.distributed.checkpoint.storage import WriteResult
from torch.distributed.tensor import DTensor, Shard

from ossia.errors import CheckpointError

METADATA = ".metadata"
PIECE = 2**24
"""Numbers of a piece: 64 MiB in float32."""

Range = tuple[int, int]
"""(first number, how many)"""


@dataclass(frozen=True, slots=True)
class Part:
    """What this process holds of a tensor that is seen flat.

    total  numbers of the whole
    start  of them the first that is here
    local  those that are here, (n,), contiguous, on any device
    """

    total: int
    start: int
    local: Tensor

    @classmethod
    def of(cls, tensor: Tensor) -> Self:
        """Of a 1-D DTensor its rank's part (placements [Shard(0)]); any other tensor is whole."""
        if not isinstance(tensor, DTensor):
            return cls(tensor.numel(), 0, tensor.detach().reshape(-1))
        assert tensor.ndim == tensor.device_mesh.ndim == 1, tensor
        assert list(tensor.placements) == [Shard(0)], tensor
        local = tensor.detach().to_local()
        start, count = range_of(tensor.numel(), tensor.device_mesh.get_local_rank(), tensor.device_mesh.size())
        assert len(local) == count, (local.shape, count)
        return cls(tensor.numel(), start, local)


def range_of(total: int, rank: int, size: int) -> Range:
    """A rank's numbers of a tensor that `Shard(0)` cuts: as torch.chunk does, so the last may have fewer or none."""
    each = -(-total // size)
    start = min(total, rank * each)
    return start, min(each, total - start)


Form = Mapping[str, tuple[int, torch.dtype]]
"""By a tensor's name: numbers of the whole, and their type."""
Written = list[tuple[str, int, str, int, int]]
"""By piece: name, first number, file, first byte there, bytes; as JSON."""


class _Planner(DefaultSavePlanner):
    """DCP's own, but for a tensor's pieces."""

    def __init__(self, parts: Mapping[str, Part]) -> None:
        super().__init__(flatten_state_dict=False)
        self._parts = parts

    def resolve_data(self, write_item: WriteItem) -> Tensor:
        part, (first,) = self._parts[write_item.index.fqn], write_item.index.offset
        (count,) = write_item.tensor_data.chunk.sizes
        return part.local[first - part.start : first - part.start + count]


class _Writer(FileSystemWriter):
    """DCP's own, whose metadata doesn't hold a number that is another each time."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder, thread_count=1, per_thread_copy_ahead=0)

    def storage_meta(self) -> StorageMeta:
        return StorageMeta()


def write_part(folder: Path, rank: int, parts: Mapping[str, Part], ranges: Sequence[Sequence[Range]]) -> Written:
    """Write and flush this rank's file; what it holds. Nothing, and no file, where it has no numbers.

    ranges  by rank, for each of `parts` in order: which of its numbers that rank writes
    Raises  OSError or RuntimeError from the disk
    """
    plans, _ = _plans({name: (part.total, part.local.dtype) for name, part in parts.items()}, ranges)
    writer, planner = _Writer(folder), _Planner(parts)
    plan = writer.prepare_global_plan(plans)[rank]
    if not plan.items:
        return []
    results = writer.write_data(plan, planner).value()
    return [
        (r.index.fqn, r.index.offset[0], r.storage_data.relative_path, r.storage_data.offset, r.storage_data.length)
        for r in results
    ]


def write_metadata(folder: Path, form: Form, ranges: Sequence[Sequence[Range]], written: Sequence[Written]) -> None:
    """Write and flush `.metadata`, the same bytes wherever it is written. Raises OSError."""
    _, metadata = _plans(form, ranges)
    results = [
        WriteResult(MetadataIndex(name, [first]), num_bytes, _StorageInfo(file, at, num_bytes))
        for of_rank in written
        for name, first, file, at, num_bytes in of_rank
    ]
    _Writer(folder).finish(metadata, [results])


def _plans(form: Form, ranges: Sequence[Sequence[Range]]) -> tuple[list[SavePlan], Metadata]:
    """Every rank's pieces. Raises ValueError, from DCP, if they don't make up the tensors."""
    mapping = {name: (name,) for name in form}
    plans = []
    for of_rank in ranges:
        items = [
            _item(name, first, min(PIECE, start + count - first), *form[name])
            for name, (start, count) in zip(form, of_rank, strict=True)
            for first in range(start, start + count, PIECE)
        ]
        plans.append(SavePlan(items, planner_data=mapping))
    plans, metadata = DefaultSavePlanner(flatten_state_dict=False).create_global_plan(plans)
    metadata.planner_data = mapping
    return plans, metadata


def _item(name: str, first: int, count: int, total: int, dtype: torch.dtype) -> WriteItem:
    chunk = ChunkStorageMetadata(torch.Size([first]), torch.Size([count]))
    data = TensorWriteData(chunk, TensorProperties(dtype=dtype), torch.Size([total]))
    return WriteItem(MetadataIndex(name, [first]), WriteItemType.SHARD, tensor_data=data)


class _Unpickler(pickle.Unpickler):
    """Takes nothing from a pickle but what DCP's metadata is made of: others could be made to run anything."""

    def find_class(self, module: str, name: str) -> Any:
        dtype = module == "torch" and isinstance(vars(torch).get(name), torch.dtype)
        if not dtype and (module, name) not in _OF_METADATA:
            raise pickle.UnpicklingError(f"it names {module}.{name}, which is no part of a checkpoint's metadata")
        return super().find_class(module, name)


_OF_METADATA = {
    ("torch", "Size"),
    ("torch.serialization", "_get_layout"),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    *(
        ("torch.distributed.checkpoint.metadata", name)
        for name in (
            "ChunkStorageMetadata",
            "Metadata",
            "MetadataIndex",
            "StorageMeta",
            "TensorProperties",
            "TensorStorageMetadata",
            "_MEM_FORMAT_ENCODING",
        )
    ),
}


class _Reader(FileSystemReader):
    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        with (Path(self.path) / METADATA).open("rb") as file:
            return _Unpickler(file).load()


class _Into(DefaultLoadPlanner):
    """Has DCP's reader put a range into one tensor."""

    def __init__(self, target: Tensor) -> None:
        super().__init__(flatten_state_dict=False)
        self._target = target

    def lookup_tensor(self, index: MetadataIndex) -> Tensor:
        return self._target

    def commit_tensor(self, read_item: Any, tensor: Tensor) -> None:
        pass


class Shards:
    """The tensors of a sharded checkpoint, read from its files; no other process is needed."""

    def __init__(self, path: Path) -> None:
        """`path` is the checkpoint's folder. Raises CheckpointError if its metadata can't be read."""
        self.path, self._reader = path, _Reader(path)
        try:
            self._metadata = self._reader.read_metadata()
        except (OSError, pickle.UnpicklingError, EOFError, AttributeError, ValueError) as error:
            raise CheckpointError(f"{path / METADATA}: can't be read: {error}") from error
        self._reader.set_up_storage_reader(self._metadata, is_coordinator=True)

    @property
    def form(self) -> Form:
        """What tensors there are."""
        found = self._metadata.state_dict_metadata
        return {name: (one.size[0], one.properties.dtype) for name, one in found.items()}

    def files_of(self, name: str, start: int, count: int) -> set[str]:
        """The files that hold a range of a tensor."""
        return {
            self._metadata.storage_data[item.storage_index].relative_path for item in self._items(name, start, count)
        }

    def read(self, name: str, start: int, count: int, into: Tensor | None = None) -> Tensor:
        """A range of a tensor, (count,), copied piece by piece into `into` where that is given.

        Raises  CheckpointError if a file can't be read
        """
        if into is None:
            into = torch.empty(count, dtype=self.form[name][1])
        try:
            self._reader.read_data(LoadPlan(self._items(name, start, count)), _Into(into)).wait()
        except (OSError, RuntimeError, AssertionError, EOFError, pickle.UnpicklingError) as error:
            raise CheckpointError(f"{self.path}: `{name}` can't be read: {error}") from error
        return into

    def _items(self, name: str, start: int, count: int) -> list[Any]:
        one = self._metadata.state_dict_metadata[name]
        assert isinstance(one, TensorStorageMetadata)
        if not count:
            return []
        wanted = ChunkStorageMetadata(torch.Size([start]), torch.Size([count]))
        return create_read_items_for_chunk_list(name, one, [wanted])


def parts_of(tensors: Mapping[str, Tensor]) -> dict[str, Part]:
    """What this process holds of each tensor, by name."""
    return {name: Part.of(tensor) for name, tensor in tensors.items()}


def ranges_of(parts: Mapping[str, Part]) -> list[Range]:
    """Of each part, in order, which numbers it is."""
    return [(part.start, len(part.local)) for part in parts.values()]
