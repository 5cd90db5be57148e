"""The layer-major step: equal to plain autograd, whatever the micro-batches, and one denominator for all."""

from __future__ import annotations

import dataclasses
import weakref
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from ossia.data.pack import Pack, pack_samples
from ossia.data.sample import Sample
from ossia.errors import RunError
from ossia.model.arch import SHAPES, Arch
from ossia.model.budget.work import experts_at_once, tokens_at_once
from ossia.model.checkpoint import Checkpoint
from ossia.model.lora import TARGETS, Lora, LoraSpec
from ossia.model.transformer import Context, Layer, Transformer
from ossia.model.weights import EMBEDDING, HEAD, Placement, Stream, Weights
from ossia.ops.attention.divided import Members
from ossia.ops.linear import Dropout
from ossia.ops.loss import weighted_nll
from ossia.train import schedule
from ossia.train.offload import Offload
from ossia.train.optim import AdamW
from ossia.train.schedule import Micro, forward_backward, logprobs
from ossia.train.step import evaluate_loss, train_step
from tests.conftest import MakeTiny
from tests.storages import peak_bytes

SHAPE = dataclasses.replace(
    SHAPES["demo"], hidden_size=64, intermediate_size=32, num_experts=8, head_dim=32, num_heads=4, num_kv_heads=2
)
ALL_TARGETS = LoraSpec(dict.fromkeys(TARGETS, (4, 8.0)))


def samples(lengths: tuple[int, ...], seed: int = 0) -> list[Sample]:
    rng = np.random.default_rng(seed)
    found = []
    for index, length in enumerate(lengths):
        weights = (rng.random(length) < 0.6) * rng.choice([0.5, 1.0, 3.0], length)
        weights[0] = 0
        ids, targets = (rng.integers(0, 300, length).astype(np.int32) for _ in range(2))
        found.append(Sample(ids, weights.astype(np.float32), targets, f"random:{index}", ()))
    return found


def model_of(
    tiny: MakeTiny,
    spec: LoraSpec | None = ALL_TARGETS,
    placement: Placement = "mmap",
    dtype: torch.dtype = torch.float32,
    shape: Arch = SHAPE,
) -> Transformer:
    """Seeded model; its adapter's B is not zero, so that every gradient has something to say."""
    model = Transformer(Weights(Checkpoint.open(tiny(shape)), placement, dtype, torch.device("cpu")))
    if spec is None:
        model.train_all_weights()
        return model
    lora = Lora.fresh(model.arch, spec, seed=0, device=torch.device("cpu"))
    generator = torch.Generator().manual_seed(1)
    for name, tensor in lora.trainable.tensors.items():
        if name.endswith("lora_B"):
            tensor.copy_(torch.randn(tensor.shape, generator=generator) * 0.02)
    model.use_adapter(lora)
    return model


def gradients(
    model: Transformer,
    packs: list[Pack],
    *,
    recompute: bool = True,
    offload: bool = False,
    dropout_seed: int | None = None,
    experts_at_once: int | None = None,
    tokens_at_once: int | None = None,
    keep_attention: bool = False,
    members: Members | None = None,
) -> tuple[float, dict[str, Tensor]]:
    total = float(sum(pack.weights.sum() for pack in packs))
    model.trainable.zero_grad()
    loss = forward_backward(
        model,
        packs,
        lambda logp, m, rows: weighted_nll(logp, packs[m].weights[rows], total),
        recompute=recompute,
        offload=offload,
        dropout_seed=dropout_seed,
        experts_at_once=experts_at_once,
        tokens_at_once=tokens_at_once,
        keep_attention=keep_attention,
        members=members,
    )
    tensors = model.trainable.tensors.items()
    if members is not None:  # of whom not everybody has part in everything
        return loss, {name: torch.zeros_like(t) if t.grad is None else t.grad.clone() for name, t in tensors}
    return loss, {name: tensor.grad.clone() for name, tensor in tensors}


