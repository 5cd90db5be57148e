"""Responses and plain completions, as the `openai` package asks for them and reads them."""

from __future__ import annotations

import json
from typing import Any

import httpx2
import pytest

from tests.web.conftest import WEATHER_TOOL, Live, Model

CERTAIN: dict[str, Any] = {"model": "talker", "temperature": 0}
TOOL = {"type": "function", **WEATHER_TOOL["function"]}


def test_a_response_has_its_reasoning_and_its_message_as_items(live: Live) -> None:
    answer = live.client.responses.create(input="hi", **CERTAIN)
    assert answer.status == "completed"
    assert answer.output_text == "Hello!"
    assert [item.type for item in answer.output] == ["reasoning", "message"]
    assert answer.output[0].content[0].text == "They greet.\nSo do I."
    assert answer.output[1].phase == "final_answer"
    assert answer.usage.total_tokens == answer.usage.input_tokens + answer.usage.output_tokens
    assert answer.usage.output_tokens_details.reasoning_tokens > 10
    chat = live.client.chat.completions.create(messages=[{"role": "user", "content": "hi"}], **CERTAIN)
    assert (answer.usage.input_tokens, answer.usage.output_tokens) == (
        chat.usage.prompt_tokens,
        chat.usage.completion_tokens,
    )


def test_the_events_of_a_stream_come_in_openais_order_and_add_up(live: Live) -> None:
    with live.client.responses.stream(input="hi", **CERTAIN) as stream:
        events = list(stream)
        final = stream.get_final_response()
    assert [event.sequence_number for event in events] == list(range(len(events)))
    kinds = [event.type.removeprefix("response.") for event in events]
    assert [kind for i, kind in enumerate(kinds) if not i or kinds[i - 1] != kind] == [
        "created",
        "in_progress",
        "output_item.added",
        "content_part.added",
        "reasoning_text.delta",
        "reasoning_text.done",
        "content_part.done",
        "output_item.done",
        "output_item.added",
        "content_part.added",
        "output_text.delta",
        "output_text.done",
        "content_part.done",
        "output_item.done",
        "completed",
    ]
    assert "".join(event.delta for event in events if event.type == "response.output_text.delta") == "Hello!"
    assert final.output_text == "Hello!"
    assert final.output[0].content[0].text == "They greet.\nSo do I."
    assert final.usage.output_tokens > 10


def test_a_loop_of_two_steps_goes_through_items(live: Live) -> None:
    items: list[Any] = [{"role": "user", "content": "Paris?"}]
    with live.client.responses.stream(input=items, tools=[TOOL], **CERTAIN) as stream:
        events = list(stream)
        first = stream.get_final_response()
    assert [item.type for item in first.output] == ["reasoning", "message", "function_call"]
    assert first.output[1].phase == "commentary"
    call = first.output[2]
    assert (call.name, json.loads(call.arguments)) == ("get_weather", {"city": "Paris"})
    deltas = [event.delta for event in events if event.type == "response.function_call_arguments.delta"]
    assert len(deltas) > 2
    assert "".join(deltas) == call.arguments
    items += [item.model_dump(exclude_none=True, exclude={"parsed_arguments"}) for item in first.output]
    items.append({"type": "function_call_output", "call_id": call.call_id, "output": "19C"})
    second = live.client.responses.create(input=items, tools=[TOOL], **CERTAIN)
    assert second.output_text == "It is 19C."


def test_a_response_that_is_cut_off_is_incomplete(live: Live) -> None:
    answer = live.client.responses.create(input="hi", max_output_tokens=12, **CERTAIN)
    assert answer.status == "incomplete"
    assert answer.incomplete_details.reason == "max_output_tokens"
    assert answer.output[-1].status == "incomplete"
    with live.client.responses.stream(input="hi", max_output_tokens=12, **CERTAIN) as stream:
        assert [event.type for event in stream][-1] == "response.incomplete"


def test_instructions_effort_and_logprobs_are_heard(live: Live) -> None:
    def tokens(**more: Any) -> int:
        return live.client.responses.create(input="hi", model="base", max_output_tokens=1, **more).usage.input_tokens

    assert tokens(instructions="Be kind.") > tokens()
    assert tokens(reasoning={"effort": "low", "summary": "auto"}) != tokens()
    answer = live.client.responses.create(
        input="hi", include=["message.output_text.logprobs"], top_logprobs=2, **CERTAIN
    )  # fmt: skip
    logprobs = answer.output[1].content[0].logprobs
    assert b"".join(bytes(one.bytes) for one in logprobs).decode() == "Hello!"
    assert all(len(one.top_logprobs) == 2 for one in logprobs)


