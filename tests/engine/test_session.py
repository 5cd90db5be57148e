"""Requests that come, go, wait and share: the same answers as alone, and no block lost."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch

from ossia.engine import Completion, Engine, Request, Sampling, Session, Token, completion
from ossia.engine.engine import DecoderChoice
from ossia.engine.native import NativeDecoder
from ossia.errors import UserError
from ossia.harmony.vocab import Vocabulary
from ossia.model.lora import TARGETS
from ossia.model.transformer import Transformer
from ossia.ops.moe import Route, route
from ossia.train.optim import AdamW
from tests.conftest import MakeTiny
from tests.engine.support import adapter, decoders, random_prompts, recomputed, sample_of
from tests.engine.test_engine import GREEDY, NARROW, assert_recomputed, sampled
from tests.oracle.model_pairs import load, pack_of


def finish(session: Session) -> dict[int, list[Token]]:
    """All tokens until nothing is left to do, by request."""
    tokens: dict[int, list[Token]] = {}
    while not session.idle:
        for token in session.step():
            tokens.setdefault(token.request, []).append(token)
    return tokens


def assert_same(found: Completion, expected: Completion) -> None:
    assert found.ids == expected.ids
    assert found.finish == expected.finish
    assert found.logprobs == pytest.approx(expected.logprobs, abs=1e-5)


@pytest.mark.parametrize("prefill_tokens", [5, 16, 17, 64, 70])
def test_a_prompt_read_in_parts_is_the_prompt_read_at_once(tiny: MakeTiny, prefill_tokens: int) -> None:
    """Parts end inside, at and past the window of 16 and the block of 64, and other requests decode in between."""
    model = load(tiny(NARROW), placement="bf16", lora=adapter(load(tiny(NARROW)), *TARGETS))
    requests = [Request(prompt, GREEDY, 6) for prompt in random_prompts((3, 150, 40, 64, 16))]
    whole = Engine(model).generate(requests)
    parts = Engine(model, prefill_tokens=prefill_tokens).generate(requests)
    for found, expected in zip(parts, whole, strict=True):
        assert_same(found, expected)


def test_what_runs_goes_on_while_a_long_prompt_is_read(tiny: MakeTiny) -> None:
    model = load(tiny(NARROW), placement="bf16")
    session = Engine(model, prefill_tokens=10).session()
    short, long = random_prompts((4, 95))
    first = session.add(Request(short, GREEDY, 50))
    session.step()
    second = session.add(Request(long, GREEDY, 5))
    waited = 0
    while all(token.request == first for token in session.step()):
        waited += 1
    assert waited == 9  # ten parts of ten tokens, the first answer with the last
    assert len(finish(session)[second]) == 3  # its first two came in the last step above


def count_prompt_tokens(monkeypatch: pytest.MonkeyPatch, num_layers: int) -> list[int]:
    """A list that grows by the tokens that go through all layers in prefills, whichever way they go."""
    seen: list[int] = []
    forward, read = Transformer.layer_forward, NativeDecoder.read

    def counted_forward(self, layer, x_TD, context, **options):
        seen.append(len(x_TD) * (layer.index == num_layers - 1))
        return forward(self, layer, x_TD, context, **options)

    def counted_read(self, x_TD, *rest):
        seen.append(len(x_TD))
        return read(self, x_TD, *rest)

    monkeypatch.setattr(Transformer, "layer_forward", counted_forward)
    monkeypatch.setattr(NativeDecoder, "read", counted_read)
    return seen


@pytest.mark.parametrize("decoder", decoders())
@pytest.mark.parametrize("max_batch", [16, 3])
def test_samples_of_one_prompt_read_it_once_and_share_its_blocks(
    tiny: MakeTiny, max_batch: int, decoder: DecoderChoice, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load(tiny(NARROW), placement="bf16")
    seen = count_prompt_tokens(monkeypatch, NARROW.num_layers)
    (prompt,) = random_prompts((200,))
    requests = [Request(prompt, Sampling(seed=seed), 20) for seed in range(8)]
    session = Engine(model, max_batch=max_batch, decoder=decoder).session()
    for request in requests:
        session.add(request)
    first = session.step()
    assert sum(seen) == 200
    full = next(lane for lane in session.cache.lanes if lane.window is None)
    rows = min(8, max_batch)
    kept = 1 if max_batch < 8 else 0  # the prompt itself, for those who wait
    assert full.num_used == 3 + rows + kept  # three whole blocks for all, the fourth is each one's own
    found = finish(session)
    for token in reversed(first):
        found[token.request].insert(0, token)
    assert sum(seen) == 200
    assert session.cache.num_used == 0
    for number, request in enumerate(requests):
        assert_same(completion(found[number]), Engine(model, decoder=decoder).generate([request])[0])


def test_penalties_follow_a_request_through_its_mates_coming_and_going_and_its_own_pause(tiny: MakeTiny) -> None:
    model = load(tiny(NARROW), placement="bf16")
    session = Engine(model, max_batch=4).session()
    prompt, *others = random_prompts((9, 4, 30, 12))
    rules = Sampling(0, frequency_penalty=1.5, presence_penalty=0.5)
    number = session.add(Request(prompt, rules, 40))
    found: list[Token] = []
    for step in range(60):
        if step in (4, 9, 17):
            session.add(Request(others.pop(), GREEDY, 6))
        if step == 12:
            session.pause(number)
        if step == 15:
            session.resume(number)
        found += [token for token in session.step() if token.request == number]
    ids, logprobs = recomputed(model, prompt, 40, frequency=1.5, presence=0.5)
    assert [token.id for token in found] == ids
    assert [token.logprob for token in found] == pytest.approx(logprobs, abs=1e-5)
    assert len(set(ids)) > len(set(recomputed(model, prompt, 40)[0]))


def test_several_adapters_answer_in_one_batch_as_each_alone(tiny: MakeTiny) -> None:
    base = load(tiny(NARROW), placement="bf16")
    loras = {"a": adapter(base, *TARGETS, seed=1), "b": adapter(base, "down_proj", "q_proj", seed=2), "plain": None}
    own = adapter(base, "gate_up_proj", "lm_head", seed=3)
    model = Transformer(base.weights, lora=own)
    names = ["a", None, "b", "plain", "a", "b", None]
    prompts = random_prompts((5, 9, 20, 20, 33, 1, 64))
    together = Engine(model, adapters=loras).generate(
        [Request(prompt, GREEDY, 8, adapter=name) for prompt, name in zip(prompts, names, strict=True)]
    )
    for prompt, name, found in zip(prompts, names, together, strict=True):
        alone = Transformer(base.weights, lora=own if name is None else loras[name])
        assert_recomputed(alone, [prompt], [found])


def test_equal_prompts_of_different_adapters_share_nothing(tiny: MakeTiny) -> None:
    base = load(tiny(NARROW), placement="bf16")
    engine = Engine(base, adapters={"a": adapter(base, "o_proj", "down_proj")})
    (prompt,) = random_prompts((70,))
    plain, adapted = engine.generate([Request(prompt, GREEDY, 6), Request(prompt, GREEDY, 6, adapter="a")])
    assert plain.logprobs != pytest.approx(adapted.logprobs, abs=1e-3)


def test_the_next_token_comes_from_the_adapter_as_it_is_after_an_optimizer_step(tiny: MakeTiny) -> None:
    base = load(tiny(NARROW), placement="bf16")
    model = load(tiny(NARROW), placement="bf16", lora=adapter(base, *TARGETS))
    prompts = random_prompts((9, 30))
    session = Engine(model).session()
    numbers = [session.add(Request(prompt, GREEDY, 8)) for prompt in prompts]
    before = [token for _ in range(2) for token in session.step()]
    optimizer = torch.optim.AdamW(list(model.trainable.tensors.values()), lr=0.05, fused=True)
    for tensor in model.trainable.tensors.values():
        tensor.grad = torch.randn(tensor.shape, generator=torch.Generator().manual_seed(0))
    optimizer.step()
    (after, *_) = [token for token in session.step() if token.request == numbers[0]]
    first = [token.id for token in before if token.request == numbers[0]]
    logits = model.logits(pack_of([sample_of(prompts[0] + first)]))[-1].float()
    # keys and values of the tokens before are the old policy's, so the two only come close
    stale = Transformer(model.weights, lora=adapter(base, *TARGETS))
    old = stale.logits(pack_of([sample_of(prompts[0] + first)]))[-1].float().log_softmax(-1)
    assert abs(after.logprob - float(logits.log_softmax(-1)[after.id])) < abs(after.logprob - float(old[after.id]))


def test_a_request_after_an_update_of_the_trainer_is_of_the_new_policy_exactly(tiny: MakeTiny) -> None:
    base = load(tiny(NARROW), placement="bf16")
    model = load(tiny(NARROW), placement="bf16", lora=adapter(base, *TARGETS))
    (prompt,) = random_prompts((30,))
    session = Engine(model).session()
    request = Request(prompt, GREEDY, 6)

    def answer() -> list[Token]:
        number = session.add(request)
        tokens: list[Token] = []
        while not session.idle:
            tokens += [token for token in session.step() if token.request == number]
        return tokens

    answer()
    optimizer = AdamW(model.trainable.tensors, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.0)
    for tensor in model.trainable.tensors.values():
        tensor.grad = torch.randn(tensor.shape, generator=torch.Generator().manual_seed(0))
    optimizer.update(loss=1.0, lr=0.02, clip=None)
    tokens = answer()
    ids = [*prompt, *(token.id for token in tokens)]
    logprobs = model.logits(pack_of([sample_of(ids)])).float().log_softmax(-1)
    wanted = [float(logprobs[len(prompt) - 1 + i, token.id]) for i, token in enumerate(tokens)]
    assert [token.logprob for token in tokens] == pytest.approx(wanted, abs=1e-5)


def test_random_cancels_pauses_and_resumes_lose_no_block_and_change_no_answer(tiny: MakeTiny) -> None:
    model = load(tiny(NARROW), placement="bf16")
    prompts = random_prompts((1, 20, 5, 16, 70, 130))
    requests = sampled(40, prompts)
    alone = [Engine(model).generate([request])[0] for request in requests]
    chance = random.Random(0)
    session = Engine(model, max_batch=6, prefill_tokens=40).session()
    tokens: dict[int, list[Token]] = {}
    cancelled, paused, todo = set(), [], list(enumerate(requests))
    while todo or paused or not session.idle:
        if todo and chance.random() < 0.6:
            number, request = todo.pop(0)
            assert session.add(request) == number
        known = chance.randrange(len(requests) - len(todo)) if len(todo) < len(requests) else None
        if known is not None and chance.random() < 0.1:
            session.cancel(known)
            cancelled.add(known)
        if known is not None and chance.random() < 0.2:
            session.pause(known)
            paused.append(known)
        if paused and chance.random() < 0.5:
            session.resume(paused.pop(0))
        for token in session.step():
            assert token.request not in cancelled
            tokens.setdefault(token.request, []).append(token)
    assert session.cache.num_used == 0
    assert len(cancelled) > 3
    finished = {number for number, mine in tokens.items() if mine[-1].finish is not None}
    assert finished | cancelled == set(range(len(requests)))
    for number in finished:
        assert_same(completion(tokens[number]), alone[number])


def test_a_cache_too_small_for_all_lets_the_youngest_wait_and_changes_no_answer(tiny: MakeTiny) -> None:
    model = load(tiny(NARROW), placement="bf16")
    requests = [Request(prompt, Sampling(seed=i), 90) for i, prompt in enumerate(random_prompts((60, 50, 62, 40)))]
    alone = [Engine(model).generate([request])[0] for request in requests]
    lanes = Engine(model).session().cache.lanes
    room = sum(lane.block_bytes * (4 if lane.window else 6) for lane in lanes)
    session = Engine(model, cache_bytes=room).session()
    numbers = [session.add(request) for request in requests]
    most, tokens, waited = 0, {number: [] for number in numbers}, False
    while not session.idle:
        for token in session.step():
            tokens[token.request].append(token)
        most = max(most, session.cache.used_bytes)
        waited |= session.num_running > 0 and session.num_waiting > 0 and len(tokens[3]) > 0
    assert waited
    assert most <= room
    assert session.cache.num_used == 0
    for number, expected in zip(numbers, alone, strict=True):
        assert_same(completion(tokens[number]), expected)


def test_a_cancelled_requests_prompt_is_let_go_while_it_waits(tiny: MakeTiny) -> None:
    model = load(tiny(NARROW), placement="bf16")
    session = Engine(model, max_batch=1, prefill_tokens=8).session()
    prompts = random_prompts((6, 60))
    first, second = (session.add(Request(prompt, GREEDY, 4)) for prompt in prompts)
    for _ in range(6):
        session.step()
    assert session.num_waiting == 1  # half read
    session.cancel(second)
    session.cancel(first)
    session.cancel(99)
    assert session.idle
    assert session.cache.num_used == 0


def test_the_chosen_experts_are_recorded_for_prompt_and_answer(tiny: MakeTiny, monkeypatch: pytest.MonkeyPatch) -> None:
    model = load(tiny(NARROW), placement="bf16")
    (prompt,) = random_prompts((40,))
    recording, plain = Engine(model, prefill_tokens=16).generate(
        [Request(prompt, GREEDY, 5, routes=True), Request(prompt[:7], GREEDY, 5)]
    )
    assert plain.routes is None
    found = recording.routes
    assert found is not None
    assert found.shape == (44, NARROW.num_layers, NARROW.experts_per_token)
    seen: list[np.ndarray] = []

    def noting(*arguments: torch.Tensor) -> Route:
        routing = route(*arguments)
        seen.append(routing.experts_TK.numpy())
        return routing

    monkeypatch.setattr("ossia.model.transformer.route", noting)
    model.logits(pack_of([sample_of(prompt + recording.ids[:-1])]))
    last = NARROW.num_layers - 1
    for layer, experts_TK in enumerate(seen):
        start = 0 if layer < last else 39
        assert (found[start:, layer] == experts_TK[start:]).all()
    skipped = np.setdiff1d(np.arange(39), [15, 31])  # the ends of parts are computed
    assert (found[skipped, last] == -1).all()


def test_a_prompt_that_was_read_without_recording_is_read_again_for_who_wants_its_routes(tiny: MakeTiny) -> None:
    model = load(tiny(NARROW), placement="bf16")
    (prompt,) = random_prompts((9,))
    session = Engine(model, max_batch=1).session()
    for _ in range(2):  # the second waits, so the prompt is kept
        session.add(Request(prompt, GREEDY, 3))
    session.step()
    recording = session.add(Request(prompt, GREEDY, 3, routes=True))
    tokens = [token for _ in range(12) for token in session.step()]
    assert session.idle
    assert session.cache.num_used == 0
    routes = next(token.routes for token in tokens if token.request == recording and token.finish)
    assert routes is not None
    assert len(routes) == 11


def test_a_bias_on_a_logit_decides_and_leaves_the_logprob_alone(tiny: MakeTiny) -> None:
    model = load(tiny(NARROW), placement="bf16")
    (prompt,) = random_prompts((9,))
    biased = Request(prompt, Sampling(0, logit_bias={77: 1000}), 4)
    banned = Request(prompt, Sampling(0, logit_bias={77: -1000.0}), 4)
    plain = Request(prompt, GREEDY, 1)
    found, without, free = Engine(model).generate([biased, banned, plain])
    assert found.ids == [77] * 4
    logits = model.logits(pack_of([sample_of(prompt)]))[-1].float()
    assert found.logprobs[0] == pytest.approx(float(logits.log_softmax(-1)[77]), abs=1e-5)
    assert without.ids[0] == free.ids[0] != 77


def test_the_likeliest_tokens_come_with_their_logprobs(tiny: MakeTiny) -> None:
    model = load(tiny(NARROW), placement="bf16")
    (prompt,) = random_prompts((9,))
    three, none = Engine(model).generate([Request(prompt, GREEDY, 3, top_logprobs=3), Request(prompt, GREEDY, 3)])
    assert none.top == []
    expected = model.logits(pack_of([sample_of(prompt)]))[-1].float().log_softmax(-1).topk(3)
    assert [number for number, _ in three.top[0]] == expected.indices.tolist()
    assert [logprob for _, logprob in three.top[0]] == pytest.approx(expected.values.tolist(), abs=1e-5)
    assert [top[0][0] for top in three.top] == three.ids
    assert [top[0][1] for top in three.top] == pytest.approx(three.logprobs, abs=1e-5)


def test_in_bf16_too_a_token_has_one_logprob_wherever_it_is_told(tiny: MakeTiny) -> None:
    model = load(tiny(NARROW), placement="bf16", dtype=torch.bfloat16)
    (prompt,) = random_prompts((9,))
    (found,) = Engine(model).generate([Request(prompt, GREEDY, 8, top_logprobs=3)])
    assert [dict(top)[number] for top, number in zip(found.top, found.ids, strict=True)] == found.logprobs
    (scored,) = Engine(model).session().score([[*prompt, *found.ids]], top=250)
    assert all(dict(token.top)[token.id] == token.logprob for token in scored[1:] if token.id in dict(token.top))


def test_a_stop_text_ends_a_request_wherever_its_tokens_begin(tiny: MakeTiny, small_tokenizer) -> None:
    model, vocab = load(tiny(NARROW), placement="bf16"), Vocabulary.from_file(small_tokenizer)
    (prompt,) = random_prompts((6,))
    engine = Engine(model, vocab=vocab)
    (free,) = engine.generate([Request(prompt, GREEDY, 12)])
    said = [vocab.decode_bytes([number]) for number in free.ids]
    inside = next(i for i in range(3, 11) if said[i].isascii() and said[i + 1].isascii() and said[i] and said[i + 1])
    stop = (said[inside][-1:] + said[inside + 1][:1]).decode()
    ends = next(i for i in range(12) if stop.encode() in b"".join(said[: i + 1]))
    (stopped,) = engine.generate([Request(prompt, GREEDY, 12, stop_texts=("never said", stop))])
    assert stopped.finish == "stop"
    assert stopped.ids == free.ids[: ends + 1]


@pytest.mark.parametrize("decoder", decoders())
def test_a_cache_of_8_bits_takes_half_the_bytes_and_stays_close(tiny: MakeTiny, decoder: DecoderChoice) -> None:
    model = load(tiny(NARROW), placement="bf16", dtype=torch.bfloat16)
    requests = [Request(prompt, GREEDY, 30) for prompt in random_prompts((5, 70, 130))]
    exact = Engine(model).generate(requests)
    close = Engine(model, cache_dtype="int8", prefill_tokens=50, decoder=decoder).generate(requests)
    for mine, theirs in zip(close, exact, strict=True):
        first = next((i for i in range(30) if mine.ids[i] != theirs.ids[i]), 30)
        assert first >= 2  # a random model's likeliest tokens are near each other
        assert mine.logprobs[:first] == pytest.approx(theirs.logprobs[:first], abs=0.15)
        assert mine.logprobs != theirs.logprobs
    (eight, sixteen) = (Engine(model, cache_dtype=kind).session().cache.lanes for kind in ("int8", "model"))
    for small, large in zip(eight, sixteen, strict=True):
        assert small.block_bytes / large.block_bytes == (NARROW.head_dim + 4) / (2 * NARROW.head_dim)


class Only:
    """A constraint that allows these tokens, in turn."""

    def __init__(self, num_tokens: int, *tokens: int) -> None:
        self.num_tokens, self.tokens, self.pushed = num_tokens, list(tokens), []

    def mask(self) -> torch.Tensor | None:
        if len(self.pushed) >= len(self.tokens):
            return None
        return torch.arange(self.num_tokens) == self.tokens[len(self.pushed)]

    def push(self, token: int) -> None:
        self.pushed.append(token)

    def copy(self) -> Only:
        other = Only(self.num_tokens, *self.tokens)
        other.pushed = list(self.pushed)
        return other


def test_a_constraint_decides_what_is_drawn_and_each_request_has_its_own(tiny: MakeTiny) -> None:
    model = load(tiny(NARROW), placement="bf16")
    (prompt,) = random_prompts((6,))
    rule = Only(model.arch.vocab_size, 5, 9, 200)
    found = Engine(model).generate(
        [
            Request(prompt, Sampling(seed=1), 5, constraint=rule),
            Request(prompt, GREEDY, 5),
            Request(prompt, Sampling(seed=2), 5, constraint=rule),
        ]
    )
    assert found[0].ids[:3] == found[2].ids[:3] == [5, 9, 200]
    assert found[1].ids == recomputed(model, prompt, 5)[0]
    assert rule.pushed == []


class Stuck(Only):
    """A constraint that can't go on: after a token, or when it is asked for the first time."""

    def __init__(self, num_tokens: int, *tokens: int) -> None:
        super().__init__(num_tokens, *tokens)
        self.late = bool(tokens)

    def mask(self) -> torch.Tensor | None:
        if not self.late:
            raise UserError("no way out")
        return super().mask()

    def push(self, token: int) -> None:
        raise UserError("no way on")

    def copy(self) -> Stuck:
        return Stuck(self.num_tokens, *self.tokens)