def plain_autograd(model: Transformer, packs: list[Pack]) -> tuple[float, dict[str, Tensor]]:
    """All layers of one micro-batch in one graph, one backward for the whole step."""
    total = float(sum(pack.weights.sum() for pack in packs))
    model.trainable.zero_grad()
    loss = torch.zeros(())
    for pack in packs:
        micro = Micro.of(model, pack)
        x = model.embed(pack.ids)
        for index in range(model.arch.num_layers):
            x = model.layer_forward(model.fetch(index), x, micro.context)
        logp = logprobs(model, micro, x[micro.rows_R], model.head())
        loss = loss + weighted_nll(logp, pack.weights[micro.rows_R], total)
    loss.backward()
    return float(loss.detach()), {name: tensor.grad.clone() for name, tensor in model.trainable.tensors.items()}


def assert_close(
    found: tuple[float, dict[str, Tensor]], expected: tuple[float, dict[str, Tensor]], bound: float
) -> None:
    assert found[0] == pytest.approx(expected[0], rel=bound)
    for name, grad in expected[1].items():
        error = float((found[1][name] - grad).norm() / grad.norm())
        assert error <= bound, (name, error)


@pytest.mark.parametrize("spec", [ALL_TARGETS, None], ids=["adapter", "all weights"])
@pytest.mark.parametrize("recompute", [True, False])
def test_the_layer_major_gradient_equals_plain_autograd(tiny: MakeTiny, spec: LoraSpec | None, recompute: bool) -> None:
    packs = pack_samples(samples((100, 30, 141, 7, 60)), 150)
    assert len(packs) == 3
    expected = plain_autograd(model_of(tiny, spec), packs)
    assert_close(gradients(model_of(tiny, spec), packs, recompute=recompute), expected, 1e-5)


def test_one_pack_of_many_documents_equals_many_packs_of_one(tiny: MakeTiny) -> None:
    found = samples((40, 90, 3, 77, 30, 60, 12, 140))
    together = gradients(model_of(tiny), [Pack.from_samples(found)])
    apart = gradients(model_of(tiny), [Pack.from_samples([sample]) for sample in found])
    assert_close(apart, together, 1e-5)


@pytest.mark.parametrize("spec", [ALL_TARGETS, None], ids=["adapter", "all weights"])
def test_recomputing_or_keeping_activations_gives_the_same_bits(tiny: MakeTiny, spec: LoraSpec | None) -> None:
    packs = pack_samples(samples((100, 30, 141)), 150)
    for dtype in (torch.float32, torch.bfloat16):
        kept = gradients(model_of(tiny, spec, dtype=dtype), packs, recompute=False)
        again = gradients(model_of(tiny, spec, dtype=dtype), packs, recompute=True)
        assert kept[0] == again[0]
        for name, grad in kept[1].items():
            assert torch.equal(grad, again[1][name]), name


