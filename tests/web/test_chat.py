"""Chat completions, as the `openai` package asks for them and reads them."""

from __future__ import annotations

import json
from typing import Any, get_args

import httpx2
import pytest
from openai import BadRequestError
from openai.types.chat import ChatCompletionChunk
from openai.types.shared.reasoning_effort import ReasoningEffort

from ossia.batch import score
from ossia.harmony import conversation_from_messages
from tests.web.conftest import CALL, GREET, WEATHER, WEATHER_TOOL, Live, Model, wait_until

CERTAIN: dict[str, Any] = {"model": "talker", "temperature": 0, "max_tokens": 200}


def chunks(live: Live, **body: Any) -> list[ChatCompletionChunk]:
    return list(live.client.chat.completions.create(stream=True, **body))


def test_thinking_comes_apart_from_the_answer_and_tokens_are_counted(live: Live, model: Model) -> None:
    answer = live.client.chat.completions.create(messages=[GREET], **CERTAIN)
    (choice,) = answer.choices
    assert choice.message.content == "Hello!"
    assert choice.message.reasoning == choice.message.reasoning_content == "They greet.\nSo do I."
    assert choice.message.tool_calls is None
    assert (choice.finish_reason, answer.model) == ("stop", "talker")
    usage = answer.usage
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens
    thought = len(model.vocab.encode("They greet.\nSo do I."))
    assert thought <= usage.completion_tokens_details.reasoning_tokens <= thought + 1
    assert usage.completion_tokens > thought + len(model.vocab.encode("Hello!"))


def test_a_stream_adds_up_to_the_same_answer(live: Live) -> None:
    whole = live.client.chat.completions.create(messages=[GREET], **CERTAIN)
    with live.client.chat.completions.stream(
        messages=[GREET], stream_options={"include_usage": True}, **CERTAIN
    ) as stream:
        final = stream.get_final_completion()
    message = final.choices[0].message
    assert message.content == "Hello!"
    assert message.reasoning == message.reasoning_content == "They greet.\nSo do I."
    assert final.choices[0].finish_reason == "stop"
    assert final.usage == whole.usage


def test_a_stream_says_its_usage_only_where_it_is_asked_to(live: Live) -> None:
    plain = chunks(live, messages=[GREET], **CERTAIN)
    assert all(chunk.usage is None and chunk.choices for chunk in plain)
    counted = chunks(live, messages=[GREET], stream_options={"include_usage": True}, **CERTAIN)
    assert [chunk.usage is None for chunk in counted] == [True] * (len(counted) - 1) + [False]
    assert counted[-1].choices == []


def test_characters_of_several_tokens_come_whole(live: Live) -> None:
    emoji = [{"role": "user", "content": "emoji"}]
    texts = [chunk.choices[0].delta.content or "" for chunk in chunks(live, messages=emoji, **CERTAIN)]
    assert "".join(texts) == "Größe 🎉 done"
    assert not any("\ufffd" in text for text in texts)


def test_a_call_is_streamed_with_its_preamble_and_its_arguments_in_pieces(live: Live) -> None:
    found = chunks(live, messages=[WEATHER], tools=[WEATHER_TOOL], **CERTAIN)
    calls = [call for chunk in found for call in chunk.choices[0].delta.tool_calls or ()]
    assert (calls[0].index, calls[0].type, calls[0].function.name) == (0, "function", "get_weather")
    assert calls[0].id.startswith("call_")
    assert all(call.index == 0 and call.id is None for call in calls[1:])
    assert len(calls) > 3
    assert "".join(call.function.arguments for call in calls) == '{"city":"Paris"}'
    assert "".join(chunk.choices[0].delta.content or "" for chunk in found) == "One moment."
    assert found[-1].choices[0].finish_reason == "tool_calls"