@pytest.mark.parametrize(("tokens", "words"), [((), "no way out"), ((5,), "no way on")])
def test_a_constraint_that_fails_ends_its_own_request_and_no_other(
    tiny: MakeTiny, tokens: tuple[int, ...], words: str
) -> None:
    model = load(tiny(NARROW), placement="bf16")
    (prompt,) = random_prompts((6,))
    engine = Engine(model)
    session = engine.session()
    session.add(Request(prompt, GREEDY, 5, constraint=Stuck(model.arch.vocab_size, *tokens)))
    session.add(Request(prompt, GREEDY, 5))
    found = finish(session)
    assert [(token.finish, token.error) for token in found[0]] == [("error", words)]
    assert [token.id for token in found[1]] == recomputed(model, prompt, 5)[0]
    assert session.cache.num_used == 0
    with pytest.raises(UserError, match=f"request 0: {words}"):
        engine.generate([Request(prompt, GREEDY, 5, constraint=Stuck(model.arch.vocab_size, *tokens))])


@pytest.mark.parametrize(
    ("request_", "words"),
    [
        (Request([1], adapter="b"), "no adapter 'b' here; there are: a"),
        (Request([1], stop_texts=("x",)), "stop texts need"),
        (Request([1], top_logprobs=-1), "top_logprobs is -1"),
        (Request([1], Sampling(logit_bias={99999: 1.0})), "no token 99999"),
    ],
)
def test_what_can_never_be_answered_is_refused_when_it_is_added(tiny: MakeTiny, request_: Request, words: str) -> None:
    session = Engine(load(tiny(NARROW)), adapters={"a": None}).session()
    with pytest.raises(UserError, match=words):
        session.add(request_)
    assert session.idle


def test_an_empty_stop_text_is_refused(tiny: MakeTiny, small_tokenizer) -> None:
    session = Engine(load(tiny(NARROW)), vocab=Vocabulary.from_file(small_tokenizer)).session()
    with pytest.raises(UserError, match="empty stop text"):
        session.add(Request([1], stop_texts=("a", "")))


def test_a_decoder_that_was_asked_for_and_cannot_be_used_is_refused(tiny: MakeTiny) -> None:
    model = load(tiny(NARROW), dtype=torch.float16, placement="bf16")
    with pytest.raises(UserError, match="native can't be used here: for float32 and bfloat16"):
        Engine(model, decoder="native").session()
