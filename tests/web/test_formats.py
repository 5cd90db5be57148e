"""What an answer has to be: JSON that matches a schema, a call that is required, ruled out, or strict."""

from __future__ import annotations

import json
from typing import Any

import httpx2
import pytest

from tests.web.conftest import GREET, MOOD_FORMAT, WEATHER, WEATHER_TOOL, Live, Model, Mood, serving

CERTAIN: dict[str, Any] = {"model": "talker", "temperature": 0, "max_tokens": 400}
FLAG = {"type": "object", "properties": {"ok": {"type": "boolean"}}, "required": ["ok"], "additionalProperties": False}


def test_an_answer_matches_the_schema_and_thinking_stays_free(live: Live) -> None:
    answer = live.client.chat.completions.parse(messages=[GREET], response_format=Mood, **CERTAIN)
    message = answer.choices[0].message
    assert isinstance(message.parsed, Mood)
    assert message.reasoning == "They greet.\nSo do I."
    with live.client.chat.completions.stream(messages=[GREET], response_format=Mood, **CERTAIN) as stream:
        assert stream.get_final_completion().choices[0].message.parsed == message.parsed


def test_a_response_matches_the_schema_too(live: Live) -> None:
    answer = live.client.responses.parse(input="hi", text_format=Mood, model="talker", temperature=0)
    assert isinstance(answer.output_parsed, Mood)
    assert answer.text.format.name == "Mood"


def test_choices_of_one_request_follow_the_grammar_each_for_itself(live: Live) -> None:
    body = {**CERTAIN, "temperature": 0.3, "seed": 3}
    answer = live.client.chat.completions.create(messages=[GREET], response_format=MOOD_FORMAT, n=3, **body)
    for choice in answer.choices:
        assert Mood.model_validate_json(choice.message.content)


def test_the_model_is_told_of_the_schema(live: Live) -> None:
    def tokens(**more: Any) -> int:
        return live.client.chat.completions.create(
            model="base", messages=[GREET], max_tokens=1, **more
        ).usage.prompt_tokens  # fmt: skip

    assert tokens(response_format=MOOD_FORMAT) > tokens() + 20
    assert tokens(response_format={"type": "json_object"}) == tokens()


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "get_weather"}}], ids=str)
def test_a_call_that_is_required_is_made_and_matches_its_parameters(live: Live, choice: Any) -> None:
    other = {"type": "function", "function": {"name": "flag", "parameters": FLAG}}
    tools = [WEATHER_TOOL] if choice != "required" else [other]
    answer = live.client.chat.completions.create(messages=[WEATHER], tools=tools, tool_choice=choice, **CERTAIN)
    assert answer.choices[0].finish_reason == "tool_calls"
    call = answer.choices[0].message.tool_calls[0]
    if choice == "required":
        assert (call.function.name, json.loads(call.function.arguments).keys()) == ("flag", {"ok"})
    else:
        assert (call.function.name, json.loads(call.function.arguments)) == ("get_weather", {"city": "Paris"})


def test_a_response_can_require_a_call(live: Live) -> None:
    tool = {"type": "function", **WEATHER_TOOL["function"]}
    choice = {"type": "function", "name": "get_weather"}
    body: dict[str, Any] = {"model": "talker", "temperature": 0, "parallel_tool_calls": False}
    answer = live.client.responses.create(input="Paris?", tools=[tool], tool_choice=choice, **body)
    assert answer.output[-1].type == "function_call"


@pytest.mark.parametrize(
    ("strict", "choice", "held"),
    [(True, "auto", True), (None, "auto", False), (None, "required", True), (False, "required", False)],
)
def test_arguments_match_the_parameters_of_a_strict_tool_or_where_a_call_is_required(
    live: Live, strict: bool | None, choice: Any, held: bool
) -> None:
    short = {"type": "object", "properties": {"city": {"type": "string", "maxLength": 3}}, "required": ["city"]}
    tool: Any = {"type": "function", "function": {**WEATHER_TOOL["function"], "parameters": short, "strict": strict}}
    answer = live.client.chat.completions.create(messages=[WEATHER], tools=[tool], tool_choice=choice, **CERTAIN)
    city = json.loads(answer.choices[0].message.tool_calls[0].function.arguments)["city"]
    assert (len(city) <= 3) == held
    assert held or city == "Paris"


def test_no_call_is_made_where_it_is_ruled_out(live: Live) -> None:
    answer = live.client.chat.completions.create(
        messages=[WEATHER], tools=[WEATHER_TOOL], tool_choice="none", **CERTAIN
    )  # fmt: skip
    assert answer.choices[0].message.tool_calls is None
    assert answer.choices[0].finish_reason in ("stop", "length")


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"response_format": {"type": "yaml"}}, "response_format.type"),
    ({"response_format": {"type": "json_schema"}}, "response_format.json_schema.schema"),
    (
        {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "strange"}}}},
        "response_format.json_schema.schema",
    ),
    (
        {
            "tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": "strange"}}}],
            "tool_choice": "required",
        },
        "tools[0].function.parameters.type",
    ),
    (
        {
            "tools": [{"type": "function", "function": {"name": "f", "parameters": {"$ref": "#/nowhere"}}}],
            "tool_choice": "required",
        },
        "tools[0].function.parameters",
    ),
]


@pytest.mark.parametrize(("change", "param"), REFUSED, ids=lambda value: str(value)[:50])
def test_what_cannot_be_enforced_is_refused_by_its_field(live: Live, change: dict[str, Any], param: str) -> None:
    found = httpx2.post(f"{live.url}/v1/chat/completions", json={"model": "talker", "messages": [GREET], **change})
    assert (found.status_code, found.json()["error"]["param"]) == (400, param), found.text


def test_without_its_library_a_server_refuses_what_it_cannot_hold(model: Model) -> None:
    with serving(model) as live:
        for change in (
            {"response_format": MOOD_FORMAT},
            {"tools": [WEATHER_TOOL], "tool_choice": "required"},
            {"tools": [{"type": "function", "function": {**WEATHER_TOOL["function"], "strict": True}}]},
        ):
            body = {"model": "talker", "messages": [GREET], **change}
            found = httpx2.post(f"{live.url}/v1/chat/completions", json=body)
            assert found.status_code == 400
            assert "ossia[grammar]" in found.json()["error"]["message"]
