"""What decoding is held against: the whole sequence through the training forward for every token."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch

from ossia.data.sample import Sample
from ossia.kernels.cpu.native import Unavailable, load_kernels
from ossia.model.lora import Lora, LoraSpec
from ossia.model.transformer import Transformer
from tests.oracle.model_pairs import CPU, pack_of


def decoders() -> list[Any]:
    """What `Engine(decoder=...)` can be here, as test parameters; native is skipped where nothing compiles it."""
    found = load_kernels()
    missing = isinstance(found, Unavailable)
    return ["torch", pytest.param("native", marks=pytest.mark.skipif(missing, reason=found.reason if missing else ""))]


def random_prompts(lengths: Sequence[int], seed: int = 0) -> list[list[int]]:
    """Prompts of these lengths, of ids below 250."""
    rng = np.random.default_rng(seed)
    return [rng.integers(0, 250, length).tolist() for length in lengths]


def recomputed(
    model: Transformer, prompt: Sequence[int], num_tokens: int, *, frequency: float = 0.0, presence: float = 0.0
) -> tuple[list[int], list[float]]:
    """Greedy ids under penalties and their logprobs without, every token from a forward pass over all before it."""
    ids, logprobs = list(prompt), []
    for _ in range(num_tokens):
        sample = Sample(np.array(ids, np.int32), np.zeros(len(ids), np.float32), None, "prompt")
        logits = model.logits(pack_of([sample]))[-1].float()
        counts = torch.tensor(ids[len(prompt) :], dtype=torch.int64).bincount(minlength=len(logits))
        ids.append(int((logits - frequency * counts - presence * (counts > 0)).argmax()))
        logprobs.append(float(logits.log_softmax(-1)[ids[-1]]))
    return ids[len(prompt) :], logprobs


def adapter(model: Transformer, *targets: str, seed: int = 1) -> Lora:
    """An adapter that changes the model: B isn't zero."""
    lora = Lora.fresh(model.arch, LoraSpec(dict.fromkeys(targets, (4, 16.0))), seed=seed, device=CPU)
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in lora.trainable.tensors.items():
        if name.endswith("lora_B"):
            tensor.copy_(torch.randn(tensor.shape, generator=generator) * 0.1)
    return lora


def sample_of(ids: Sequence[int]) -> Sample:
    """Ids as a sample, nothing of it trained."""
    return Sample(np.array(ids, np.int32), np.zeros(len(ids), np.float32), None, "ids")