def test_kept_activations_keep_no_expanded_experts_but_the_last_layers(
    tiny: MakeTiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, packs = model_of(tiny), pack_samples(samples((40, 30)), 150)
    expand, expanded, alive = Weights.expert_weight, list[weakref.ref[Tensor]](), list[int]()

    def noted(self: Weights, *which: Any) -> Tensor:
        expanded.append(weakref.ref(weight := expand(self, *which)))
        return weight

    def loss(logp_R: Tensor, micro: int, rows_R: Tensor) -> Tensor:
        alive.append(sum(weight() is not None for weight in expanded))
        return -logp_R.sum()

    monkeypatch.setattr(Weights, "expert_weight", noted)
    forward_backward(model, packs, loss, recompute=False)
    assert model.arch.num_layers > 2
    assert alive == [2]
    assert len(expanded) == 4 * model.arch.num_layers - 2


@pytest.mark.parametrize("placement", ["mmap", "resident", "stream"])
@pytest.mark.parametrize("recompute", [True, False])
@pytest.mark.parametrize("at_once", [1, 3])
def test_experts_expanded_in_parts_give_the_bits_of_all_at_once(
    tiny: MakeTiny, placement: Placement, recompute: bool, at_once: int
) -> None:
    packs = pack_samples(samples((60, 61, 3)), 70)
    expected = gradients(model_of(tiny, placement="bf16"), packs, recompute=recompute)
    found = gradients(model_of(tiny, placement=placement), packs, recompute=recompute, experts_at_once=at_once)
    assert found[0] == expected[0]
    assert all(torch.equal(found[1][name], grad) for name, grad in expected[1].items())


@pytest.mark.parametrize("recompute", [True, False])
def test_experts_expanded_in_parts_take_the_memory_of_a_part(tiny: MakeTiny, recompute: bool) -> None:
    packs = pack_samples(samples((12,)), 70)
    wide = dataclasses.replace(SHAPE, intermediate_size=256)
    model = Transformer(Weights(Checkpoint.open(tiny(wide)), "mmap", torch.float32, torch.device("cpu")))
    model.use_adapter(Lora.fresh(wide, LoraSpec({"q_proj": (4, 8.0)}), seed=0, device=torch.device("cpu")))
    peaks = {}
    for at_once in (1, 2, 8):
        peaks[at_once] = peak_bytes(lambda n=at_once: gradients(model, packs, recompute=recompute, experts_at_once=n))
    one_expert = 2 * wide.intermediate_size * wide.hidden_size * 4  # of gate_up; down's is half of that
    # all: both matrices of the layer; a part: one of them, beside what expanding it takes
    saved = peaks[8] - peaks[1]
    assert saved >= (8 + 4 - 3) * one_expert
    assert peaks[1] < peaks[2] < peaks[8]


@pytest.mark.parametrize(
    ("placement", "spec"), [("mmap", ALL_TARGETS), ("stream", ALL_TARGETS), ("bf16", ALL_TARGETS), ("bf16", None)]
)
def test_inputs_that_wait_in_the_machines_memory_give_the_same_bits(
    tiny: MakeTiny, placement: Placement, spec: LoraSpec | None
) -> None:
    packs = pack_samples(samples((60, 61, 3)), 70)
    for dtype in (torch.float32, torch.bfloat16):
        expected = gradients(model_of(tiny, spec, placement, dtype), packs)
        found = gradients(model_of(tiny, spec, placement, dtype), packs, offload=True)
        assert found[0] == expected[0]
        assert all(torch.equal(found[1][name], grad) for name, grad in expected[1].items())


@pytest.mark.parametrize(
    ("placement", "spec"),
    [("mmap", ALL_TARGETS), ("bf16", ALL_TARGETS), ("bf16", LoraSpec({"down_proj": (4, 8.0)})), ("bf16", None)],
)
@pytest.mark.parametrize("tokens", [1, 16, 64])
def test_experts_take_the_tokens_of_a_pack_in_chunks_with_the_same_gradient(
    tiny: MakeTiny, placement: Placement, spec: LoraSpec | None, tokens: int
) -> None:
    packs = pack_samples(samples((60, 61, 3)), 70)
    expected = gradients(model_of(tiny, spec, placement), packs)
    assert_close(gradients(model_of(tiny, spec, placement), packs, tokens_at_once=tokens), expected, 1e-5)


def test_chunks_of_tokens_bound_what_lies_between_experts(tiny: MakeTiny) -> None:
    packs, model = pack_samples(samples((400, 400)), 800), model_of(tiny, LoraSpec({"q_proj": (4, 8.0)}), "bf16")
    whole, chunked = (peak_bytes(lambda n=n: gradients(model, packs, tokens_at_once=n)) for n in (None, 50))
    a = model.arch
    row = a.experts_per_token * (2 * a.hidden_size + 3 * a.intermediate_size) * 4
    assert whole - chunked >= 600 * row


def test_dropout_masks_of_chunks_differ_and_are_drawn_again_for_backward(tiny: MakeTiny) -> None:
    spec = LoraSpec({"gate_up_proj": (4, 8.0)}, dropout=0.5)
    packs = pack_samples(samples((64,)), 70)
    names: list[int] = []
    call = Dropout.__call__

    def noted(self: Dropout, x: Tensor, name: int) -> Tensor:
        names.append(name)
        return call(self, x, name)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Dropout, "__call__", noted)
        gradients(model_of(tiny, spec), packs, dropout_seed=3, tokens_at_once=16)
    of_layer_0 = [name for name in names if name % (1 << 20) == 5]
    assert of_layer_0 == [chunk << 20 | 5 for chunk in (0, 1, 2, 3)] * 2


