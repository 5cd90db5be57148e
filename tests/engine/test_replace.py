"""An adapter that is replaced while its requests run: each answer is of one version, no old one stays."""

from __future__ import annotations

import gc
import random
import weakref

import pytest

from ossia.engine import Engine, Request, Session, Token, completion
from ossia.engine.engine import DecoderChoice
from ossia.errors import UserError
from ossia.model.lora import TARGETS, Lora
from ossia.model.transformer import Transformer
from tests.conftest import MakeTiny
from tests.engine.support import adapter, decoders, random_prompts
from tests.engine.test_engine import GREEDY, NARROW, assert_recomputed
from tests.engine.test_session import assert_same, finish
from tests.oracle.model_pairs import load


@pytest.mark.parametrize("decoder", decoders())
def test_an_answer_is_of_the_version_that_was_there_when_it_was_asked_for(
    tiny: MakeTiny, decoder: DecoderChoice
) -> None:
    base = load(tiny(NARROW), placement="bf16")
    old, new, other = (adapter(base, *TARGETS, seed=seed) for seed in (1, 2, 3))
    engine = Engine(base, adapters={"a": old, "b": other}, max_batch=3, decoder=decoder)
    session = engine.session()
    prompts = random_prompts((30, 70, 5, 9))  # the last one waits for a row

    def ask(name: str) -> list[int]:
        return [session.add(Request(prompt, GREEDY, 9, adapter=name)) for prompt in prompts]

    before, beside = ask("a"), session.add(Request(prompts[0], GREEDY, 9, adapter="b"))
    tokens: dict[int, list[Token]] = {}
    for _ in range(3):
        for token in session.step():
            tokens.setdefault(token.request, []).append(token)
    session.replace("a", new)
    assert session.is_replacing("a")
    after = ask("a")
    for number, more in finish(session).items():
        tokens.setdefault(number, []).extend(more)
    assert not session.is_replacing("a")
    for numbers, lora in ((before, old), (after, new), ([beside], other)):
        found = [completion(tokens[number]) for number in numbers]
        assert_recomputed(Transformer(base.weights, lora=lora), prompts[: len(found)], found)
    assert [token.id for token in tokens[before[0]]] != [token.id for token in tokens[after[0]]]
    assert session.cache.num_used == 0


@pytest.mark.parametrize("decoder", decoders())
def test_replacing_again_and_again_among_cancels_and_pauses_loses_no_block_and_keeps_no_old_version(
    tiny: MakeTiny, decoder: DecoderChoice
) -> None:
    base = load(tiny(NARROW), placement="bf16")
    loras = [adapter(base, *TARGETS, seed=seed) for seed in range(6)]
    kept = [weakref.ref(lora) for lora in loras]
    (prompt,) = random_prompts((20,))
    alone = [
        Engine(base, adapters={"a": lora}).generate([Request(prompt, GREEDY, 12, adapter="a")])[0] for lora in loras
    ]
    chance = random.Random(0)
    session = Engine(base, adapters={"a": loras[0]}, max_batch=4, prefill_tokens=7, decoder=decoder).session()
    version_of, cancelled, paused, tokens = {}, set(), [], dict[int, list[Token]]()
    for step in range(60):
        version = step // 10
        if step and step % 10 == 0:
            for _ in range(2):  # the first of them nobody has the time to use
                session.replace("a", loras[version])
        if not version_of or chance.random() < 0.5:
            version_of[session.add(Request(prompt, GREEDY, 12, adapter="a"))] = version
        known = chance.choice([*version_of])
        if chance.random() < 0.1:
            session.cancel(known)
            cancelled.add(known)
        if chance.random() < 0.2:
            session.pause(known)
            paused.append(known)
        if paused and chance.random() < 0.5:
            session.resume(paused.pop(0))
        for token in session.step():
            tokens.setdefault(token.request, []).append(token)
    for number in paused:
        session.resume(number)
    for number, more in finish(session).items():
        tokens.setdefault(number, []).extend(more)
    assert session.cache.num_used == 0
    finished = version_of.keys() - cancelled
    assert {version_of[number] for number in finished} == set(range(6))
    for number in finished:
        assert_same(completion(tokens[number]), alone[version_of[number]])
    assert len(session._models) < 8, "places of old versions are used again"
    loras.clear()
    gc.collect()
    assert [lora() is not None for lora in kept] == [False] * 5 + [True]


def test_a_cancelled_request_takes_its_version_with_it(tiny: MakeTiny) -> None:
    base = load(tiny(NARROW), placement="bf16")
    session = Engine(base, adapters={"a": adapter(base, "q_proj")}).session()
    (prompt,) = random_prompts((5,))
    running, paused = (session.add(Request(prompt, GREEDY, 50, adapter="a")) for _ in range(2))
    session.step()
    session.pause(paused)
    session.replace("a", None)
    session.cancel(running)
    assert session.is_replacing("a"), "the paused one goes on with it"
    session.cancel(paused)
    assert not session.is_replacing("a")


def test_a_name_that_is_not_there_cannot_be_replaced(tiny: MakeTiny) -> None:
    base = load(tiny(NARROW), placement="bf16")
    session: Session = Engine(base, adapters={"a": None}).session()
    lora: Lora = adapter(base, "q_proj")
    with pytest.raises(UserError, match="no adapter 'x' here to replace; there are: a"):
        session.replace("x", lora)
