"""The weights of a GGUF file as our model computes with them: what an export is compared by.

Letters: E experts, O out, D in.
"""

from __future__ import annotations

from pathlib import Path

import torch
from gguf import GGMLQuantizationType
from torch import Tensor

from ossia.export.gguf.file import GgufFile
from ossia.export.gguf.write import gguf_names
from ossia.export.verify import PassingWeights
from ossia.model.checkpoint import Checkpoint
from ossia.model.transformer import Transformer
from ossia.ops.mxfp4 import BLOCK, dequantize_mxfp4


def gguf_model(path: Path, base: Checkpoint) -> Transformer:
    """The model in a GGUF file, in float32, its weights read from the file when they are asked for.

    base    the checkpoint that it was made from, for its shape
    Raises  CheckpointError unless the file holds exactly the tensors of such a model, in their shapes
    """
    file = GgufFile.open(path)
    file.require_shapes(base.arch)
    return Transformer(_GgufWeights(base, file))


class _GgufWeights(PassingWeights):
    """A GGUF file's tensors in the place of a checkpoint's."""

    def __init__(self, base: Checkpoint, file: GgufFile) -> None:
        super().__init__(base)
        self._file = file

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
        *_, fan_out, fan_in = self._file.places[names[0]].shape
        matrix_OD = self.buffer(projection, (len(names) * fan_out, fan_in))
        for part, name in enumerate(names):
            self._values(name, slice(expert, expert + 1), matrix_OD[part * fan_out :][:fan_out].unsqueeze(0))
        return matrix_OD.t(), False

    def _values(self, name: str, rows: slice | Tensor, out: Tensor | None = None) -> Tensor:
        """Rows of a tensor in float32, in `out` if given; read through a mapping that ends here."""
        place, raw = self._file.places[name], self._file.raw(name, rows)
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