def test_a_loop_of_two_steps_with_a_tool_ends_in_the_answer(live: Live) -> None:
    messages: list[Any] = [WEATHER]
    first = live.client.chat.completions.create(messages=messages, tools=[WEATHER_TOOL], **CERTAIN).choices[0]
    assert first.finish_reason == "tool_calls"
    (call,) = first.message.tool_calls
    assert json.loads(call.function.arguments) == {"city": "Paris"}
    messages += [first.message.model_dump(), {"role": "tool", "tool_call_id": call.id, "content": "19C"}]
    second = live.client.chat.completions.create(messages=messages, tools=[WEATHER_TOOL], **CERTAIN).choices[0]
    assert (second.message.content, second.finish_reason) == ("It is 19C.", "stop")


def test_the_adapter_is_the_models_name_and_the_base_is_another_model(live: Live) -> None:
    body = {**CERTAIN, "messages": [GREET], "max_tokens": 20}
    said = {name: live.client.chat.completions.create(**{**body, "model": name}) for name in ("base", "talker")}
    assert said["base"].choices[0].message.reasoning != said["talker"].choices[0].message.reasoning
    again = live.client.chat.completions.create(**{**body, "model": "path/of/base"})
    assert again.choices[0].message == said["base"].choices[0].message


def test_n_choices_differ_a_seed_repeats_them_and_the_first_is_the_one_of_n_1(
    live: Live, endless: dict[str, int]
) -> None:
    body = {"model": "base", "prompt": "x", "max_tokens": 12, "logit_bias": endless}

    def texts(**more: Any) -> list[str]:
        answer = live.client.completions.create(**body, **more)
        assert [choice.index for choice in answer.choices] == list(range(len(answer.choices)))
        assert answer.usage.completion_tokens == 12 * len(answer.choices)
        assert answer.usage.prompt_tokens == 1
        return [choice.text for choice in answer.choices]

    three = texts(n=3, seed=7)
    assert len(set(three)) == 3
    assert texts(n=3, seed=7) == three
    assert texts(seed=7) == three[:1]
    assert texts(seed=8) != three[:1]
    assert texts() != texts()
    assert texts(seed=-7) != three[:1]


def test_n_streams_are_told_apart_by_their_index(live: Live) -> None:
    found = chunks(live, messages=[GREET], n=2, **CERTAIN)
    assert [chunk.choices[0].index for chunk in found[:2]] == [0, 1]
    for index in (0, 1):
        mine = [chunk.choices[0] for chunk in found if chunk.choices[0].index == index]
        assert "".join(choice.delta.content or "" for choice in mine) == "Hello!"
        assert mine[-1].finish_reason == "stop"


COUNT = [{"role": "user", "content": "count"}]


@pytest.mark.parametrize(
    ("stop", "said"),
    [
        ("two", "one, "),
        (["four", "three"], "one, two, "),
        ("one", ""),
        ("o, thre", "one, tw"),
        ("four!", "one, two, three, four"),
        ("1, 2", "one, two, three, four"),
    ],
)
def test_a_stop_text_ends_the_answer_and_never_the_thinking(live: Live, stop: Any, said: str) -> None:
    answer = live.client.chat.completions.create(messages=COUNT, stop=stop, **CERTAIN)
    message = answer.choices[0].message
    assert (message.content, message.reasoning) == (said, "1, 2, 3: one two.")
    assert answer.choices[0].finish_reason == "stop"
    found = chunks(live, messages=COUNT, stop=stop, **CERTAIN)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in found) == said
    assert found[-1].choices[0].finish_reason == "stop"
    wait_until(lambda: live.worker.load().running == 0)


def test_logprobs_are_those_of_the_visible_text_and_equal_ossia_score(live: Live, model: Model) -> None:
    answer = live.client.chat.completions.create(messages=[GREET], logprobs=True, top_logprobs=3, **CERTAIN)
    found = answer.choices[0].logprobs.content
    assert b"".join(bytes(one.bytes) for one in found).decode() == "Hello!"
    messages = [GREET, {"role": "assistant", "thinking": "They greet.\nSo do I.", "content": "Hello!"}]
    (sample,) = live.served.renderer.samples(conversation_from_messages(messages))
    ids = sample.ids
    (scored,) = score(model.talker, [ids])
    text = model.vocab.encode("Hello!")
    assert ids[-1 - len(text) : -1] == text
    for one, number, logprob in zip(found, text, scored[-1 - len(text) : -1], strict=True):
        assert one.logprob == pytest.approx(logprob, abs=1e-4)
        assert len(one.top_logprobs) == 3
        assert one.top_logprobs[0].logprob >= one.top_logprobs[1].logprob
        assert bytes(one.top_logprobs[0].bytes) == model.vocab.decode_bytes([number])
    streamed = chunks(live, messages=[GREET], logprobs=True, top_logprobs=3, **CERTAIN)
    together = [
        one for chunk in streamed if chunk.choices[0].logprobs is not None for one in chunk.choices[0].logprobs.content
    ]
    assert [one.token for one in together] == [one.token for one in found]