def test_how_many_tokens_go_through_experts_together_follows_from_the_free_memory() -> None:
    arch = SHAPES["20b"]
    assert [tokens_at_once(arch, 2, free * 10**9) for free in (0, 3, 20, 60)] == [1024, 3072, 21504, 64512]


def test_inputs_go_away_and_come_back_once_and_one_layers_ahead_of_its_backward() -> None:
    offload, x = Offload(torch.device("cpu")), torch.randn(3, 4)
    away = offload.send([x, x + 1])
    kept = x.clone()
    x.zero_()  # its memory is another's by then
    offload.call_back(away)
    there = [one.back for one in away]
    found = offload.take(away)
    assert torch.equal(found[0], kept)
    assert torch.equal(found[1], kept + 1)
    assert all(one is other for one, other in zip(found, there, strict=True))
    assert away == []


@pytest.mark.parametrize("placement", ["resident", "bf16"])
@pytest.mark.parametrize("tokens_at_once", [None, 50])
def test_attention_that_is_kept_has_the_bits_of_attention_computed_again(
    tiny: MakeTiny, monkeypatch: pytest.MonkeyPatch, placement: Placement, tokens_at_once: int | None
) -> None:
    monkeypatch.setattr(schedule, "ATTENTION_KEPT_FROM", 60)
    calls = []
    kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu

    def counted(*given: object, **more: object) -> object:
        calls.append(given)
        return kernel(*given, **more)

    packs = pack_samples(samples((300, 61, 20)), 320)  # the last pack's documents aren't long
    model = model_of(tiny, placement=placement)
    expected = gradients(model, packs, tokens_at_once=tokens_at_once)
    monkeypatch.setattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu", counted, raising=False)
    gradients(model, packs, tokens_at_once=tokens_at_once)
    before = len(calls)
    found = gradients(model, packs, tokens_at_once=tokens_at_once, keep_attention=True)
    assert found[0] == expected[0]
    assert all(torch.equal(found[1][name], grad) for name, grad in expected[1].items())
    assert len(calls) - before < before  # the second count is of one step as well


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_offloading_on_a_gpu_has_the_bits_of_keeping_inputs_there(tiny: MakeTiny) -> None:
    packs, device = pack_samples(samples((60, 61, 20)), 70), torch.device("cuda")
    base = model_of(tiny)
    for placement in ("resident", "stream", "bf16"):
        model = Transformer(
            Weights(base.weights.checkpoint, placement, torch.bfloat16, device), lora=base.lora.to(device)
        )
        on_device = [pack.to(device) for pack in packs]
        expected = gradients(model, on_device)
        for _ in range(3):
            found = gradients(model, on_device, offload=True)
            assert found[0] == expected[0]
            assert all(torch.equal(found[1][name], grad) for name, grad in expected[1].items())


def test_a_gpu_expands_parts_of_the_experts_for_few_tokens_and_all_for_many() -> None:
    arch = SHAPES["20b"]
    assert [experts_at_once(arch, tokens) for tokens in (1, 2048, 4096, 16384)] == [1, 7, 14, 32]


