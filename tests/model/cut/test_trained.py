"""All weights trained, cut: the gradients of whole weights, each group gathered and summed when it is due."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from ossia.errors import RunError
from ossia.model.checkpoint import Checkpoint
from ossia.model.cut.ranks import part_of
from ossia.model.cut.trained import TrainedParts, group_of
from ossia.model.transformer import Transformer
from ossia.model.weights import Weights
from ossia.train.optim import AdamW
from ossia.train.ranks.gradients import agree_on_parts
from ossia.train.ranks.world import World as RealWorld
from ossia.train.schedule import forward_backward, forward_logprobs
from ossia.train.step import train_step
from tests.conftest import MakeTiny
from tests.model.cut.test_frozen import CPU, DEEP, packs_of
from tests.train.small_run import forkserver


class OneOf:
    """A rank whose fellows have nothing: their parts are zeros, and so are their gradients."""

    def __init__(self, rank: int, size: int) -> None:
        self.rank, self.size = rank, size
        self.gathered, self.summed = list[int](), list[int]()

    def begin_gather(self, whole: Tensor, part: Tensor) -> Callable[[], None]:
        self.gathered.append(part.numel())
        whole.fill_(float("nan") if whole.is_floating_point() else 255)  # nobody may look before it has waited

        def wait() -> None:
            whole.zero_().view(self.size, -1)[self.rank] = part

        return wait

    def begin_sum(self, part: Tensor, whole: Tensor) -> Callable[[], None]:
        self.summed.append(part.numel())
        part.fill_(float("nan"))

        def wait() -> None:
            part.copy_(whole.view(self.size, -1)[self.rank])

        return wait


def model_of(tiny: MakeTiny, ranks: OneOf | None, dtype: torch.dtype = torch.float32) -> Transformer:
    model = Transformer(Weights(Checkpoint.open(tiny(DEEP)), "mmap", dtype, CPU))
    model.train_all_weights(ranks)
    return model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_step_gathers_each_group_once_a_direction_and_has_the_gradients_of_whole_weights(
    dtype: torch.dtype, tiny: MakeTiny
) -> None:
    packs, ranks = packs_of(9, 5, 12), OneOf(0, 1)
    found = []
    for model in (model_of(tiny, None, dtype), model_of(tiny, ranks, dtype)):
        loss = forward_backward(model, packs, lambda logp, m, rows: -logp.mean(), recompute=True)
        grads = {name: tensor.grad for name, tensor in model.trainable.tensors.items()}
        found.append((loss, grads))
    assert found[0][0] == found[1][0]
    for name, grad in found[0][1].items():
        there = found[1][1][name]
        assert torch.allclose(there.view(grad.shape), grad, rtol=1e-6, atol=1e-9), name
    layers = 4
    each = Counter(ranks.gathered)
    assert sorted(each.values()) == [1, 1, 2 * layers - 1]  # embedding, head, and layers: the last one once
    assert sorted(Counter(ranks.summed).values()) == [1, 1, layers]
    ranks.gathered.clear()
    forward_logprobs(model, packs)
    assert sorted(Counter(ranks.gathered).values()) == [1, 1, layers]


def test_who_has_no_pack_gathers_and_sums_what_the_others_do(tiny: MakeTiny) -> None:
    asked = []
    for packs in (packs_of(9, 5), []):
        ranks = OneOf(1, 3)
        model = model_of(tiny, ranks)
        forward_logprobs(model, packs)
        forward_backward(model, packs, lambda logp, m, rows: -logp.mean(), recompute=True)
        asked.append((ranks.gathered, ranks.summed))
    assert asked[0] == asked[1]
    assert isinstance(model.trainable, TrainedParts)
    assert set(model.trainable.missing) == set(model.trainable.tensors)  # it had no gradient, and said so
    assert not any(bool(tensor.grad.any()) for tensor in model.trainable.tensors.values())


@pytest.mark.parametrize("size", [2, 3, 5])
def test_parts_are_the_masters_pieces_and_gather_to_the_whole(size: int, tiny: MakeTiny) -> None:
    whole = model_of(tiny, None).trainable.tensors
    parts = []
    for rank in range(size):
        model = model_of(tiny, OneOf(rank, size))
        assert isinstance(model.trainable, TrainedParts)
        for name, tensor in model.trainable.tensors.items():
            assert torch.equal(tensor, whole[name].flatten()[part_of(whole[name].numel(), rank, size)]), name
        assert model.trainable.num_parameters == sum(tensor.numel() for tensor in whole.values())
        parts.append(model.trainable)
    name = "model.layers.3.mlp.experts.gate_up_proj"  # what the ranks' parts add up to where others' are zeros
    assert torch.equal(sum(one.use(name, torch.float32).detach() for one in parts), whole[name])
    grads = {n: torch.randn(whole[n].shape) for n in whole if group_of(n) == "model.layers.3"}
    assert any(grad.numel() % size for grad in grads.values())  # the last piece is a shorter one
    for one in parts:
        for n, grad in grads.items():
            one.add_grad(n, grad.clone())
        one.sum_up(name)
        one.sum_up("model.embed_tokens.weight")  # the last of a step
    for n, grad in grads.items():
        assert torch.equal(torch.cat([one.tensors[n].grad for one in parts]), grad.flatten()), n


def test_a_gradient_that_is_not_finite_is_known_by_name_after_it_was_summed(tiny: MakeTiny) -> None:
    parts = model_of(tiny, OneOf(0, 2)).trainable
    assert isinstance(parts, TrainedParts)
    name = "model.layers.1.self_attn.q_proj.weight"
    for one in (name for name in parts.tensors if group_of(name) == "model.layers.1"):
        grad = torch.zeros(parts.shapes[one])
        if one == name:
            grad.flatten()[-1] = float("nan")  # in another rank's part
        parts.add_grad(one, grad)
    parts.sum_up(name)
    assert parts.not_finite() == [name]
    parts.zero_grad()
    assert parts.not_finite() == []


class Peer(OneOf):
    """Another rank had the gradients of all tensors but for those that are named."""

    def __init__(self, *missing: str) -> None:
        super().__init__(0, 2)
        self._missing = list(missing)

    def gather(self, value: Any) -> list[Any]:
        return [value, [0.25, None, self._missing]]


def test_a_tensor_without_a_gradient_on_any_rank_is_refused_and_one_that_another_has_is_not(tiny: MakeTiny) -> None:
    nowhere, there = "model.layers.1.self_attn.q_proj.weight", "model.layers.2.self_attn.sinks"
    ranks = Peer(nowhere)
    parts = model_of(tiny, ranks).trainable
    assert isinstance(parts, TrainedParts)
    for name, shape in parts.shapes.items():
        if name not in (nowhere, there):
            parts.add_grad(name, torch.ones(shape))
    groups = dict.fromkeys(map(group_of, parts.tensors))
    for name in reversed(groups):  # the embedding last, which waits for its sum
        parts.sum_up(next(one for one in parts.tensors if group_of(one) == name))
    assert parts.missing == [there, nowhere]
    assert agree_on_parts(cast(RealWorld, ranks), parts, 0.5, step=1) == 0.75
    assert [name for name, tensor in parts.tensors.items() if tensor.grad is None] == [nowhere]
    optimizer = AdamW(parts.tensors, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.0, shapes=parts.shapes)
    with pytest.raises(RunError, match=nowhere):
        optimizer.update(loss=0.75, lr=1e-3, clip=None)


class World(OneOf):
    """All ranks, which are one: what `train_step` asks of them."""

    def __init__(self) -> None:
        super().__init__(0, 1)

    def gather(self, value: Any) -> list[Any]:
        return [value]

    def total(self, value: float) -> float:
        return value


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_updates_are_those_of_whole_weights_decay_and_clipping_included(dtype: torch.dtype, tiny: MakeTiny) -> None:
    found = []
    for world in (None, World()):
        model = model_of(tiny, world, dtype)
        shapes = model.trainable.shapes if isinstance(model.trainable, TrainedParts) else None
        how = {"betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.5}
        optimizer = AdamW(model.trainable.tensors, **how, shapes=shapes)
        for _ in range(2):
            result = train_step(model, optimizer, packs_of(9, 5), lr=1e-3, clip=0.1, recompute=True, world=world)
        assert result.grad_norm > 0.1
        found.append((result, model.trainable.tensors))
    assert found[0][0].loss == pytest.approx(found[1][0].loss, rel=1e-6)
    assert found[0][0].grad_norm == pytest.approx(found[1][0].grad_norm, rel=1e-4)
    for name, whole in found[0][1].items():
        assert torch.allclose(whole.flatten(), found[1][1][name], rtol=1e-3, atol=1e-5), name


def be_rank(rank: int, size: int, store: Path, told: Any) -> None:
    dist.init_process_group("gloo", store=dist.FileStore(str(store), size), rank=rank, world_size=size)
    mesh = init_device_mesh("cpu", (size,))
    found = []
    for numel in (1, 7, 12):
        flat = torch.arange(numel, dtype=torch.float32)
        part = flat[part_of(numel, rank, size)].clone()
        theirs = distribute_tensor(flat, mesh, [Shard(0)]).to_local()
        ours = DTensor.from_local(part, mesh, [Shard(0)], shape=flat.shape, stride=(1,), run_check=False)
        found.append(torch.equal(part, theirs) and torch.equal(ours.full_tensor(), flat) and ours.shape == flat.shape)
    told.send(found)
    dist.destroy_process_group()


def test_parts_lie_as_dtensor_would_lay_them(tmp_path: Path) -> None:
    pipes = [forkserver().Pipe() for _ in range(3)]
    started = [
        forkserver().Process(target=be_rank, args=(rank, 3, tmp_path / "store", there))
        for rank, (_, there) in enumerate(pipes)
    ]
    for one in started:
        one.start()
    assert [here.recv() for here, _ in pipes] == [[True] * 3] * 3
    for one in started:
        one.join()
