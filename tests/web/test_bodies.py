"""Bodies that nobody should send: whatever is in one, it is answered or refused by its field, never a fault of ours."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ossia.engine.grammar import GrammarCompiler
from ossia.harmony import Renderer, Vocabulary
from ossia.web.protocol.bodies import ChatBody, CompletionBody, ResponseBody, read_body
from ossia.web.protocol.errors import ApiError
from ossia.web.protocol.prompts import Served, chat_job, completion_job
from ossia.web.protocol.responses_in import response_job
from tests.web.conftest import CALL, MOOD_FORMAT, WEATHER_TOOL

STRICT = {**WEATHER_TOOL, "function": {**WEATHER_TOOL["function"], "strict": True}}
CHAT: dict[str, Any] = {
    "model": "base",
    "messages": [
        {"role": "system", "content": "s"},
        {"role": "user", "content": [{"type": "text", "text": "t"}], "name": "n"},
        {"role": "assistant", "content": "c", "reasoning": "r", "tool_calls": [CALL]},
        {"role": "tool", "tool_call_id": "a", "content": "r"},
    ],
    "tools": [STRICT],
    "tool_choice": {"type": "function", "function": {"name": "get_weather"}},
    "response_format": MOOD_FORMAT,
    "stop": ["a"],
    "logit_bias": {"1": 3},
    "n": 2,
    "seed": 3,
    "temperature": 0.3,
    "stream": True,
    "stream_options": {"include_usage": True},
    "max_tokens": 5,
    "reasoning_effort": "low",
    "logprobs": True,
    "top_logprobs": 3,
}
RESPONSE: dict[str, Any] = {
    "model": "base",
    "input": [
        {"role": "user", "content": [{"type": "input_text", "text": "t"}]},
        {"type": "reasoning", "id": "r", "summary": [], "content": [{"type": "reasoning_text", "text": "x"}]},
        {"type": "function_call", "call_id": "1", "name": "get_weather", "arguments": "{}"},
        {"type": "function_call_output", "call_id": "1", "output": "x"},
        {"type": "message", "role": "assistant", "phase": "commentary", "content": "x"},
        {"role": "user", "content": "x"},
    ],
    "tools": [{"type": "function", **STRICT["function"]}],
    "tool_choice": {"type": "function", "name": "get_weather"},
    "text": {"format": {"type": "json_schema", **MOOD_FORMAT["json_schema"]}},
    "reasoning": {"effort": "low"},
    "include": ["message.output_text.logprobs"],
}
PLAIN: dict[str, Any] = {"model": "a", "prompt": ["x", "y"], "max_tokens": 4, "n": 2, "stop": "x", "logprobs": 2}
KINDS: list[tuple[Any, dict[str, Any], Any]] = [
    (ChatBody, CHAT, chat_job),
    (ResponseBody, RESPONSE, response_job),
    (CompletionBody, PLAIN, completion_job),
]
JUNK: list[Any] = [
    *(None, True, 0, -1, 1.5, 10**30, "", "x", "\ud800", "=", float("inf"), "functions.get_weather"),
    *([], {}, [None], [1], [[]], [{}], {"x": {"x": 1}}, {"type": "x"}, {"type": "function"}),
    {"type": "text", "text": 3},
    *({"type": ["string", "null"]}, {"enum": []}, {"anyOf": 3}, {"$ref": "#/x"}, {"properties": []}, {"required": 3}),
    *({"items": [1]}, {"default": float("nan")}, {"type": "object", "properties": {"a": {"$ref": "#"}}}),
]  # fmt: skip


@pytest.fixture(scope="module")
def served(small_tokenizer: Path) -> Served:
    vocab = Vocabulary.from_file(small_tokenizer)
    size = vocab.size + 5
    return Served("base", vocab, Renderer(vocab), size, 4000, 0, "float32", GrammarCompiler(vocab, size), ("a",))


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The path to everything inside."""
    if path:
        yield path
    steps = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in steps:
        yield from places(inner, (*path, key))


def spoiled(body: dict[str, Any], rng: random.Random) -> dict[str, Any]:
    """The body with one or two things in it replaced, left out or added."""
    body = copy.deepcopy(body)
    for _ in range(rng.randint(1, 2)):
        *path, last = rng.choice(list(places(body)))
        inside: Any = body
        for key in path:
            inside = inside[key]
        luck = rng.random()
        if luck < 0.7:
            inside[last] = copy.deepcopy(rng.choice(JUNK))
        elif luck < 0.85:
            inside.pop(last)
        elif isinstance(inside, dict):
            inside[rng.choice(["x", "type", "name", "content", "$ref"])] = copy.deepcopy(rng.choice(JUNK))
        else:
            inside.insert(0, copy.deepcopy(rng.choice(JUNK)))
    return body


def test_whole_bodies_are_taken(served: Served) -> None:
    assert [len(job(read_body(kind, body), served).requests) for kind, body, job in KINDS] == [2, 1, 4]


def test_spoiled_bodies_are_answered_or_refused_by_a_field(served: Served) -> None:
    rng, refused = random.Random(0), list[ApiError]()
    for _ in range(1200):
        kind, body, job = rng.choice(KINDS)
        try:
            job(read_body(kind, spoiled(body, rng)), served)
        except ApiError as error:
            refused.append(error)
    assert 600 < len(refused) < 1200
    assert {error.status for error in refused} == {400, 404}
    assert all(error.param and json.dumps(error.body) for error in refused)


def test_a_field_that_is_misspelt_is_named_with_the_nearest_right_one(served: Served) -> None:
    with pytest.raises(ApiError, match=r"max_token: this server has no such field; did you mean max_tokens\?"):
        read_body(ChatBody, {**CHAT, "max_token": 3})


def test_the_first_choice_of_a_seed_is_the_one_of_a_single_answer(served: Served) -> None:
    one, two = (chat_job(read_body(ChatBody, {**CHAT, "n": n}), served).requests for n in (1, 2))
    assert one[0].sampling == two[0].sampling
    assert two[0].sampling.seed != two[1].sampling.seed
    assert one[0].ids == two[1].ids
