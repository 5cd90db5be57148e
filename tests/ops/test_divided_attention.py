"""Attention over a pack that several share: the members are threads, which hand their rows over in turn."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import pytest
import torch
from torch import Tensor

from ossia.data.pack import Pack
from ossia.ops.attention import Segments, sink_attention
from ossia.ops.attention.divided import divided, tokens_of
from tests.conftest import MakeTiny
from tests.train.test_step import ALL_TARGETS, SHAPE, gradients, model_of, samples


class Thread:
    """A member of a group of threads."""

    def __init__(self, rank: int, barrier: Barrier, letters: dict[int, list[Tensor]]) -> None:
        self.rank, self.size, self._barrier, self._letters = rank, barrier.parties, barrier, letters

    def exchange(self, rows: Tensor, given: Sequence[int], taken: Sequence[int]) -> Tensor:
        self._letters[self.rank] = list(rows.split([*given]))
        self._barrier.wait(30)
        found = [self._letters[n][self.rank] for n in range(self.size)]
        self._barrier.wait(30)
        assert [*map(len, found)] == [*taken]
        return torch.cat(found)


def among(size: int, act: Callable[[Thread], list[Tensor]]) -> list[list[Tensor]]:
    """What each of so many members finds."""
    barrier, letters = Barrier(size), dict[int, list[Tensor]]()
    with ThreadPoolExecutor(size) as pool:
        return list(pool.map(act, [Thread(rank, barrier, letters) for rank in range(size)]))


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("window", [None, 8])
def test_members_attend_as_one_does_and_the_gradients_are_the_same(size: int, window: int | None) -> None:
    made = torch.Generator().manual_seed(0)
    q, k, v, sinks, wanted = (
        torch.randn(shape, generator=made) for shape in ((39, 8, 16), (39, 4, 16), (39, 4, 16), (8,), (39, 8, 16))
    )
    segments = Segments(torch.tensor([0, 21, 22, 39]))

    def attend(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor, window: int | None) -> Tensor:
        return sink_attention(q, k, v, sinks, segments, window=window, scale=0.25, backend="cpu")

    def alone() -> list[Tensor]:
        leaves = [x.clone().requires_grad_() for x in (q, k, v, sinks)]
        y = attend(*leaves, window)
        y.backward(wanted)
        return [y.detach(), *(leaf.grad for leaf in leaves)]

    def member(one: Thread) -> list[Tensor]:
        own = tokens_of(39, one.rank, one.size)
        leaves = [x[own].clone().requires_grad_() for x in (q, k, v)]
        leaves.append(sinks.clone().requires_grad_())
        y = divided(attend, one, 39)(*leaves, window)
        y.backward(wanted[own])
        return [y.detach(), *(leaf.grad for leaf in leaves)]

    parts = list(zip(*among(size, member), strict=True))
    found = [*(torch.cat(column) for column in parts[:4]), torch.stack(parts[4]).sum(0)]
    for one, other in zip(alone(), found, strict=True):
        torch.testing.assert_close(other, one, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("trains", ["adapters", "all weights"])
def test_members_find_the_loss_and_gradients_of_a_step_also_where_one_has_no_token(
    tiny: MakeTiny, monkeypatch: pytest.MonkeyPatch, size: int, trains: str
) -> None:
    monkeypatch.setattr("ossia.train.schedule.ATTENTION_KEPT_FROM", 30)
    shape = dataclasses.replace(SHAPE, num_heads=8, num_kv_heads=4, head_dim=16)
    spec = ALL_TARGETS if trains == "adapters" else None
    packs = [Pack.from_samples(samples(lengths)) for lengths in ((33, 9), (3,), (2, 35))]
    loss, wanted = gradients(model_of(tiny, spec, shape=shape), packs)

    def member(one: Thread) -> list[Tensor]:
        model = model_of(tiny, spec, shape=shape)
        loss, found = gradients(model, packs, keep_attention=True, members=one)
        return [torch.tensor(loss), *found.values()]

    losses, *found = zip(*among(size, member), strict=True)
    assert float(sum(losses)) == pytest.approx(loss, rel=1e-6)
    for (name, one), parts in zip(wanted.items(), found, strict=True):
        torch.testing.assert_close(sum(parts), one, rtol=1e-4, atol=1e-6, msg=lambda said, name=name: f"{name}: {said}")