def test_max_tokens_cuts_and_says_so(live: Live) -> None:
    body = {**CERTAIN, "messages": [GREET]}
    cut = live.client.chat.completions.create(**{**body, "max_tokens": 12})
    assert cut.choices[0].finish_reason == "length"
    assert cut.usage.completion_tokens == 12
    assert "They greet.\nSo do I.".startswith(cut.choices[0].message.reasoning)
    assert cut.choices[0].message.content is None
    del body["max_tokens"]
    assert live.client.chat.completions.create(**body, max_completion_tokens=12).usage == cut.usage


def test_settings_reach_the_prompt(live: Live) -> None:
    def prompt_tokens(**more: Any) -> int:
        body = {"model": "base", "messages": [GREET], "max_tokens": 1, **more}
        return live.client.chat.completions.create(**body).usage.prompt_tokens

    plain = prompt_tokens()
    assert prompt_tokens(reasoning_effort="low") != plain
    assert prompt_tokens(tools=[WEATHER_TOOL]) > plain + 20
    assert prompt_tokens(tools=[WEATHER_TOOL], tool_choice="none") == plain
    parts = [{"type": "text", "text": "h"}, {"type": "text", "text": "i"}]
    assert prompt_tokens(messages=[{"role": "user", "content": parts}]) == plain
    told = [{"role": "system", "content": "Be kind."}, GREET]
    assert prompt_tokens(messages=told) > plain
    assert prompt_tokens(messages=[{**told[0], "role": "developer"}, GREET]) == prompt_tokens(messages=told)


def test_old_thinking_is_dropped_once_an_answer_was_given_and_kept_between_calls(live: Live) -> None:
    def prompt_tokens(messages: Any) -> int:
        return live.client.chat.completions.create(model="base", messages=messages, max_tokens=1).usage.prompt_tokens

    answered = {"role": "assistant", "content": "Hello!"}
    more = {"role": "user", "content": "again"}
    thought = {**answered, "reasoning": "Long thoughts."}
    assert prompt_tokens([GREET, thought, more]) == prompt_tokens([GREET, answered, more])
    called = {"role": "assistant", "tool_calls": [CALL]}
    result = {"role": "tool", "tool_call_id": "a", "content": "19C"}
    before = prompt_tokens([WEATHER, called, result])
    for key in ("reasoning", "reasoning_content"):
        assert prompt_tokens([WEATHER, {**called, key: "I look."}, result]) > before


def test_a_banned_token_is_never_sampled(live: Live, model: Model) -> None:
    hello = model.vocab.encode("H")[0]
    answer = live.client.chat.completions.create(messages=[GREET], logit_bias={str(hello): -100}, **CERTAIN)
    assert "H" not in (answer.choices[0].message.content or "")


@pytest.mark.parametrize("name", ["frequency_penalty", "presence_penalty"])
def test_a_penalty_keeps_an_answer_from_saying_the_same_again(live: Live, endless: dict[str, int], name: str) -> None:
    body: dict[str, Any] = {"model": "base", "prompt": "hi", "max_tokens": 60, "logit_bias": endless, "logprobs": 0}

    def num_different(**more: float) -> int:
        return len({*live.client.completions.create(temperature=0, **body, **more).choices[0].logprobs.tokens})

    assert num_different(**{name: -2.0}) < num_different() < num_different(**{name: 2.0})


