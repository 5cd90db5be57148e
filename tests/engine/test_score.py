"""Logprobs of given tokens from the engine: those of the training forward, whatever they are packed with."""

from __future__ import annotations

import pytest
import torch

from ossia.batch import score
from ossia.engine import Engine, PromptToken
from ossia.errors import UserError
from ossia.model.lora import TARGETS
from ossia.model.transformer import Transformer
from tests.conftest import MakeTiny
from tests.engine.support import adapter, random_prompts, sample_of
from tests.engine.test_engine import NARROW
from tests.oracle.model_pairs import load, pack_of

LENGTHS = (1, 20, 2, 70)


@pytest.mark.parametrize("name", [None, "a"])
def test_a_prompts_logprobs_are_those_of_the_trainer(tiny: MakeTiny, name: str | None) -> None:
    base = load(tiny(NARROW), placement="bf16")
    lora = adapter(base, *TARGETS, "lm_head")
    prompts = random_prompts(LENGTHS)
    session = Engine(base, adapters={"a": lora}).session()
    found = session.score(prompts, adapter=name)
    trainer = Transformer(base.weights, lora=None if name is None else lora)
    for prompt, mine, theirs in zip(prompts, found, score(trainer, prompts), strict=True):
        assert [token.id for token in mine] == prompt
        assert mine[0].logprob is None
        assert theirs[0] is None
        assert [token.logprob for token in mine[1:]] == pytest.approx(theirs[1:], abs=1e-5)
        assert not any(token.top for token in mine)
    assert session.cache.num_used == 0


def test_the_likeliest_tokens_of_each_place_are_those_of_the_logits(
    tiny: MakeTiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load(tiny(NARROW), placement="bf16")
    prompts = random_prompts((20, 5))
    monkeypatch.setattr("ossia.engine.head._SCORED_LOGITS", 7 * model.arch.vocab_size)  # of several pieces
    for prompt, mine in zip(prompts, Engine(model).session().score(prompts, top=3), strict=True):
        lps = model.logits(pack_of([sample_of(prompt)])).float().log_softmax(-1)
        values, ids = lps.topk(3, dim=-1)
        assert mine[0].top == ()
        assert len(mine) == len(prompt)
        for token, wanted, likeliest in zip(mine[1:], values.tolist(), ids.tolist(), strict=False):
            assert [number for number, _ in token.top] == likeliest
            assert [value for _, value in token.top] == pytest.approx(wanted, abs=1e-5)


def test_a_single_token_has_nothing_before_it(tiny: MakeTiny) -> None:
    (found,) = Engine(load(tiny(NARROW), placement="bf16")).session().score([[7]], top=2)
    assert found == [PromptToken(7, None)]


def test_what_cannot_be_scored_is_refused(tiny: MakeTiny) -> None:
    model = load(tiny(NARROW), placement="bf16")
    session, most = Engine(model).session(), model.arch.max_positions
    for prompt, words in (([], "an empty prompt"), ([10**6], "no token 1000000"), ([1] * (most + 1), "allowed:")):
        with pytest.raises(UserError, match=words):
            session.score([prompt])
    with pytest.raises(UserError, match="no adapter 'x'"):
        session.score([[1]], adapter="x")
    model.weights.get("model.norm.weight").fill_(torch.nan)
    with pytest.raises(UserError, match="not finite"):
        session.score([[1, 2]])
