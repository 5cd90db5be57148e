"""Prompts that are part of the answer, with their logprobs: how evaluation harnesses score texts."""

from __future__ import annotations

import time
from collections.abc import Generator
from itertools import pairwise
from typing import Any

import httpx2
import pytest
import torch
from openai import BadRequestError, InternalServerError

from ossia.batch import score
from ossia.engine import Session
from ossia.model.transformer import Transformer
from tests.web.conftest import Live, Model, serving, wait_until

SCORE: dict[str, Any] = {"echo": True, "max_tokens": 0, "logprobs": 1}
CERTAIN: dict[str, Any] = {"temperature": 0, "max_tokens": 8}


@pytest.mark.parametrize("name", ["base", "talker"])
def test_a_prompt_is_scored_as_training_scores_it(live: Live, model: Model, name: str) -> None:
    ids = model.vocab.encode("Paris is a city.")
    answer = live.client.completions.create(model=name, prompt="Paris is a city.", **SCORE)
    (choice,) = answer.choices
    assert (choice.text, choice.finish_reason) == ("Paris is a city.", "length")
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (len(ids), 0)
    found = choice.logprobs
    trained = Transformer(model.talker.weights) if name == "base" else model.talker
    assert found.token_logprobs[0] is None
    assert found.token_logprobs[1:] == pytest.approx(score(trained, [ids])[0][1:], abs=1e-5)
    assert found.tokens == [model.vocab.decode((number,)) for number in ids]
    assert found.text_offset == [len("".join(found.tokens[:place])) for place in range(len(ids))]
    assert found.top_logprobs[0] is None
    for lp, top in zip(found.token_logprobs[1:], found.top_logprobs[1:], strict=True):
        (best,) = top.values()
        assert best >= lp - 1e-6


def test_what_is_sampled_comes_after_the_prompt_as_it_comes_without(live: Live, endless: dict[str, int]) -> None:
    body: dict[str, Any] = {"model": "base", "prompt": "Paris is", "logprobs": 2, "logit_bias": endless, **CERTAIN}
    plain, echoed = (live.client.completions.create(**body, echo=echo) for echo in (False, True))
    (before,), (after,) = plain.choices, echoed.choices
    assert after.text == "Paris is" + before.text
    num = len(before.logprobs.tokens)
    assert after.logprobs.tokens[-num:] == before.logprobs.tokens
    assert after.logprobs.token_logprobs[-num:] == pytest.approx(before.logprobs.token_logprobs, abs=1e-6)
    assert after.logprobs.text_offset[-num:] == [place + len("Paris is") for place in before.logprobs.text_offset]
    assert echoed.usage == plain.usage
    chunks = list(live.client.completions.create(**body, echo=True, stream=True))
    assert "".join(chunk.choices[0].text for chunk in chunks) == after.text
    assert [lp for chunk in chunks for lp in chunk.choices[0].logprobs.token_logprobs] == pytest.approx(
        after.logprobs.token_logprobs, abs=1e-6
    )


def test_without_logprobs_the_prompt_is_told_and_nothing_is_computed_for_it(
    live: Live, monkeypatch: pytest.MonkeyPatch
) -> None:
    def scoring(*_: object, **__: object) -> None:
        raise AssertionError("nobody asked for it")

    monkeypatch.setattr(Session, "scoring", scoring)
    (choice,) = live.client.completions.create(model="base", prompt="Paris", echo=True, max_tokens=0).choices
    assert (choice.text, choice.logprobs) == ("Paris", None)