def test_every_placement_gives_the_same_gradient(tiny: MakeTiny) -> None:
    packs = pack_samples(samples((60, 61)), 70)
    expected = gradients(model_of(tiny), packs)
    placements: tuple[Placement, ...] = ("resident", "stream", "bf16")
    base = model_of(tiny)
    for placement in placements:
        for on_host in (frozenset(), frozenset({EMBEDDING, HEAD})):
            weights = Weights(base.weights.checkpoint, placement, torch.float32, torch.device("cpu"), on_host)
            found = gradients(Transformer(weights, lora=base.lora), packs)
            assert found[0] == expected[0]
            assert all(torch.equal(found[1][name], grad) for name, grad in expected[1].items())


@pytest.mark.parametrize("recompute", [True, False])
def test_a_streamed_step_sends_each_layer_twice_but_those_where_it_turns_round(tiny: MakeTiny, recompute: bool) -> None:
    model = model_of(tiny, placement="stream")
    packs, num_layers = pack_samples(samples((60, 61, 20)), 70), model.arch.num_layers
    expected = gradients(model_of(tiny), packs, recompute=recompute)
    for step in range(3):
        before = model.weights._stream.sent
        found = gradients(model, packs, recompute=recompute)
        assert all(torch.equal(found[1][name], grad) for name, grad in expected[1].items())
        # up: all but the first two, which are there from the step before; down: all but the last two
        assert model.weights._stream.sent - before == 2 * (num_layers - 2) + (2 if step == 0 else 0)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("recompute", [True, False])
def test_a_streamed_step_on_a_gpu_has_the_bits_of_a_resident_one(tiny: MakeTiny, recompute: bool) -> None:
    packs, device = pack_samples(samples((60, 61, 20)), 70), torch.device("cuda")
    results = []
    for placement in ("resident", "stream", "stream"):
        base = model_of(tiny)
        weights = Weights(base.weights.checkpoint, placement, torch.bfloat16, device)
        model = Transformer(weights, lora=base.lora.to(device))
        on_device = [pack.to(device) for pack in packs]
        results.append([gradients(model, on_device, recompute=recompute) for _ in range(3)])
    for streamed in results[1:]:
        for mine, theirs in zip(streamed, results[0], strict=True):
            assert mine[0] == theirs[0]
            assert all(torch.equal(mine[1][name], grad) for name, grad in theirs[1].items())


def test_layers_asked_for_in_any_order_are_the_right_ones() -> None:
    host = [{"w": torch.full((3,), float(layer))} for layer in range(5)]
    stream = Stream(host, torch.device("cpu"))
    for layer in (4, 0, 0, 3, 2, 4, 1, 0, 1, 3):
        assert torch.equal(stream.layer(layer)["w"], host[layer]["w"])


def test_the_loss_counts_weights_over_one_denominator_and_targets_that_differ_from_ids(tiny: MakeTiny) -> None:
    found = samples((50, 20))
    model = model_of(tiny)
    total, weight = 0.0, 0.0
    for sample in found:
        logits = model.logits(Pack.from_samples([sample])).double().log_softmax(-1)
        for position in range(1, len(sample)):
            total -= float(sample.weights[position]) * float(logits[position - 1, sample.targets[position]])
            weight += float(sample.weights[position])
    packs = [Pack.from_samples([sample]) for sample in found]
    assert gradients(model, packs)[0] == pytest.approx(total / weight, rel=1e-5)
    evaluated = evaluate_loss(model, packs)
    assert evaluated.loss == pytest.approx(total / weight, rel=1e-5)
    assert evaluated.weight == pytest.approx(weight)
    assert evaluated.tokens == 70


