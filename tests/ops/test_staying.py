"""Experts divided over members (threads), to which rows travel: the sums and gradients of one that has all of them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from ossia.kernels import Kernels
from ossia.model.checkpoint import Checkpoint
from ossia.model.cut.ranks import experts_of
from ossia.model.weights import Weights
from ossia.ops.fused import parts_for
from ossia.ops.moe import Expert, route
from ossia.ops.staying import with_rows_sent
from tests.conftest import MakeTiny
from tests.model.cut.test_frozen import CPU
from tests.model.cut.test_trained import OneOf
from tests.ops.test_divided_attention import Thread, among
from tests.shapes import LEAST

D, I, E, K, R = 32, 32, 4, 2, 2


@pytest.mark.parametrize("kernels", ["torch", "c"])
@pytest.mark.parametrize("shares", [(9, 4), (7, 0), (3, 1, 0, 6)])
def test_members_sum_their_tokens_experts_as_one_does(kernels: Kernels, shares: tuple[int, ...]) -> None:
    made = torch.Generator().manual_seed(0)
    tokens, size, parts = sum(shares), len(shares), parts_for(kernels)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=made) * 0.5

    residual, x, logits, wanted = random(tokens, D), random(tokens, D), random(tokens, E), random(tokens, D)
    logits[:, 3] -= 9.0  # nobody chooses the last
    gate_up = [random(E, 2 * I, D), random(E, 2 * I), random(E, R, D), random(E, 2 * I, R)]
    down = [random(E, D, I), random(E, D), random(E, R, I), random(E, D, R)]

    def through(own: slice, rows: slice, mixture: object) -> list[Tensor]:
        leaves = [t[rows].clone().requires_grad_() for t in (residual, x, logits)]
        experts = [t.clone().requires_grad_() for t in (*gate_up, *down)]
        routing = route(leaves[2], K, sort=parts.sort)
        projections = (Expert(*(t[own] for t in some)) for some in (experts[:4], experts[4:]))
        y = mixture(leaves[0], leaves[1], routing, *projections, 7.0, 1.702, lambda x, which: None)
        y.backward(wanted[rows])
        return [y.detach(), *(leaf.grad for leaf in leaves), *(expert.grad for expert in experts)]

    def member(one: Thread) -> list[Tensor]:
        start = sum(shares[: one.rank])
        rows = slice(start, start + shares[one.rank])
        return through(experts_of(E, one), rows, with_rows_sent(parts.mixture, parts.sort, one))

    alone = through(slice(0, E), slice(0, tokens), parts.mixture)
    columns = list(zip(*among(size, member), strict=True))
    found = [*(torch.cat(column) for column in columns[:4]), *(torch.stack(column).sum(0) for column in columns[4:])]
    for one, other in zip(alone, found, strict=True):
        torch.testing.assert_close(other, one, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("layout", ["mxfp4", "bf16"])
def test_a_rank_holds_its_own_experts_and_gathers_none(layout: str, tiny: MakeTiny) -> None:
    checkpoint = Checkpoint.open(tiny(LEAST, weights=layout))
    of_experts = sum(spec.num_bytes for name, spec in checkpoint.specs.items() if ".mlp.experts." in name)
    all_of_it = Weights(checkpoint, "mmap", torch.float32, CPU)
    held = 0
    for rank in range(2):
        own = slice(2 * rank, 2 * rank + 2)
        one = Weights(checkpoint, "resident", torch.float32, CPU, ranks=OneOf(rank, 2), staying=True)
        held += sum(one.raw(name).nbytes for name in checkpoint.specs if ".mlp.experts." in name)
        assert one.parts is not None
        assert one.parts.gathered == 0
        for projection in ("gate_up_proj", "down_proj"):
            assert torch.equal(one.expert_weight(1, projection), all_of_it.expert_weight(1, projection)[own])
            assert torch.equal(one.expert_bias(1, projection), all_of_it.expert_bias(1, projection)[own])
    assert held == of_experts
