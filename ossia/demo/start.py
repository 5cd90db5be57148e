"""The untrained model that the demo starts from: seeded random weights in the released MXFP4 format.

`ossia tiny` draws weights so that every part of the architecture matters to a comparison (no bias, norm or sink is
neutral). To be trained from nothing, a model starts better with neutral ones: matrices near 1/sqrt(hidden), norms 1,
biases 0.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from ossia.model.arch import SHAPES, Arch
from ossia.model.checkpoint import write_checkpoint
from ossia.model.template import vocabulary_size
from ossia.ops.mxfp4 import quantize_mxfp4

WEIGHT_STD = 0.08  # near 1 / sqrt(hidden)


def write_untrained(
    path: Path, tokenizer: Path, *, seed: int, width: int | None = None, head_dim: int | None = None
) -> Arch:
    """Write the checkpoint into the new folder `path`, its vocabulary that of the file `tokenizer`.

    width     of an expert, a multiple of 32; None: the demo's
    head_dim  of attention; None: the demo's

    Raises CheckpointError as `write_checkpoint`.
    """
    shape = SHAPES["demo"]
    arch = replace(
        shape,
        vocab_size=vocabulary_size(tokenizer),
        intermediate_size=width or shape.intermediate_size,
        head_dim=head_dim or shape.head_dim,
    )
    write_checkpoint(path, arch, _tensors(arch, seed), "mxfp4", tokenizer_from=tokenizer)
    return arch


def _tensors(arch: Arch, seed: int) -> Iterator[tuple[str, Tensor]]:
    """The tensors of the MXFP4 layout; experts are drawn, then rounded to the format."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).mul_(WEIGHT_STD)

    for name, spec in arch.tensor_specs("mxfp4").items():
        if name.endswith("_blocks"):
            experts, rows, blocks, half = spec.shape
            packed, scales = quantize_mxfp4(draw(experts, rows, blocks * half * 2), "largest")
            yield name, packed
            yield name.removesuffix("_blocks") + "_scales", scales
        elif name.endswith("norm.weight"):
            yield name, torch.ones(spec.shape, dtype=torch.bfloat16)
        elif name.endswith("bias"):
            yield name, torch.zeros(spec.shape, dtype=torch.bfloat16)
        elif not name.endswith("_scales"):
            yield name, draw(*spec.shape).bfloat16()