def test_dropout_is_repeated_by_the_recomputation_and_changes_with_the_step(tiny: MakeTiny) -> None:
    spec = LoraSpec(dict.fromkeys(("q_proj", "o_proj", "gate_up_proj", "down_proj", "lm_head"), (4, 8.0)), dropout=0.3)
    packs = pack_samples(samples((60, 61)), 70)
    kept = gradients(model_of(tiny, spec), packs, recompute=False, dropout_seed=5)
    again = gradients(model_of(tiny, spec), packs, recompute=True, dropout_seed=5)
    assert kept[0] == again[0]
    assert all(torch.equal(grad, again[1][name]) for name, grad in kept[1].items())
    assert gradients(model_of(tiny, spec), packs, dropout_seed=6)[0] != kept[0]
    assert gradients(model_of(tiny, spec), packs, dropout_seed=None)[0] != kept[0]


def test_a_step_lowers_the_loss_on_its_own_batch_and_counts_its_tokens(tiny: MakeTiny) -> None:
    model = model_of(tiny)
    packs = pack_samples(samples((60, 61)), 70)
    expected = evaluate_loss(model, packs).loss
    optimizer = AdamW(model.trainable.tensors, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.0)
    results = [train_step(model, optimizer, packs, lr=3e-3, clip=1.0, recompute=True) for _ in range(12)]
    assert len(packs) == 2
    assert results[0].loss == pytest.approx(expected, rel=1e-6)
    assert results[0].tokens == 121
    assert results[0].trained == sum(pack.num_trained for pack in packs)
    assert results[0].weight == pytest.approx(float(sum(pack.weights.sum() for pack in packs)))
    assert results[-1].loss < results[0].loss - 0.2


def test_a_target_that_gets_no_gradient_stops_the_first_step(tiny: MakeTiny) -> None:
    model = model_of(tiny)
    model.trainable.tensors["model.layers.9.nowhere.lora_A"] = torch.zeros(2, 2)
    optimizer = AdamW(model.trainable.tensors, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.0)
    with pytest.raises(RunError, match=r"step 1: `model\.layers\.9\.nowhere\.lora_A` .* no gradient"):
        train_step(model, optimizer, pack_samples(samples((60,)), 70), lr=1e-3, clip=1.0, recompute=True)


def test_a_loss_that_is_not_finite_stops_before_the_update(tiny: MakeTiny) -> None:
    model = model_of(tiny)
    before = {name: tensor.clone() for name, tensor in model.trainable.tensors.items()}
    model.trainable.tensors["lm_head.lora_B"].fill_(torch.inf)
    before["lm_head.lora_B"].fill_(torch.inf)
    optimizer = AdamW(model.trainable.tensors, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.0)
    with pytest.raises(RunError, match="step 1: the loss is nan"):
        train_step(model, optimizer, pack_samples(samples((60,)), 70), lr=1e-3, clip=1.0, recompute=True)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.trainable.tensors.items())


@pytest.mark.parametrize(("placement", "ready"), [("bf16", True), ("mmap", False)])
def test_where_no_layer_has_to_be_made_ready_one_pack_goes_all_the_way_before_the_next(
    tiny: MakeTiny, placement: Placement, ready: bool
) -> None:
    packs = pack_samples(samples((100, 30, 141, 7, 60)), 150)
    model, seen = model_of(tiny, placement=placement), []
    forward = model.layer_forward

    def noting(layer: Layer, x: Tensor, context: Context, **others: Any) -> Tensor:
        seen.append((layer.index, len(x)))
        return forward(layer, x, context, **others)

    model.layer_forward = noting
    found = gradients(model, packs, recompute=False)
    layers, lengths = range(model.arch.num_layers), [pack.num_tokens for pack in packs]
    packwise, layerwise = [(i, n) for n in lengths for i in layers], [(i, n) for i in layers for n in lengths]
    assert seen == (packwise if ready else layerwise)
    expected = gradients(model_of(tiny, placement="resident"), packs, recompute=False)
    assert found[0] == expected[0]
    assert all(torch.equal(found[1][name], grad) for name, grad in expected[1].items())
