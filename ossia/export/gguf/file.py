"""A GGUF file: its metadata, and its tensors as bytes, each read from the file when it is asked for.

Own reader, because the `gguf` package's makes two arrays of every string, and gpt-oss's tokenizer has 650,000.
Source: the GGUF specification in ggml's `docs/gguf.md`, version 3.
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from torch import Tensor

from ossia.errors import CheckpointError
from ossia.export.gguf.write import gguf_shapes
from ossia.model.arch import Arch


@dataclass(frozen=True, slots=True)
class Place:
    """A tensor of the file: its type, its shape with the contiguous axis last, and where its bytes begin."""

    kind: GGMLQuantizationType
    shape: tuple[int, ...]
    start: int


@dataclass(frozen=True, slots=True)
class GgufFile:
    """An open file: what its head says. No weight is read.

    places  its tensors by name
    fields  of every key of the metadata its type and where its value begins
    """

    path: Path
    places: Mapping[str, Place]
    fields: Mapping[str, tuple[int, int]]

    @classmethod
    def open(cls, path: Path) -> GgufFile:
        """Read a file's head. Raises CheckpointError for what is no GGUF file of version 3, or one cut short."""
        try:
            return cls._open(path)
        except (struct.error, UnicodeDecodeError) as error:
            raise CheckpointError(f"{path}: its head is cut short or damaged ({error}); get the file again") from error
        except OSError as error:
            raise CheckpointError(f"{path}: can't be read: {error.strerror}") from error

    @classmethod
    def _open(cls, path: Path) -> GgufFile:
        size = path.stat().st_size
        if size < 24:
            raise CheckpointError(f"{path}: {size} bytes are no GGUF file; get it again")
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as raw:
            head = _Head(raw)
            magic, version, num_tensors, num_keys = head.number("I"), *(head.number(kind) for kind in "IQQ")
            if (magic, version) != (0x46554747, 3):
                raise CheckpointError(f"{path}: is no GGUF file of version 3")
            fields, found = {}, []
            for _ in range(num_keys):
                key, kind = head.string().decode(), head.number("I")
                fields[key] = (kind, head.at)
                head.skip(path, kind)
            for _ in range(num_tensors):
                name = head.string().decode()
                shape = tuple(head.number("Q") for _ in range(head.number("I")))
                found.append((name, shape[::-1], head.number("I"), head.number("Q")))
            end = head.at
            alignment = 32
            if "general.alignment" in fields:
                head.at = fields["general.alignment"][1]
                alignment = head.number("I")
        start = -(-end // alignment) * alignment
        places = {name: Place(_kind(path, name, kind), shape, start + at) for name, shape, kind, at in found}
        for name, place in places.items():
            if place.start + _num_bytes(place) > size:
                raise CheckpointError(f"{path}: `{name}` would go beyond its end; it is cut short: get it again")
        return cls(path, places, fields)

    def value(self, key: str, default: Any = None) -> Any:
        """A value of the metadata, a list of an array; `default` where the file doesn't have the key."""
        if key not in self.fields:
            return default
        kind, at = self.fields[key]
        with self.path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as raw:
            head = _Head(raw)
            head.at = at
            return head.value(kind)

    def require_shapes(self, arch: Arch) -> None:
        """Raise CheckpointError unless the file holds exactly the tensors of a gpt-oss, in its shapes."""
        found = {name: place.shape for name, place in self.places.items()}
        wanted = gguf_shapes(arch)
        if differing := sorted(name for name in {**found, **wanted} if found.get(name) != wanted.get(name)):
            name = differing[0]
            raise CheckpointError(
                f"{self.path}: `{name}` is {found.get(name, 'missing')}, to be {wanted.get(name, 'not there')} "
                f"({len(differing)} tensors differ)"
            )

    def raw(self, name: str, rows: slice | Tensor) -> Tensor:
        """Rows of a tensor as they are, (..., bytes of a row) uint8, on a mapping of their own."""
        place = self.places[name]
        block, block_bytes = GGML_QUANT_SIZES[place.kind]
        shape = (*place.shape[:-1], place.shape[-1] // block * block_bytes)
        return torch.from_numpy(np.memmap(self.path, np.uint8, "c", place.start, shape))[rows]


def _kind(path: Path, name: str, number: int) -> GGMLQuantizationType:
    if number not in list(GGMLQuantizationType):
        raise CheckpointError(f"{path}: `{name}` is of type {number}, which is unknown here")
    return GGMLQuantizationType(number)


def _num_bytes(place: Place) -> int:
    block, block_bytes = GGML_QUANT_SIZES[place.kind]
    count = 1
    for size in place.shape:
        count *= size
    return count // block * block_bytes


class _Head:
    """Reads what stands before the tensors, from its beginning."""

    # of the kinds of numbers, as `struct` has them
    _NUMBERS: ClassVar = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
    _STRING, _ARRAY = 8, 9

    def __init__(self, raw: mmap.mmap) -> None:
        self._raw, self.at = raw, 0

    def number(self, kind: str) -> Any:
        (found,) = struct.unpack_from(f"<{kind}", self._raw, self.at)
        self.at += struct.calcsize(kind)
        return found

    def string(self) -> bytes:
        size = self.number("Q")
        self.at += size
        return self._raw[self.at - size : self.at]

    def value(self, kind: int) -> Any:
        """A value of metadata."""
        if kind == self._ARRAY:
            inner, count = self.number("I"), self.number("Q")
            return [self.value(inner) for _ in range(count)]
        return self.string().decode() if kind == self._STRING else self.number(self._NUMBERS[kind])

    def skip(self, path: Path, kind: int, count: int = 1) -> None:
        """Values of metadata. Raises CheckpointError for a kind that there isn't."""
        if kind == self._ARRAY:
            for _ in range(count):
                self.skip(path, self.number("I"), self.number("Q"))
        elif kind == self._STRING:
            for _ in range(count):
                self.at += 8 + int.from_bytes(self._raw[self.at : self.at + 8], "little")
        elif kind in self._NUMBERS:
            self.at += struct.calcsize(self._NUMBERS[kind]) * count
        else:
            raise CheckpointError(f"{path}: its metadata holds a value of type {kind}, which is unknown; get it again")