CALLED: list[dict[str, Any]] = [  # four items that are three messages
    {"role": "user", "content": "x"},
    {"type": "reasoning", "summary": [], "content": [{"type": "reasoning_text", "text": "x"}]},
    {"type": "function_call", "call_id": "c", "name": "f", "arguments": "{}"},
    {"type": "function_call_output", "call_id": "c", "output": "x"},
]
REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"previous_response_id": "resp_1"}, "previous_response_id"),
    ({"background": True}, "background"),
    ({"truncation": "auto"}, "truncation"),
    ({"input": []}, "input"),
    ({"input": [{"type": "computer_call"}]}, "input[0].type"),
    ({"input": [{"role": "tool", "content": "x"}]}, "input[0].role"),
    ({"input": [*CALLED, {"role": "user", "content": [{"type": "input_image"}]}]}, "input[4].content[0]"),
    ({"input": [{"role": "user", "content": "x"}, {"type": "function_call_output", "call_id": "c", "output": "x"}]},
     "input[1]"),
    ({"reasoning": {"effort": "xhigh"}}, "reasoning.effort"),
    ({"text": {"verbosity": "low"}}, "text.verbosity"),
    ({"include": ["file_search_call.results"]}, "include"),
    ({"tools": [{"type": "web_search"}]}, "tools[0].type"),
]  # fmt: skip


@pytest.mark.parametrize(("change", "param"), REFUSED, ids=lambda value: str(value)[:40])
def test_what_a_response_cannot_be_is_refused_by_its_field(live: Live, change: dict[str, Any], param: str) -> None:
    found = httpx2.post(f"{live.url}/v1/responses", json={"model": "talker", "input": "hi", **change})
    assert found.status_code == 400, found.text
    assert found.json()["error"]["param"] == param


def test_a_plain_completion_continues_text_and_ids_alike(live: Live, endless: dict[str, int]) -> None:
    body: dict[str, Any] = {"model": "base", "max_tokens": 6, "temperature": 0, "logit_bias": endless}
    ids = live.served.vocab.encode("Paris is")
    answer = live.client.completions.create(prompt=["Paris is", "The"], **body)
    assert [choice.index for choice in answer.choices] == [0, 1]
    same = live.client.completions.create(prompt=ids, **body)
    assert same.choices[0].text == answer.choices[0].text
    assert same.usage.prompt_tokens == len(ids)
    both = live.client.completions.create(prompt=[ids, ids], n=2, **body)
    assert [choice.text for choice in both.choices] == [same.choices[0].text] * 4
    streamed = list(live.client.completions.create(prompt=ids, stream=True, **body))
    assert "".join(chunk.choices[0].text for chunk in streamed) == same.choices[0].text
    assert streamed[-1].choices[0].finish_reason == "length"


def test_a_plain_completions_logprobs_are_by_place(live: Live, model: Model) -> None:
    prompt = live.served.renderer.completion(_greeting())
    answer = live.client.completions.create(prompt=prompt, logprobs=2, max_tokens=100, **CERTAIN).choices[0]
    assert answer.text.endswith("<|message|>Hello!")
    assert answer.finish_reason == "stop"
    found = answer.logprobs
    for token, place in zip(found.tokens, found.text_offset, strict=True):
        assert answer.text[place:].startswith(token)
    assert len(found.tokens) == len(found.token_logprobs) == len(found.top_logprobs)
    assert all(len(top) == 2 for top in found.top_logprobs)
    cut = live.client.completions.create(prompt=prompt, stop="lo", max_tokens=100, **CERTAIN).choices[0]
    assert cut.text.endswith("Hel")


def _greeting() -> Any:
    from ossia.harmony import conversation_from_messages

    return conversation_from_messages([{"role": "user", "content": "hi"}])


@pytest.mark.parametrize(
    "change",
    [{"prompt": []}, {"prompt": [[]]}, {"prompt": [10**6]}, {"max_tokens": 0}, {"best_of": 3}, {"suffix": "x"}],
    ids=str,
)
def test_what_a_plain_completion_cannot_be_is_refused(live: Live, change: dict[str, Any]) -> None:
    found = httpx2.post(f"{live.url}/v1/completions", json={"model": "base", "prompt": "x", **change})
    assert found.status_code == 400, found.text
    assert found.json()["error"]["param"] == next(iter(change))
