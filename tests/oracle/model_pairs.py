"""The same checkpoint in Ossia and in transformers; documents and gradients of both."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Self

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from ossia.config import Recipe
from ossia.data.dataset import in_order, open_datasets
from ossia.data.pack import Pack
from ossia.data.sample import Sample
from ossia.demo.prepare import DATA
from ossia.harmony.vocab import Vocabulary
from ossia.model.arch import Arch
from ossia.model.checkpoint import Checkpoint
from ossia.model.lora import Lora
from ossia.model.transformer import Transformer
from ossia.model.weights import Placement, Weights, split_gate_up
from ossia.ops.loss import weighted_nll
from ossia.train.schedule import forward_backward

CPU = torch.device("cpu")


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


def held_out(trained: Path, count: int) -> list[Sample]:
    """The first conversations of the fixture's own data that it wasn't trained on."""
    rows = trained.parent / DATA / "heldout.jsonl"
    recipe = Recipe.model_validate({"model": str(trained), "data": {"path": str(rows)}, "output": "nowhere"})
    return list(islice(in_order(open_datasets(recipe, Vocabulary.from_file(trained)).train), count))


def pack_of(samples: Sequence[Sample]) -> Pack:
    return Pack.from_samples(samples)


@dataclass(frozen=True, slots=True)
class Batch:
    """Samples as rows, padded on the right as transformers takes them.

    ids, mask, targets (B, T) int64; weights (B, T) float32, of predicting the target, 0 in the padding
    """

    ids: Tensor
    mask: Tensor
    targets: Tensor
    weights: Tensor

    @classmethod
    def of(cls, samples: Sequence[Sample]) -> Self:
        packs = [pack_of([sample]) for sample in samples]
        columns = zip(*((p.ids, torch.ones_like(p.ids), p.targets, p.weights) for p in packs), strict=True)
        return cls(*(pad_sequence(column, batch_first=True) for column in columns))

    def loss(self, model: torch.nn.Module) -> Tensor:
        """What transformers makes of the loss that `gradients_of` takes."""
        logits = model(input_ids=self.ids, attention_mask=self.mask).logits.float()
        nll = F.cross_entropy(logits.flatten(0, 1), self.targets.flatten(), reduction="none")
        return (nll * self.weights.flatten()).sum() / self.weights.sum()


def gradients_of(
    model: Transformer, packs: Sequence[Pack], *, recompute: bool, denominator: float | None = None
) -> tuple[float, dict[str, Tensor]]:
    """The loss of a step and its gradient in every trainable tensor.

    denominator  of the loss; without it the sum of all weights
    """
    total = denominator or float(sum(pack.weights.sum() for pack in packs))
    model.trainable.zero_grad()
    loss = forward_backward(
        model, packs, lambda logp, m, rows: weighted_nll(logp, packs[m].weights[rows], total), recompute=recompute
    )
    return loss, {name: tensor.grad for name, tensor in model.trainable.tensors.items()}


def in_our_layout(name: str, checkpoint_layout: Tensor) -> Tensor:
    """Experts as (experts, out, in), gate before up."""
    if ".mlp.experts." not in name:
        return checkpoint_layout
    tensor = checkpoint_layout if name.endswith("_bias") else checkpoint_layout.transpose(1, 2)
    return split_gate_up(tensor) if "gate_up_proj" in name else tensor


def relative_error(found: Tensor, expected: Tensor) -> float:
    """Norm of the difference over the norm of the expected."""
    return float((found.double() - expected.double()).norm() / expected.double().norm())


def cosine(found: Tensor, expected: Tensor) -> float:
    """Of the angle between the two, as vectors."""
    a, b = found.double().flatten(), expected.double().flatten()
    return float(a @ b / (a.norm() * b.norm()))
