"""Ranks that find no pack in a step, of weights that are cut: threads meet for every exchange, or the test ends red."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from threading import Barrier
from typing import Any, cast

import pytest
import torch
from torch import Tensor

from ossia.model.arch import Layout
from ossia.model.checkpoint import Checkpoint
from ossia.model.cut.trained import TrainedParts
from ossia.model.lora import Lora, LoraSpec
from ossia.model.transformer import Transformer
from ossia.model.weights import Weights
from ossia.train.optim import AdamW
from ossia.train.ranks.world import World
from ossia.train.step import evaluate_loss, train_step
from tests.conftest import MakeTiny
from tests.model.cut.test_frozen import CPU, DEEP, packs_of

SPEC = LoraSpec({"q_proj": (2, 4.0), "gate_up_proj": (2, 4.0), "router": (2, 4.0)})
SOON_S = 10.0  # that a rank waits for the others


class Met:
    """A rank that is a thread, with what `train_step` and cut weights ask of `World`; all have to ask for the same."""

    def __init__(self, rank: int, barrier: Barrier, letters: dict[int, Any]) -> None:
        self.rank, self.size, self._barrier, self._letters = rank, barrier.parties, barrier, letters

    def _all(self, asked: str, value: Any) -> list[Any]:
        self._letters[self.rank] = asked, value
        self._barrier.wait(SOON_S)
        found = [self._letters[rank] for rank in range(self.size)]
        self._barrier.wait(SOON_S)
        assert {name for name, _ in found} == {asked}
        return [one for _, one in found]

    def gather(self, value: Any) -> list[Any]:
        return self._all("words", value)

    def total(self, value: float) -> float:
        return math.fsum(self._all("total", value))

    def begin_gather(self, whole: Tensor, part: Tensor) -> Callable[[], None]:
        found = torch.cat(self._all(f"gather {whole.numel()}", part.clone()))
        return lambda: (whole.copy_(found), None)[1]

    def begin_sum(self, part: Tensor, whole: Tensor) -> Callable[[], None]:
        found = sum(self._all(f"sum {whole.numel()}", whole.clone())).view(self.size, -1)[self.rank]
        return lambda: (part.copy_(found), None)[1]

    def sum_over_ranks(self, tensors: Iterable[Tensor]) -> None:
        for tensor in tensors:
            tensor.copy_(sum(self._all(f"sum {tensor.numel()}", tensor.clone())))

    def exchange(self, rows: Tensor, given: Sequence[int], taken: Sequence[int]) -> Tensor:
        found = [one[self.rank] for one in self._all("rows", rows.detach().split([*given]))]
        assert [*map(len, found)] == [*taken]
        return torch.cat(found)


def trained(world: Met | None, checkpoint: Checkpoint, what: str) -> tuple[list[float], dict[str, Tensor]]:
    """Losses of two steps of one pack and of the held-out packs, and what was trained, of a rank its parts."""
    staying = world is not None and what.endswith("stay")
    over, ranks = world if staying else None, cast(World | None, world)
    if what.startswith("adapters"):
        weights = Weights(checkpoint, "resident", torch.float32, CPU, ranks=ranks, staying=staying)
        lora = Lora.fresh(checkpoint.arch, SPEC, seed=0, device=CPU)
        model = Transformer(weights, lora=lora, experts_over=over)
    else:
        weights = Weights(checkpoint, "mmap", torch.float32, CPU, staying=staying)
        model = Transformer(weights, experts_over=over)
        model.train_all_weights(ranks)
    assert model.cut == (world is not None)
    parts = model.trainable
    how = {"shapes": parts.shapes, "total": ranks.total} if ranks and isinstance(parts, TrainedParts) else {}
    # eps: a gradient of rounding errors alone moves nothing
    optimizer = AdamW(parts.tensors, betas=(0.9, 0.95), eps=1e-3, weight_decay=0.1, **how)
    losses = []
    for length in (9, 12):
        result = train_step(model, optimizer, packs_of(length), lr=1e-2, clip=1.0, recompute=True, world=ranks)
        losses += [result.loss, result.grad_norm]
    return [*losses, evaluate_loss(model, packs_of(7), ranks).loss], parts.tensors


@pytest.mark.parametrize("layout", ["mxfp4", "bf16"])
@pytest.mark.parametrize("what", ["adapters", "all weights", "adapters, experts stay", "all weights, experts stay"])
def test_of_one_pack_each_rank_takes_part_and_the_step_is_that_of_one_process(
    what: str, layout: Layout, tiny: MakeTiny
) -> None:
    checkpoint = Checkpoint.open(tiny(replace(DEEP, num_experts=4), weights=layout))
    size = 2 if what.endswith("stay") else 3
    barrier, letters = Barrier(size), dict[int, Any]()

    def rank(number: int) -> tuple[list[float], dict[str, Tensor]]:
        try:
            return trained(Met(number, barrier, letters), checkpoint, what)
        except BaseException:
            barrier.abort()  # who ends early leaves nobody waiting
            raise

    with ThreadPoolExecutor(size) as pool:
        found = list(pool.map(rank, range(size)))
    losses, tensors = trained(None, checkpoint, what)
    for of_rank, _ in found:
        assert of_rank == pytest.approx(losses, rel=1e-5)
    for name, whole in tensors.items():
        there = [parts[name].flatten() for _, parts in found]
        one = torch.cat(there) if sum(map(len, there)) == whole.numel() else there[0]
        torch.testing.assert_close(one, whole.flatten(), rtol=1e-4, atol=1e-6, msg=name)