REFUSED: list[tuple[dict[str, Any], str, str]] = [
    ({"presence_penalty": 2.5}, "presence_penalty", "-2 to 2"),
    ({"frequency_penalty": -3}, "frequency_penalty", "-2 to 2"),
    ({"frequency_penalty": "1"}, "frequency_penalty", "-2 to 2"),
    ({"extra_body": {"temprature": 1}}, "temprature", "did you mean temperature"),
    ({"n": 0}, "n", "1 to 128"),
    ({"top_logprobs": 2}, "top_logprobs", "logprobs"),
    ({"stop": [""]}, "stop", "none empty"),
    ({"reasoning_effort": "minimal"}, "reasoning_effort", "low, medium or high"),
    ({"tool_choice": "required"}, "tool_choice", "no tools"),
    ({"tools": [WEATHER_TOOL], "tool_choice": {"type": "function", "function": {"name": "f"}}}, "tool_choice", "f is"),
    ({"tools": [{"type": "custom", "custom": {}}]}, "tools[0].type", "allowed: function"),
    ({"logit_bias": {"99999": 1}}, "logit_bias", "no token"),
    ({"logit_bias": {"x": 1}}, "logit_bias", "no token"),
    ({"max_tokens": 10**9}, "max_tokens", "up to"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]}, "messages[0].content[0]",
     '{"type": "text"'),
    ({"messages": [{"role": "robot", "content": "x"}]}, "messages[0].role", "allowed: system"),
    ({"messages": [{"role": "user", "content": "x", "train": False}]}, "messages[0].train", "training"),
    ({"messages": [{"role": "tool", "tool_call_id": "a", "content": "x"}]}, "messages[0]", "without a call"),
    ({"messages": [{"role": "user", "content": "\ud800"}]}, "messages[0].content", "surrogate"),
    ({"messages": []}, "messages", "at least one"),
]  # fmt: skip


@pytest.mark.parametrize(("change", "param", "words"), REFUSED, ids=lambda value: str(value)[:40])
def test_what_cannot_be_done_is_refused_by_its_field(
    live: Live, change: dict[str, Any], param: str, words: str
) -> None:
    body = {"model": "talker", "messages": [GREET], **change}
    body |= body.pop("extra_body", {})
    raw = json.dumps(body).encode()
    found = httpx2.post(
        f"{live.url}/v1/chat/completions", content=raw, headers={"Content-Type": "application/json"}
    )  # fmt: skip
    assert found.status_code == 400, found.text
    error = found.json()["error"]
    assert (error["type"], error["param"]) == ("invalid_request_error", param)
    assert words in error["message"]


def test_each_effort_that_openais_types_allow_is_heard_or_refused_with_those_that_are(live: Live) -> None:
    (allowed,) = (one for one in get_args(ReasoningEffort) if one is not type(None))
    ours = {"low", "medium", "high"}
    assert ours < set(get_args(allowed))
    for effort in get_args(allowed):
        chat = {"model": "talker", "messages": [GREET], "max_tokens": 1, "reasoning_effort": effort}
        response = {"model": "talker", "input": "hi", "max_output_tokens": 1, "reasoning": {"effort": effort}}
        for route, body in (("chat/completions", chat), ("responses", response)):
            found = httpx2.post(f"{live.url}/v1/{route}", json=body)
            assert found.status_code == (200 if effort in ours else 400), (effort, found.text)
            assert effort in ours or f"found '{effort}'; allowed: low, medium or high" in found.text


def test_the_client_sees_a_refusal_as_its_own_kind_of_error(live: Live) -> None:
    with pytest.raises(BadRequestError) as error:
        live.client.chat.completions.create(messages=[GREET], presence_penalty=3, **CERTAIN)
    assert error.value.param == "presence_penalty"
    assert error.value.request_id.startswith("req_")


def test_harmless_fields_and_nulls_change_nothing(live: Live) -> None:
    more = {"user": "u", "store": True, "metadata": {"a": "b"}, "service_tier": "auto", "stop": None, "tools": None}
    more |= {"extra_body": {"prediction": None, "web_search_options": None}}
    answer = live.client.chat.completions.create(messages=[GREET], seed=None, **more, **CERTAIN)
    assert answer.choices[0].message.content == "Hello!"