def test_several_prompts_of_ids_come_each_with_its_choices_as_a_harness_asks(live: Live, model: Model) -> None:
    texts = ["The cat", "Größe 🎉 done", "x"]
    prompts = [model.vocab.encode(text) for text in texts]
    body: dict[str, Any] = {"model": "talker", "n": 2, "echo": True, "logprobs": 1, "max_tokens": 1, "seed": 3}
    live.worker._engine.prefill_tokens, usual = 5, live.worker._engine.prefill_tokens
    try:
        answer = live.client.completions.create(prompt=prompts, **body)
    finally:
        live.worker._engine.prefill_tokens = usual
    assert [choice.index for choice in answer.choices] == list(range(6))
    for place, choice in enumerate(answer.choices):
        text, ids = texts[place // 2], prompts[place // 2]
        assert choice.text.startswith(text)
        assert len(choice.logprobs.tokens) in (len(ids), len(ids) + 1)  # a token that ends the answer has no text
        wanted = score(model.talker, [ids])[0]
        assert choice.logprobs.token_logprobs[1 : len(ids)] == pytest.approx(wanted[1:], abs=1e-5)


def test_a_character_of_several_tokens_stands_where_its_first_one_begins(live: Live, model: Model) -> None:
    ids = model.vocab.encode("a🎉b")
    assert len(ids) > 3, "the small vocabulary has no token for it"
    (choice,) = live.client.completions.create(model="base", prompt=ids, **SCORE).choices
    assert choice.text == "a🎉b"
    assert choice.logprobs.text_offset == [0, *[1] * (len(ids) - 2), 2]


def test_stops_are_for_what_is_sampled(live: Live, model: Model, endless: dict[str, int]) -> None:
    body: dict[str, Any] = {"model": "base", "logit_bias": endless, "echo": True, **CERTAIN, "max_tokens": 30}
    text = live.client.completions.create(prompt="Paris is", **body).choices[0].text.removeprefix("Paris is")
    stop = text[5:8]
    cut = live.client.completions.create(prompt=f"Paris is{stop}", stop=stop, **body).choices[0]
    assert cut.text.startswith(f"Paris is{stop}")
    ended = live.client.completions.create(prompt="Paris is", stop=[stop, "Paris"], **body).choices[0]
    assert (ended.text, ended.finish_reason) == ("Paris is" + text[: text.index(stop)], "stop")


def test_a_prompt_that_fills_the_context_can_be_scored_and_nothing_more(model: Model) -> None:
    with serving(model, max_length=40) as live:
        ids = [5] * 40
        (choice,) = live.client.completions.create(model="base", prompt=ids, **SCORE).choices
        assert len(choice.logprobs.tokens) == 40
        for prompt, more in ((ids, {"max_tokens": 1}), ([5] * 41, {})):
            with pytest.raises(BadRequestError) as error:
                live.client.completions.create(model="base", prompt=prompt, **{**SCORE, **more})
            assert error.value.code == "context_length_exceeded"


def test_what_runs_goes_on_while_a_prompt_is_scored(
    live: Live, model: Model, endless: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    scoring, step, steps, marks = Session.scoring, Session.step, list[int](), list[int]()

    def counted(session: Session) -> Any:
        steps.append(session.num_running)
        return step(session)

    def noted(*given: Any, **how: Any) -> Generator[None, None, Any]:
        work = scoring(*given, **how)
        while True:
            try:
                next(work)
            except StopIteration as done:
                return done.value
            marks.append(sum(steps))
            yield

    monkeypatch.setattr(Session, "step", counted)
    monkeypatch.setattr(Session, "scoring", noted)
    ids = model.vocab.encode("Paris is a city.") * 40
    running: dict[str, Any] = {"model": "base", "prompt": "x", "max_tokens": 3000, "logit_bias": endless}
    with live.client.completions.create(**running, stream=True) as stream:
        next(iter(stream))
        (choice,) = live.client.completions.create(model="talker", prompt=ids, **SCORE).choices
        next(iter(stream))
    assert len(marks) > model.talker.arch.num_layers
    assert all(after > before for before, after in pairwise(marks)), "a token of the other answer came between"
    assert choice.logprobs.token_logprobs[1:] == pytest.approx(score(model.talker, [ids])[0][1:], abs=1e-5)


def test_a_fault_while_a_prompt_is_scored_ends_it_and_whoever_leaves_frees_the_place(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    with serving(model) as live:
        real = Session.scoring
        monkeypatch.setattr(Session, "scoring", _no_memory)
        with pytest.raises(InternalServerError, match=r"under err_\w+"):
            live.client.completions.create(model="base", prompt=["x", "y"], **SCORE)
        monkeypatch.setattr(Session, "scoring", real)
        assert live.client.completions.create(model="base", prompt="x", **SCORE).choices[0].text == "x"
        live.worker._engine.prefill_tokens, scored = 1, list[int]()

        def slow(session: Session, prompts: list[list[int]], **how: Any) -> Any:
            scored.append(len(prompts))
            time.sleep(0.1)
            return real(session, prompts, **how)

        monkeypatch.setattr(Session, "scoring", slow)
        body = {"model": "base", "prompt": [[5, number] for number in range(20)], **SCORE, "max_tokens": 300}
        with pytest.raises(httpx2.TimeoutException):
            httpx2.post(f"{live.url}/v1/completions", json=body, timeout=0.3)
        wait_until(lambda: live.worker.outstanding == 0 and not live.worker._echoing)
        wait_until(lambda: live.worker.load()[:3] == (0, 0, 0))
        assert not live.worker._tickets
        assert not live.worker._numbers
        assert len(scored) < 10


def _no_memory(*_: object, **__: object) -> None:
    raise torch.OutOfMemoryError("no memory")
