"""Where a model's weights are, and in which form the computation gets them.

`mmap`: in the checkpoint's file, experts as packed bytes. `resident`: the same bytes copied to the device. `bf16`:
experts expanded once, to the activations' dtype. All three give the same numbers: MXFP4 expands without rounding.
Experts are computed as (experts, out, in), gate_up's gate rows before its up rows; the checkpoint interleaves the two.
Letters: E experts, I expert width, O out, D in, G groups of 32.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from ossia.kernels import pick_kernels
from ossia.model.arch import Arch
from ossia.model.checkpoint import Checkpoint
from ossia.ops.mxfp4 import dequantize_mxfp4

Placement = Literal["mmap", "resident", "bf16"]
EXPERT_WEIGHTS = ("gate_up_proj", "down_proj")


def split_gate_up(x: Tensor) -> Tensor:
    """Rows (axis 1) from the checkpoint's order g0 u0 g1 u1 ... to g0 g1 ... u0 u1 ..."""
    return torch.cat((x[:, 0::2], x[:, 1::2]), dim=1)


def interleave_gate_up(x: Tensor) -> Tensor:
    """The inverse of `split_gate_up`."""
    gate, up = x.chunk(2, dim=1)
    return torch.stack((gate, up), dim=2).flatten(1, 2)


@dataclass(slots=True)
class Trainable:
    """The tensors that an optimizer changes: float32, by name, in the computation's layout.

    The computation gets copies in its own dtype; a gradient that reaches a copy is added to the tensor's `.grad` in
    float32, so micro-batches don't round each other away.
    """

    tensors: dict[str, Tensor] = field(default_factory=dict)

    def __contains__(self, name: str) -> bool:
        return name in self.tensors

    def use(self, name: str, dtype: torch.dtype, scale: float = 1.0) -> Tensor:
        """`scale` times the tensor in `dtype`: where gradients are on, a leaf that passes its gradient on."""
        master = self.tensors[name]
        copy = (master.detach() * scale if scale != 1.0 else master.detach()).to(dtype)
        if not torch.is_grad_enabled():
            return copy
        copy = copy.detach().requires_grad_()

        def pass_on(leaf: Tensor) -> None:
            grad = leaf.grad.to(torch.float32)
            grad = grad * scale if scale != 1.0 else grad
            master.grad = grad if master.grad is None else master.grad.add_(grad)
            leaf.grad = None

        copy.register_post_accumulate_grad_hook(pass_on)
        return copy

    def zero_grad(self) -> None:
        """Forget all gradients."""
        for tensor in self.tensors.values():
            tensor.grad = None

    @property
    def num_parameters(self) -> int:
        return sum(tensor.numel() for tensor in self.tensors.values())


class Weights:
    """A checkpoint's tensors, placed."""

    def __init__(self, checkpoint: Checkpoint, placement: Placement, dtype: torch.dtype, device: torch.device) -> None:
        self.checkpoint, self.placement, self.dtype, self.device = checkpoint, placement, dtype, device
        self._held: dict[str, Tensor] = {}
        self._expanded: dict[tuple[int, str], Tensor] = {}
        if placement == "mmap":
            return
        for name in checkpoint.specs:
            if placement == "resident" or not _is_expert_weight(name):
                self._held[name] = self._placed(name)
        if placement == "bf16":
            for layer in range(self.arch.num_layers):
                for projection in EXPERT_WEIGHTS:
                    self._expanded[layer, projection] = self._expand(layer, projection, slice(None))

    def _placed(self, name: str) -> Tensor:
        """A tensor where `resident` or `bf16` wants it: the first copies it as it is, the second casts it once."""
        tensor = self.checkpoint.tensor(name)
        if self.placement == "bf16":  # on the CPU and in bf16 these are the file's own pages, not a second copy
            return tensor.to(device=self.device, dtype=self.dtype)
        return tensor.to(self.device) if self.device.type != "cpu" else tensor.clone()

    @property
    def arch(self) -> Arch:
        return self.checkpoint.arch

    def raw(self, name: str) -> Tensor:
        """A tensor as the checkpoint holds it, wherever it is."""
        held = self._held.get(name)
        return self.checkpoint.tensor(name) if held is None else held

    def get(self, name: str) -> Tensor:
        """A tensor in the computation's dtype and on its device."""
        return self.raw(name).to(device=self.device, dtype=self.dtype)

    def expert_bias(self, layer: int, projection: str) -> Tensor:
        """(E, O); gate rows before up rows."""
        bias_EO = self.get(f"model.layers.{layer}.mlp.experts.{projection}_bias")
        return split_gate_up(bias_EO) if projection == "gate_up_proj" else bias_EO

    def expert_weight(self, layer: int, projection: str, expert: int | None = None) -> Tensor:
        """(E, O, D) in the computation's dtype, or (O, D) of one expert; expanded on the spot unless `bf16`."""
        expanded = self._expanded.get((layer, projection))
        if expert is None:
            return self._expand(layer, projection, slice(None)) if expanded is None else expanded
        one = slice(expert, expert + 1)
        return self._expand(layer, projection, one)[0] if expanded is None else expanded[expert]

    def _expand(self, layer: int, projection: str, experts: slice) -> Tensor:
        prefix = f"model.layers.{layer}.mlp.experts.{projection}"
        if self.checkpoint.layout == "bf16":
            weight_EOD = self.raw(prefix)[experts].to(device=self.device, dtype=self.dtype).transpose(1, 2)
            return split_gate_up(weight_EOD) if projection == "gate_up_proj" else weight_EOD.contiguous()
        blocks, scales = (self.raw(prefix + part)[experts].to(self.device) for part in ("_blocks", "_scales"))
        if pick_kernels(self.device, self.dtype) == "triton":
            from ossia.kernels.gpu.dequant import dequantize

            return dequantize(blocks, scales, self.dtype, split=projection == "gate_up_proj")
        if projection == "gate_up_proj":  # reordering the packed bytes is four times less than the expanded ones
            blocks, scales = split_gate_up(blocks), split_gate_up(scales)
        return dequantize_mxfp4(blocks, scales, self.dtype)

    def __iter__(self) -> Iterator[str]:
        return iter(self.checkpoint.specs)


def _is_expert_weight(name: str) -> bool:
    return ".mlp.experts." in name and not name.endswith("_bias")
