"""The weights of a GGUF file as our model computes with them: what an export is compared by.

Own reader, because the `gguf` package's makes two arrays of every string, and gpt-oss's tokenizer has 650,000.
Source: the GGUF specification in ggml's `docs/gguf.md`, version 3.
Letters: E experts, O out, D in.
"""

from __future__ import annotations

import mmap
import struct
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from torch import Tensor

from ossia.errors import CheckpointError
from ossia.export.gguf import gguf_names, gguf_shapes
from ossia.export.verify import PassingWeights
from ossia.model.checkpoint import Checkpoint
from ossia.model.transformer import Transformer
from ossia.ops.mxfp4 import BLOCK, dequantize_mxfp4


@dataclass(frozen=True, slots=True)
class _Place:
    """A tensor of the file: its type, its shape with the contiguous axis last, and where its bytes begin."""

    kind: GGMLQuantizationType
    shape: tuple[int, ...]
    start: int


def gguf_model(path: Path, base: Checkpoint) -> Transformer:
    """The model in a GGUF file, in float32, its weights read from the file when they are asked for.

    base    the checkpoint that it was made from, for its shape
    Raises  CheckpointError unless the file holds exactly the tensors of such a model, in their shapes
    """
    places = _places(path)
    found = {name: place.shape for name, place in places.items()}
    wanted = gguf_shapes(base.arch)
    if differing := sorted(name for name in {**found, **wanted} if found.get(name) != wanted.get(name)):
        name = differing[0]
        raise CheckpointError(
            f"{path}: `{name}` is {found.get(name, 'missing')}, to be {wanted.get(name, 'not there')} "
            f"({len(differing)} tensors differ)"
        )
    return Transformer(_GgufWeights(base, path, places))


class _Head:
    """Reads what stands before the tensors, from its beginning."""

    _SIZES: ClassVar = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}  # of the kinds of numbers
    _STRING, _ARRAY = 8, 9

    def __init__(self, raw: mmap.mmap) -> None:
        self._raw, self.at = raw, 0

    def number(self, kind: str) -> int:
        (found,) = struct.unpack_from(f"<{kind}", self._raw, self.at)
        self.at += struct.calcsize(kind)
        return found

    def string(self) -> bytes:
        size = self.number("Q")
        self.at += size
        return self._raw[self.at - size : self.at]

    def skip(self, kind: int, count: int = 1) -> None:
        """Values of metadata."""
        if kind == self._ARRAY:
            for _ in range(count):
                self.skip(self.number("I"), self.number("Q"))
        elif kind == self._STRING:
            for _ in range(count):
                self.at += 8 + int.from_bytes(self._raw[self.at : self.at + 8], "little")
        else:
            self.at += self._SIZES[kind] * count


def _places(path: Path) -> dict[str, _Place]:
    """The tensors that a file lists."""
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as raw:
        head = _Head(raw)
        magic, version, num_tensors, num_keys = head.number("I"), *(head.number(kind) for kind in "IQQ")
        if (magic, version) != (0x46554747, 3):
            raise CheckpointError(f"{path}: is no GGUF file of version 3")
        alignment = 32
        for _ in range(num_keys):
            key, kind = head.string(), head.number("I")
            if key == b"general.alignment":
                alignment = head.number("I")
            else:
                head.skip(kind)
        found = {}
        for _ in range(num_tensors):
            name = head.string().decode()
            shape = tuple(head.number("Q") for _ in range(head.number("I")))
            found[name] = _Place(GGMLQuantizationType(head.number("I")), shape[::-1], head.number("Q"))
        start = -(-head.at // alignment) * alignment
    return {name: replace(place, start=start + place.start) for name, place in found.items()}


class _GgufWeights(PassingWeights):
    """A GGUF file's tensors in the place of a checkpoint's."""

    def __init__(self, base: Checkpoint, path: Path, places: dict[str, _Place]) -> None:
        super().__init__(base)
        self._path, self._places = path, places

    def raw(self, name: str) -> Tensor:
        """A tensor that isn't an expert's matrix, float32."""
        return self.some(name, slice(None))

    def some(self, name: str, rows: slice | Tensor) -> Tensor:
        """Some rows of such a tensor, float32."""
        (target,) = gguf_names(name)
        return self._values(target, rows)

    def expert_bias(self, layer: int, projection: str) -> Tensor:
        """(E, O); gate rows before up rows."""
        names = gguf_names(f"model.layers.{layer}.mlp.experts.{projection}_bias")
        return torch.cat([self._values(name, slice(None)) for name in names], dim=1)

    def expert_matrix(self, layer: int, projection: str, expert: int) -> tuple[Tensor, bool]:
        """One expert's matrix, (D, O) float32, gate outputs before up outputs; good until the next one."""
        names = gguf_names(f"model.layers.{layer}.mlp.experts.{projection}")
        *_, fan_out, fan_in = self._places[names[0]].shape
        matrix_OD = self.buffer(projection, (len(names) * fan_out, fan_in))
        for part, name in enumerate(names):
            self._values(name, slice(expert, expert + 1), matrix_OD[part * fan_out :][:fan_out].unsqueeze(0))
        return matrix_OD.t(), False

    def _values(self, name: str, rows: slice | Tensor, out: Tensor | None = None) -> Tensor:
        """Rows of a tensor in float32, in `out` if given; read through a mapping that ends here."""
        place = self._places[name]
        block, block_bytes = GGML_QUANT_SIZES[place.kind]
        shape = (*place.shape[:-1], place.shape[-1] // block * block_bytes)
        raw = torch.from_numpy(np.memmap(self._path, np.uint8, "c", place.start, shape))[rows]
        if out is None:
            out = torch.empty(*raw.shape[:-1], place.shape[-1])
        decode(raw, place.kind, out)
        return out


def decode(raw: Tensor, kind: GGMLQuantizationType, out: Tensor) -> None:
    """The numbers that a file's bytes stand for, exactly.

    raw   (..., bytes of a row) uint8
    kind  MXFP4, Q8_0, BF16, F16 or F32
    out   (..., row) float32, contiguous, written in place
    """
    if kind is GGMLQuantizationType.MXFP4:
        blocks, scales = unpack_mxfp4(raw.unflatten(-1, (-1, 1 + BLOCK // 2)))
        dequantize_mxfp4(blocks, scales, torch.float32, out)
    elif kind is GGMLQuantizationType.Q8_0:
        blocks = raw.unflatten(-1, (-1, 2 + BLOCK))
        scales = blocks[..., :2].contiguous().view(torch.float16).float()
        torch.mul(blocks[..., 2:].view(torch.int8), scales, out=out.unflatten(-1, (-1, BLOCK)))
    else:
        plain = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
        out.copy_(raw.view(plain[kind.name]))


def unpack_mxfp4(packed_xGb: Tensor) -> tuple[Tensor, Tensor]:
    """The inverse of `gguf.repack_mxfp4`: a checkpoint's blocks (..., G, 16) and scales (..., G)."""
    bytes_xGb = packed_xGb[..., 1:]
    codes = torch.cat((bytes_xGb & 15, bytes_xGb >> 4), dim=-1)
    return codes[..., 0::2] | (codes[..., 1::2] << 4), packed_xGb[..., 0].contiguous()
