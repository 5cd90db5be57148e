"""Cached, batched decoding against the training forward, token by token."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from ossia.engine import Completion, Engine, Request, Sampling, Token
from ossia.engine.cache import attend_cached
from ossia.engine.engine import DecoderChoice
from ossia.errors import UserError
from ossia.model.checkpoint import Checkpoint
from ossia.model.lora import TARGETS
from ossia.model.transformer import Transformer
from ossia.model.weights import Placement, Weights
from ossia.ops.loss import weighted_nll
from ossia.train.schedule import forward_backward
from tests.conftest import MakeTiny
from tests.engine.support import adapter, decoders, random_prompts, recomputed
from tests.oracle.model_pairs import CPU, documents, load, pack_of
from tests.shapes import SMALL

GREEDY = Sampling(temperature=0)
EDGE = (1, 126, 127, 128, 129, 300, 7)
NARROW = dataclasses.replace(SMALL, sliding_window=16, num_layers=2, layer_types=SMALL.layer_types[:2])


def greedy(model: Transformer, prompts: list[list[int]], num_tokens: int, **options: Any) -> list[Completion]:
    return Engine(model, **options).generate([Request(prompt, GREEDY, num_tokens) for prompt in prompts])


def assert_recomputed(model: Transformer, prompts: list[list[int]], found: list[Completion]) -> None:
    for prompt, completion in zip(prompts, found, strict=True):
        ids, logprobs = recomputed(model, prompt, len(completion.ids))
        assert completion.ids == ids, len(prompt)
        assert completion.logprobs == pytest.approx(logprobs, abs=1e-5), len(prompt)


@pytest.mark.parametrize("decoder", decoders())
@pytest.mark.parametrize("placement", ["bf16", "mmap"])
@pytest.mark.parametrize("layout", ["mxfp4", "bf16"])
def test_cached_decoding_equals_recomputation_on_both_sides_of_the_window(
    tiny: MakeTiny, placement: Placement, layout: str, decoder: DecoderChoice
) -> None:
    model = load(tiny(SMALL, layout), placement=placement)
    prompts = random_prompts(EDGE)
    assert_recomputed(model, prompts, greedy(model, prompts, 4, decoder=decoder))


def test_a_ring_that_wraps_several_times_and_a_row_that_outgrows_its_buffer(tiny: MakeTiny) -> None:
    model = load(tiny(NARROW), placement="bf16")
    prompts = random_prompts((3, 15, 250))
    assert_recomputed(model, prompts, greedy(model, prompts, 40))


@pytest.mark.parametrize("decoder", decoders())
@pytest.mark.parametrize("placement", ["bf16", "resident"])
def test_the_adapter_takes_part_in_prefill_and_decoding(
    tiny: MakeTiny, placement: Placement, decoder: DecoderChoice
) -> None:
    base = load(tiny(SMALL), placement=placement)
    prompts = random_prompts((5, 130))
    without = greedy(base, prompts, 8, decoder=decoder)
    adapted = load(tiny(SMALL), placement=placement, lora=adapter(base, *TARGETS))
    found = greedy(adapted, prompts, 8, decoder=decoder)
    assert_recomputed(adapted, prompts, found)
    assert [one.ids for one in found] != [one.ids for one in without]


@pytest.mark.parametrize("target", TARGETS)
def test_no_adapter_target_is_ignored_in_decoding(tiny: MakeTiny, target: str) -> None:
    """Only the first token comes from the prefill, so the others show what decoding computes."""
    base = load(tiny(NARROW), placement="bf16")
    (prompt,) = random_prompts((9,))
    adapted = load(tiny(NARROW), placement="bf16", lora=adapter(base, target))
    found = greedy(adapted, [prompt], 6)
    assert_recomputed(adapted, [prompt], found)
    forced = [prompt + found[0].ids[:n] for n in range(6)]
    plain = [greedy(base, [ids], 1)[0].logprobs[0] for ids in forced]
    assert all(abs(mine - theirs) > 1e-4 for mine, theirs in zip(found[0].logprobs, plain, strict=True))


def test_the_next_stream_samples_from_the_adapter_as_it_is_then(tiny: MakeTiny) -> None:
    base = load(tiny(NARROW), placement="bf16")
    model = load(tiny(NARROW), placement="bf16", lora=adapter(base, "down_proj", "q_proj"))
    engine, (prompt,) = Engine(model), random_prompts((9,))
    before = engine.generate([Request(prompt, GREEDY, 5)])
    for tensor in model.trainable.tensors.values():
        tensor.mul_(1.5)  # what an optimizer does: in place
    after = engine.generate([Request(prompt, GREEDY, 5)])
    assert before[0].logprobs != after[0].logprobs
    assert_recomputed(model, [prompt], after)


@pytest.mark.parametrize("placement", ["bf16", "mmap"])
def test_weights_that_are_all_trained_are_the_ones_that_answer(tiny: MakeTiny, placement: Placement) -> None:
    model = load(tiny(NARROW), placement=placement)
    model.train_all_weights()
    for number, tensor in enumerate(model.trainable.tensors.values()):
        tensor.mul_(1.0 + 0.02 * (number % 5 + 1))
    prompts = random_prompts((9, 30))
    assert_recomputed(model, prompts, greedy(model, prompts, 5))


def test_training_goes_on_after_generating(tiny: MakeTiny) -> None:
    base = load(tiny(NARROW))
    model = load(tiny(NARROW), lora=adapter(base, *TARGETS))
    pack = pack_of(documents(model.arch, (30,)))
    grads = []
    for _ in range(2):
        model.trainable.zero_grad()
        forward_backward(
            model, [pack], lambda logp, m, rows: weighted_nll(logp, pack.weights[rows], 9.0), recompute=True
        )
        grads.append([tensor.grad.clone() for tensor in model.trainable.tensors.values()])
        greedy(model, random_prompts((9,)), 3)
    assert all(torch.equal(first, second) for first, second in zip(*grads, strict=True))


def sampled(n: int, prompts: list[list[int]]) -> list[Request]:
    """Requests of all kinds."""
    kinds = (
        Sampling(seed=1),
        Sampling(0.7, top_p=0.9, seed=2),
        Sampling(top_k=5, seed=3),
        GREEDY,
        Sampling(min_p=0.1, seed=4),
    )
    return [Request(prompts[i % len(prompts)], kinds[i % len(kinds)], 3 + i % 7) for i in range(n)]


@pytest.mark.parametrize("max_batch", [1, 3, 16])
def test_what_a_request_gets_does_not_depend_on_its_batch_mates(tiny: MakeTiny, max_batch: int) -> None:
    """Eleven requests through three rows: some wait, join late, and move to other rows as others finish."""
    model = load(tiny(NARROW), placement="bf16")
    requests = sampled(11, random_prompts((1, 20, 5, 16)))
    alone = [Engine(model).generate([request])[0] for request in requests]
    together = Engine(model, max_batch=max_batch).generate(requests)
    for found, expected in zip(together, alone, strict=True):
        assert found.ids == expected.ids
        assert found.logprobs == pytest.approx(expected.logprobs, abs=1e-5)


def test_a_tight_cache_runs_fewer_at_once_with_the_same_result(tiny: MakeTiny) -> None:
    model = load(tiny(NARROW), placement="bf16")
    requests = sampled(5, random_prompts((4, 9, 3, 5, 70)))
    tight = Engine(model, cache_bytes=1)
    assert [one.ids for one in tight.generate(requests)] == [one.ids for one in Engine(model).generate(requests)]
    order = [token.request for token in tight.stream(requests)]
    assert order == sorted(order)


def test_a_stream_yields_what_generate_returns(tiny: MakeTiny) -> None:
    model = load(tiny(NARROW), placement="bf16")
    requests = sampled(6, random_prompts((4, 9)))
    tokens: list[list[Token]] = [[] for _ in requests]
    for token in Engine(model, max_batch=4).stream(requests):
        tokens[token.request].append(token)
    for mine, completion in zip(tokens, Engine(model, max_batch=4).generate(requests), strict=True):
        assert [token.id for token in mine] == completion.ids
        assert [token.finish for token in mine] == [None] * (len(mine) - 1) + [completion.finish]


def test_a_stop_ends_a_request_and_is_part_of_it(tiny: MakeTiny) -> None:
    model = load(tiny(NARROW), placement="bf16")
    (prompt,) = random_prompts((6,))
    (free,) = greedy(model, [prompt], 12)
    stop = free.ids[5]
    (stopped,) = Engine(model).generate([Request(prompt, GREEDY, 12, frozenset([stop]))])
    assert free.finish == "length"
    assert stopped.finish == "stop"
    assert stopped.ids == free.ids[: free.ids.index(stop) + 1]


def test_the_models_last_position_ends_a_request(tiny: MakeTiny) -> None:
    model = load(tiny(dataclasses.replace(NARROW, max_positions=20)), placement="bf16")
    prompts = random_prompts((18,))
    assert [(len(one.ids), one.finish) for one in greedy(model, prompts, 9)] == [(2, "length")]


@pytest.mark.parametrize(
    ("request_", "words"),
    [
        (Request([], GREEDY), "empty prompt"),
        (Request([1, 99999], GREEDY), "no token 99999"),
        (Request([1] * 20, GREEDY), "20 positions"),
        (Request([1], GREEDY, 0), "max_tokens is 0"),
    ],
)
def test_a_request_that_cannot_be_answered_is_refused(tiny: MakeTiny, request_: Request, words: str) -> None:
    model = load(tiny(dataclasses.replace(NARROW, max_positions=20)), placement="bf16")
    with pytest.raises(UserError, match=f"request 1.*{words}"):
        Engine(model).generate([Request([1], GREEDY), request_])


def test_output_that_is_not_finite_is_an_error(tiny: MakeTiny) -> None:
    base = load(tiny(NARROW), placement="bf16")
    model = load(tiny(NARROW), placement="bf16", lora=adapter(base, "o_proj"))
    next(iter(model.trainable.tensors.values())).fill_(torch.nan)
    with pytest.raises(UserError, match="not finite"):
        greedy(model, [[1, 2]], 2)


class CountingWeights(Weights):
    """Notes every expansion: (layer, expert), (layer, some of them), or (layer, None) for a whole layer."""

    def expert_weight(self, layer: int, projection: str, expert: Any = None, room: Any = None) -> torch.Tensor:
        self.asked.append((layer, expert))
        return super().expert_weight(layer, projection, expert, room)


@pytest.mark.parametrize("decoder", decoders())
def test_where_experts_are_packed_decoding_expands_only_the_chosen_or_none(
    tiny: MakeTiny, decoder: DecoderChoice
) -> None:
    weights = CountingWeights(Checkpoint.open(tiny(NARROW)), "resident", torch.float32, CPU)
    weights.asked = []
    engine = Engine(Transformer(weights), max_batch=1, decoder=decoder)
    engine.generate([Request([1, 2, 3], GREEDY, 4), Request([4, 5], GREEDY, 4)])
    expands, each_layers = decoder == "torch", 2 * NARROW.num_layers  # gate_up and down
    parts, single = ([one for _, one in weights.asked if isinstance(one, kind)] for kind in (slice, int))
    assert len(parts) + len(single) == len(weights.asked), "a whole layer"
    # both prompts, an expert at a time, each once for all of its tokens; three decode steps of each request
    assert len(parts) >= expands * 2 * each_layers
    assert len(parts) <= expands * (3 + 2) * each_layers * NARROW.experts_per_token
    assert len(single) == expands * 2 * 3 * each_layers * NARROW.experts_per_token


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("masked", [False, True])
def test_cached_attention_equals_its_definition(dtype: torch.dtype, masked: bool) -> None:
    q, keys, values = (torch.randn(shape).to(dtype) for shape in ((3, 6, 16), (3, 2, 9, 16), (3, 2, 9, 16)))
    sinks, mask = torch.randn(6).to(dtype), None
    if masked:
        mask = torch.zeros(3, 1, 1, 9, dtype=dtype)
        mask[0, ..., 4:] = mask[2, ..., 1:] = -torch.inf
    fast, plain = (attend_cached(q, keys, values, sinks, mask, backend) for backend in ("cpu", "reference"))
    tolerance = 1e-6 if dtype == torch.float32 else 2e-2
    assert float((fast - plain).abs().max()) <= tolerance
    assert float((attend_cached(q, keys, values, sinks + 3, mask, "cpu") - plain).abs().max()) > tolerance
