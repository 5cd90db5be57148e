"""The same checkpoint in Ossia and in transformers, and random documents for both."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ossia.data.pack import Pack
from ossia.data.sample import Sample
from ossia.model.arch import SHAPES, Arch
from ossia.model.checkpoint import Checkpoint
from ossia.model.lora import Lora
from ossia.model.transformer import Transformer
from ossia.model.weights import Placement, Weights

CPU = torch.device("cpu")
SMALL = dataclasses.replace(
    SHAPES["demo"], hidden_size=64, intermediate_size=96, num_experts=8, head_dim=32, num_heads=4, num_kv_heads=2
)


def load(
    path: Path, dtype: torch.dtype = torch.float32, placement: Placement = "mmap", lora: Lora | None = None
) -> Transformer:
    """The checkpoint in Ossia."""
    return Transformer(Weights(Checkpoint.open(path), placement, dtype, CPU), lora=lora)


def load_transformers(path: Path, dtype: torch.dtype = torch.float32) -> torch.nn.Module:
    """The checkpoint in transformers, with its own plain attention."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(path, dtype=dtype, attn_implementation="eager").eval()


def documents(arch: Arch, lengths: Sequence[int], seed: int = 0, trained_share: float = 0.5) -> list[Sample]:
    """Random ids; about `trained_share` of the positions have a weight, of different sizes."""
    rng = np.random.default_rng(seed)
    found = []
    for index, length in enumerate(lengths):
        weights = (rng.random(length) < trained_share) * rng.choice([0.5, 1.0, 2.0], length)
        weights[0], weights[-1] = 0.0, 1.0
        if length == 1:
            weights[0] = 0.0
        # ids below the special ones: transformers gives the padding token's embedding no gradient
        ids = rng.integers(0, min(arch.vocab_size, 250), length)
        found.append(Sample(ids.astype(np.int32), weights.astype(np.float32), None, f"random:{index}", ()))
    return found


def pack_of(samples: Sequence[Sample]) -> Pack:
    return Pack.from_samples(samples)


def relative_error(found: Tensor, expected: Tensor) -> float:
    """Norm of the difference over the norm of the expected."""
    return float((found.double() - expected.double()).norm() / expected.double().norm())
