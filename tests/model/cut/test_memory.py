"""What a rank holds and what it gathers, against the plan's bytes and against the memory that the system counts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from ossia.model.arch import alternating_layers
from ossia.model.budget.many.division import Division
from ossia.model.budget.many.ranks import Whole, rank_bytes
from ossia.model.budget.many.traffic import traffic
from ossia.model.budget.work import Work
from ossia.model.checkpoint import Checkpoint
from ossia.model.cut.trained import TrainedParts
from ossia.model.lora import Lora, LoraSpec
from ossia.model.transformer import Transformer
from ossia.model.weights import Weights
from ossia.ops.memory import return_freed_memory
from ossia.train.schedule import forward_backward
from tests.conftest import MakeTiny
from tests.model.cut.test_frozen import CPU, packs_of
from tests.model.cut.test_trained import OneOf
from tests.shapes import UNEQUAL

MB = 1_000_000
DEEP = replace(
    UNEQUAL, hidden_size=256, intermediate_size=256, num_experts=16, num_layers=10, layer_types=alternating_layers(10)
)
SPEC = LoraSpec({"q_proj": (2, 4.0)})
LORA = Work(DEEP, "mxfp4", "resident", "cpu", "torch", "float32", {"q_proj": 2}, pack=16)
FULL = replace(LORA, placement="bf16", ranks=None)


def anonymous() -> int:
    """Bytes of this process that are no file's, without pages that the C library keeps for later."""
    return_freed_memory(CPU)
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("Anonymous:"))


class Watched(OneOf):
    """A rank of four that looks at the process's memory whenever it meets the others."""

    def __init__(self) -> None:
        super().__init__(0, 4)
        self.peak = 0

    def begin_gather(self, whole: Tensor, part: Tensor) -> Callable[[], None]:
        wait = super().begin_gather(whole, part)
        self.peak = max(self.peak, anonymous())
        return wait

    def begin_sum(self, part: Tensor, whole: Tensor) -> Callable[[], None]:
        wait = super().begin_sum(part, whole)
        self.peak = max(self.peak, anonymous())
        return wait


def step(model: Transformer) -> None:
    forward_backward(model, packs_of(16), lambda logp, m, rows: -logp.mean(), recompute=True)


needs_proc = pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="needs /proc/self/smaps_rollup")


@needs_proc
def test_of_a_frozen_base_a_rank_takes_its_share_and_two_layers_with_the_head(tiny: MakeTiny) -> None:
    checkpoint, ranks = Checkpoint.open(tiny(DEEP)), Watched()
    model = checkpoint.num_bytes
    before = anonymous()
    weights = Weights(checkpoint, "resident", torch.float32, CPU, ranks=ranks)
    assert weights.parts is not None
    for layer in (*range(10), *reversed(range(10))):
        weights.parts.tensor(f"model.layers.{layer}.self_attn.sinks")
    weights.parts.tensor("lm_head.weight")
    constant = 2 * weights.parts._row.num_bytes + checkpoint.specs["lm_head.weight"].num_bytes + 2 * MB
    took = max(ranks.peak, anonymous()) - before
    assert took <= model / 4 + constant
    assert model / 4 + constant < 0.6 * model  # so it says something


@needs_proc
def test_of_weights_that_are_trained_a_rank_takes_its_share_and_some_layers(tiny: MakeTiny) -> None:
    checkpoint, ranks = Checkpoint.open(tiny(DEEP)), Watched()
    before = anonymous()
    model = Transformer(Weights(checkpoint, "mmap", torch.float32, CPU))
    model.train_all_weights(ranks)
    step(model)
    numbers, layer = DEEP.num_parameters(), 4 * (Whole.of(FULL).trained_dense + Whole.of(FULL).trained_experts)
    constant = 5 * layer + 20 * MB  # two gathered layers, the part that is sent, gradients twice; a step's activations
    took = ranks.peak - before
    assert took <= 8 * numbers / 4 + constant  # masters and gradients
    assert 8 * numbers / 4 + constant < 0.7 * 8 * numbers


def test_a_rank_holds_and_gathers_what_the_plan_says(tiny: MakeTiny) -> None:
    checkpoint, division = Checkpoint.open(tiny(DEEP)), Division(4, shards=4)
    arch = replace(DEEP, vocab_size=checkpoint.arch.vocab_size)
    lora, full = replace(LORA, arch=arch), replace(FULL, arch=arch)
    weights = Weights(checkpoint, "resident", torch.float32, CPU, ranks=Watched())
    frozen = Transformer(weights, lora=Lora.fresh(arch, SPEC, seed=0, device=CPU))
    parts, planned = weights.parts, rank_bytes(lora, division).device
    assert parts is not None
    assert parts.num_bytes == pytest.approx(planned["weights"], rel=1e-3)
    assert sum(row.nbytes for row in parts._rows) == pytest.approx(planned["gathered layers"], rel=1e-3)
    step(frozen)
    before = parts.gathered
    step(frozen)
    received = (parts.gathered - before) * 3 / 4  # all but its own
    assert received == pytest.approx(traffic(lora, division).parts["weights, gathered"].total, rel=1e-3)

    trained = Transformer(Weights(checkpoint, "mmap", torch.float32, CPU))
    trained.train_all_weights(Watched())
    assert isinstance(trained.trainable, TrainedParts)
    all_parts, divided = trained.trainable, replace(division, trained_shards=4)
    planned = rank_bytes(full, divided).device
    assert sum(t.nbytes for t in all_parts.tensors.values()) == pytest.approx(planned["trained, float32"], rel=1e-3)
    step(trained)
    moved = traffic(full, divided).parts
    assert all_parts.gathered * 3 / 4 == pytest.approx(moved["weights, gathered"].total, rel=2e-3)
    assert all_parts.summed * 3 / 4 == pytest.approx(moved["gradients, summed"].total, rel=2e-3)
    assert sum(t.grad.nbytes for t in all_parts.tensors.values()) == pytest.approx(planned["gradients"], rel=1e-3)
