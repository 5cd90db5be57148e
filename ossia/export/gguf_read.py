"""The weights of a GGUF file as our model computes with them: what an export is compared by.

Letters: E experts, O out, D in.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from gguf import GGMLQuantizationType, GGUFReader, ReaderTensor
from gguf.quants import dequantize
from torch import Tensor

from ossia.errors import CheckpointError
from ossia.export.gguf import gguf_names, gguf_shapes
from ossia.model.checkpoint import Checkpoint
from ossia.model.transformer import Transformer
from ossia.model.weights import Weights


def gguf_model(path: Path, base: Checkpoint) -> Transformer:
    """The model in a GGUF file, in float32, its weights mapped from the file.

    base    the checkpoint that it was made from, for its shape
    Raises  CheckpointError unless the file holds exactly the tensors of such a model, in their shapes
    """
    tensors = {tensor.name: tensor for tensor in GGUFReader(path, "c").tensors}
    found = {name: tuple(map(int, reversed(tensor.shape))) for name, tensor in tensors.items()}
    wanted = gguf_shapes(base.arch)
    if differing := sorted(name for name in {**found, **wanted} if found.get(name) != wanted.get(name)):
        name = differing[0]
        raise CheckpointError(
            f"{path}: `{name}` is {found.get(name, 'missing')}, to be {wanted.get(name, 'not there')} "
            f"({len(differing)} tensors differ)"
        )
    return Transformer(_GgufWeights(base, tensors))


class _GgufWeights(Weights):
    """A GGUF file's tensors in the place of a checkpoint's."""

    def __init__(self, base: Checkpoint, tensors: dict[str, ReaderTensor]) -> None:
        super().__init__(base, "mmap", torch.float32, torch.device("cpu"))
        self._tensors = tensors

    def raw(self, name: str) -> Tensor:
        """A tensor that isn't an expert's matrix."""
        (target,) = gguf_names(name)
        return self._values(target)

    def expert_bias(self, layer: int, projection: str) -> Tensor:
        """(E, O); gate rows before up rows."""
        names = gguf_names(f"model.layers.{layer}.mlp.experts.{projection}_bias")
        return torch.cat([self._values(name) for name in names], dim=1)

    def expert_weight(self, layer: int, projection: str, expert: int | None = None) -> Tensor:
        """(E, O, D) float32, or (O, D) of one expert."""
        names = gguf_names(f"model.layers.{layer}.mlp.experts.{projection}")
        which = slice(None) if expert is None else expert
        return torch.cat([self._values(name, which).float() for name in names], dim=-2)

    def _values(self, name: str, which: slice | int = slice(None)) -> Tensor:
        """Rows of a tensor, bfloat16 if it is that in the file, or else float16 or float32."""
        tensor = self._tensors[name]
        raw = np.asarray(tensor.data[which])
        if tensor.tensor_type == GGMLQuantizationType.BF16:
            return torch.from_numpy(raw.view(np.int16)).view(torch.bfloat16)
        if tensor.tensor_type in (GGMLQuantizationType.F32, GGMLQuantizationType.F16):
            return torch.from_numpy(raw)
        return torch.from_numpy(dequantize(raw, tensor.tensor_type))
