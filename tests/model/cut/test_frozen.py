"""Frozen weights that are cut: every part in its place, read from its own slices, each layer gathered when due."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from ossia.data.pack import Pack
from ossia.model.arch import Layout, alternating_layers
from ossia.model.checkpoint import Checkpoint
from ossia.model.cut.frozen import FrozenParts, Row
from ossia.model.cut.home import Home
from ossia.model.cut.ranks import part_of
from ossia.model.lora import Lora, LoraSpec
from ossia.model.transformer import Transformer
from ossia.model.weights import Weights
from ossia.train.schedule import forward_backward, forward_logprobs
from tests.conftest import MakeTiny
from tests.shapes import UNEQUAL

CPU = torch.device("cpu")
SPEC = LoraSpec({"q_proj": (2, 4.0), "gate_up_proj": (2, 4.0), "down_proj": (2, 4.0), "router": (2, 4.0)})
DEEP = dataclasses.replace(UNEQUAL, num_layers=4, layer_types=alternating_layers(4))


class Alone:
    """One rank that holds everything; what it gathers is counted by size."""

    rank, size = 0, 1

    def __init__(self) -> None:
        self.gathered = Counter[int]()

    def begin_gather(self, whole: Tensor, part: Tensor) -> Callable[[], None]:
        self.gathered[whole.nbytes] += 1
        whole.fill_(255)  # nobody may look before it has waited

        def wait() -> None:
            whole.copy_(part)

        return wait

    def begin_sum(self, part: Tensor, whole: Tensor) -> Callable[[], None]:
        raise AssertionError


def packs_of(*lengths: int) -> list[Pack]:
    generator = torch.Generator().manual_seed(0)
    found = []
    for length in lengths:
        ids = torch.randint(0, 200, (length,), generator=generator)
        weights = (torch.arange(length) % 2).float()
        found.append(Pack(ids, ids.roll(-1), weights, torch.tensor([0, length]), ("x",)))
    return found


@pytest.mark.parametrize("layout", ["mxfp4", "bf16"])
@pytest.mark.parametrize("size", [1, 2, 3, 7])
def test_the_ranks_parts_make_the_checkpoints_tensors(layout: Layout, size: int, tiny: MakeTiny) -> None:
    checkpoint = Checkpoint.open(tiny(UNEQUAL, weights=layout))
    prefix = "model.layers.1."
    specs = {n.removeprefix(prefix): spec for n, spec in checkpoint.specs.items() if n.startswith(prefix)}
    row = Row(specs, size)
    assert row.num_bytes % (16 * size) == 0
    each = row.num_bytes // size
    asked = [Counter[str]() for _ in range(size)]

    def tensor_of(rank: int) -> Callable[[str], Tensor]:
        def tensor(name: str) -> Tensor:
            asked[rank][name] += 1
            return checkpoint.tensor(prefix + name)

        return tensor

    whole = torch.cat([row.read(tensor_of(rank), rank * each, (rank + 1) * each) for rank in range(size)])
    for name, found in row.views(whole).items():
        assert torch.equal(found, checkpoint.tensor(prefix + name)), name
    assert set.union(*map(set, asked)) == set(specs)
    assert size < 3 or all(len(names) < len(specs) for names in asked)  # who has no part of a tensor doesn't open it


def test_parts_are_those_of_torch_chunk() -> None:
    for numel in (0, 1, 2, 5, 12, 13):
        for size in (1, 2, 3, 4, 5):
            pieces = [piece.tolist() for piece in torch.arange(numel).chunk(size)] if numel else []
            pieces += [[]] * (size - len(pieces))
            assert [torch.arange(numel)[part_of(numel, rank, size)].tolist() for rank in range(size)] == pieces


@pytest.mark.parametrize("qat", [False, True])
@pytest.mark.parametrize("layout", ["mxfp4", "bf16"])
def test_a_step_gathers_each_layer_once_a_direction_and_has_the_gradients_of_whole_weights(
    layout: Layout, qat: bool, tiny: MakeTiny
) -> None:
    checkpoint = Checkpoint.open(tiny(DEEP, weights=layout))
    packs, ranks = packs_of(9, 5, 12), Alone()
    found = {}
    for cut in (False, True):
        weights = Weights(checkpoint, "resident", torch.float32, CPU, ranks=ranks if cut else None)
        lora = Lora.fresh(checkpoint.arch, SPEC, seed=0, device=CPU)
        for tensor in lora.trainable.tensors.values():
            tensor.add_(0.01)
        model = Transformer(weights, lora=lora, qat=qat)
        loss = forward_backward(model, packs, lambda logp, m, rows: -logp.mean(), recompute=True)
        found[cut] = loss, {name: tensor.grad for name, tensor in lora.trainable.tensors.items()}
    assert found[True][0] == found[False][0]
    for name, grad in found[False][1].items():
        assert torch.equal(found[True][1][name], grad), name
    assert model.weights.parts is not None
    layers, head = 4, checkpoint.specs["lm_head.weight"].num_bytes
    # forward every layer, backward all but the last two, which are still there
    assert ranks.gathered == {row_bytes(model.weights.parts): 2 * layers - 2, head: 1}
    ranks.gathered.clear()
    forward_backward(model, packs, lambda logp, m, rows: -logp.mean(), recompute=True)
    assert ranks.gathered == {row_bytes(model.weights.parts): 2 * layers - 4, head: 1}  # the first two were there
    ranks.gathered.clear()
    forward_logprobs(model, packs)
    assert ranks.gathered == {row_bytes(model.weights.parts): layers - 2, head: 1}


def row_bytes(parts: FrozenParts) -> int:
    return parts._row.num_bytes


def test_who_has_no_pack_gathers_what_the_others_do(tiny: MakeTiny) -> None:
    checkpoint = Checkpoint.open(tiny(UNEQUAL))
    counts = []
    for packs in (packs_of(9, 5), []):
        ranks = Alone()
        weights = Weights(checkpoint, "resident", torch.float32, CPU, ranks=ranks)
        model = Transformer(weights, lora=Lora.fresh(checkpoint.arch, SPEC, seed=0, device=CPU))
        forward_backward(model, packs, lambda logp, m, rows: -logp.mean(), recompute=True)
        forward_logprobs(model, packs)
        counts.append(ranks.gathered)
    assert counts[0] == counts[1]


def test_a_rank_holds_its_parts_and_two_layers(tiny: MakeTiny) -> None:
    checkpoint = Checkpoint.open(tiny(DEEP))

    class OneOfFour(Alone):
        size = 4

    parts = FrozenParts(checkpoint, OneOfFour(), Home(CPU))
    embedding = checkpoint.specs["model.embed_tokens.weight"].num_bytes
    cut = checkpoint.num_bytes - embedding - checkpoint.specs["model.norm.weight"].num_bytes
    assert cut / 4 <= parts.num_bytes <= cut / 4 + 5 * 64  # four layers and the head, each padded
    assert sum(row.nbytes for row in parts._rows) == 2 * row_bytes(parts)


def test_parts_that_wait_in_the_machines_memory_are_sent_for_each_gather(tiny: MakeTiny) -> None:
    """A device without numbers stands for a GPU: what is on it takes no memory here."""
    device, sent = torch.device("meta"), list[tuple[str, str]]()

    class Fellow(Alone):
        def begin_gather(self, whole: Tensor, part: Tensor) -> Callable[[], None]:
            sent.append((whole.device.type, part.device.type))
            return lambda: None

    parts = FrozenParts(Checkpoint.open(tiny(DEEP)), Fellow(), Home(device, offload=True))
    assert {part.device.type for part in (*parts._parts, parts._head_part)} == {"cpu"}
    assert parts.tensor("model.layers.3.self_attn.sinks").device == device
    assert parts.tensor("lm_head.weight").device == device
    assert sent == [("meta", "meta")] * 3
    there = FrozenParts(Checkpoint.open(tiny(DEEP)), Fellow(), Home(device))
    assert {part.device.type for part in there._parts} == {"meta"}
