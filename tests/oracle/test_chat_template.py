"""Oracle: Ossia's chat template, rendered by transformers, against openai-harmony 0.0.8 and Ossia's own renderer."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import openai_harmony as harmony
import pytest
from jinja2 import TemplateError
from transformers import PreTrainedTokenizerFast

from ossia.harmony.chat import conversation_from_messages
from ossia.harmony.messages import System
from ossia.model.template import chat_template
from tests.harmony.support import oracle, renderer

WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Current weather of a city.\nNot a forecast.",
        "parameters": {
            "type": "object",
            "description": "Where, and how to say it",
            "properties": {
                "city": {"type": "string", "title": "City", "description": "Its name", "examples": ["Oslo", "Rome"]},
                "unit": {"type": "string", "enum": ["celsius", "fahrenheit"], "default": "celsius"},
                "days": {"type": ["integer", "null"], "default": 3},
                "hours": {"type": "array", "items": {"type": "integer"}, "default": [8, 20]},
                "place": {
                    "type": "object",
                    "description": "Exact place",
                    "properties": {"lat": {"type": "number"}, "items": {"type": "array"}},
                    "required": ["lat"],
                },
                "until": {
                    "description": "End",
                    "oneOf": [
                        {"type": "string", "description": "a date", "default": "today"},
                        {"type": "object", "properties": {"week": {"type": "integer"}}},
                        {"type": "boolean", "nullable": True},
                    ],
                    "default": "now",
                },
                "exact": {"oneOf": [{"type": "number", "description": "Same"}], "description": "Same"},
                "many": {"type": "array", "items": {"oneOf": [{"type": "string", "default": "x"}, {"type": "number"}]}},
                "anything": {},
                "flag": {"type": "boolean", "nullable": True, "default": False, "description": 'A "flag"'},
            },
            "required": ["city"],
        },
    },
}
NO_ARGUMENTS = {"type": "function", "function": {"name": "now", "description": "The time."}}
EMPTY = {"name": "noop", "description": "", "parameters": {"type": "object", "properties": {}}}


def _user(text: Any) -> dict[str, Any]:
    return {"role": "user", "content": text}


def _answer(text: str, thinking: str | None = None) -> dict[str, Any]:
    return {"role": "assistant", "content": text} | ({"thinking": thinking} if thinking else {})


def _call(arguments: Any, *, name: str = "get_weather", number: str = "c1", **more: Any) -> dict[str, Any]:
    call = {"id": number, "type": "function", "function": {"name": name, "arguments": arguments}}
    return {"role": "assistant", "content": None, "tool_calls": [call], **more}


def _result(text: str, number: str = "c1") -> dict[str, Any]:
    return {"role": "tool", "tool_call_id": number, "content": text}


OSLO = {"city": "Oslo", "exact": 0.5, "list": [1, {"a": None}], "text": 'é "q" <b>'}
TWO_CALLS = {
    "role": "assistant",
    "content": "I look both up.",
    "reasoning_content": "two",
    "tool_calls": [
        {"id": "a", "type": "function", "function": {"name": "get_weather", "arguments": '{"city": "Oslo"}'}},
        {"id": "b", "type": "function", "function": {"name": "now", "arguments": {}}},
    ],
}
CONVERSATIONS: dict[str, dict[str, Any]] = {
    "one question": {"messages": [_user("Hi")]},
    "system is instructions": {"messages": [{"role": "system", "content": "Be brief.\n"}, _user("Hi")]},
    "developer is instructions": {"messages": [{"role": "developer", "content": "Be brief."}, _user("Hi")]},
    "system and developer are joined": {
        "messages": [{"role": "system", "content": "A"}, {"role": "developer", "content": "B"}, _user("Hi")]
    },
    "late developer message": {
        "messages": [{"role": "system", "content": "A"}, _user("Hi"), _answer("yo"), {"role": "system", "content": "B"}]
    },
    "high effort, date, identity": {
        "messages": [_user("Hi")],
        "reasoning_effort": "high",
        "current_date": "2025-06-28",
        "model_identity": "You are Ossia.",
    },
    "low effort": {"messages": [_user("Hi")], "reasoning_effort": "low", "knowledge_cutoff": "2025-01"},
    "text in parts": {"messages": [_user([{"type": "text", "text": "Hi "}, {"type": "text", "text": "you"}])]},
    "named user": {"messages": [_user("Hi") | {"name": "ann"}]},
    "answered": {"messages": [_user("Hi"), _answer("Hello")]},
    "answered after thinking": {"messages": [_user("Hi"), _answer("Hello", "hm")]},
    "two turns drop the first thinking": {
        "messages": [_user("1"), _answer("one", "hm"), _user("2"), _answer("two", "hmm"), _user("3")]
    },
    "two answered turns": {"messages": [_user("1"), _answer("one", "hm"), _user("2"), _answer("two", "hmm")]},
    "thinking alone goes on": {"messages": [_user("1"), {"role": "assistant", "content": None, "reasoning": "hm"}]},
    "tools": {"messages": [_user("Hi")], "tools": [WEATHER, NO_ARGUMENTS, EMPTY]},
    "tools and instructions": {"messages": [{"role": "system", "content": "A"}, _user("Hi")], "tools": [NO_ARGUMENTS]},
    "call with text arguments": {"messages": [_user("W?"), _call('{ "city":"Oslo" }')], "tools": [WEATHER]},
    "call with an object": {"messages": [_user("W?"), _call(OSLO, thinking="hm"), _result("19C")], "tools": [WEATHER]},
    "call without arguments": {"messages": [_user("T?"), _call(None, name="now")], "tools": [NO_ARGUMENTS]},
    "call with empty text": {"messages": [_user("T?"), _call("", name="now")], "tools": [NO_ARGUMENTS]},
    "two calls, results in the other order": {
        "messages": [_user("?"), TWO_CALLS, _result("noon", "b"), _result("19C", "a")],
        "tools": [WEATHER, NO_ARGUMENTS],
    },
    "call, answer, next question with a call under the same id": {
        "messages": [
            _user("W?"),
            _call({"city": "Oslo"}, thinking="first"),
            _result("19C"),
            _answer("19", "second"),
            _user("And now?"),
            _call({}, name="now", thinking="third"),
            _result("5 pm"),
        ],
        "tools": [WEATHER, NO_ARGUMENTS],
    },
    "call, answer, next question": {
        "messages": [
            _user("W?"), _call({"city": "Oslo"}, thinking="first"), _result("19C"), _answer("19", "second"), _user("?")
        ],
        "tools": [WEATHER],
    },
}  # fmt: skip


@pytest.fixture(scope="module")
def tokenizer(o200k_tokenizer: Path) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(tokenizer_file=str(o200k_tokenizer), chat_template=chat_template())


def _reference(case: Mapping[str, Any]) -> harmony.Conversation:
    """openai-harmony's own objects for a case, made here by hand and not by Ossia's code."""
    functions = [tool.get("function", tool) for tool in case.get("tools", ())]
    system = harmony.SystemContent.new().with_reasoning_effort(
        harmony.ReasoningEffort(case.get("reasoning_effort", "medium").capitalize())
    )
    system.model_identity = case.get("model_identity", system.model_identity)
    system.knowledge_cutoff = case.get("knowledge_cutoff", system.knowledge_cutoff)
    system.conversation_start_date = case.get("current_date")
    leading = [m["content"] for m in case["messages"][:2] if m["role"] in ("system", "developer")]
    developer = harmony.DeveloperContent.new()
    if leading:
        developer = developer.with_instructions("\n\n".join(leading))
    if functions:
        tools = [harmony.ToolDescription.new(f["name"], f["description"], f.get("parameters")) for f in functions]
        developer = developer.with_function_tools(tools)
    messages = [harmony.Message.from_role_and_content(harmony.Role.SYSTEM, system)]
    if leading or functions:
        messages.append(harmony.Message.from_role_and_content(harmony.Role.DEVELOPER, developer))
    names: dict[str, str] = {}
    for row in case["messages"][len(leading) :]:
        messages += _reference_messages(row, names)
    return harmony.Conversation.from_messages(messages)


def _reference_messages(row: Mapping[str, Any], names: dict[str, str]) -> list[harmony.Message]:
    def assistant(text: str, channel: str) -> harmony.Message:
        return harmony.Message.from_role_and_content(harmony.Role.ASSISTANT, text).with_channel(channel)

    role, content = row["role"], row["content"]
    if role == "user":
        text = content if isinstance(content, str) else "".join(part["text"] for part in content)
        author = harmony.Author(role=harmony.Role.USER, name=row.get("name"))
        return [harmony.Message.from_author_and_content(author, text)]
    if role in ("system", "developer"):
        instructions = harmony.DeveloperContent.new().with_instructions(content)
        return [harmony.Message.from_role_and_content(harmony.Role.DEVELOPER, instructions)]
    if role == "tool":
        author = harmony.Author.new(harmony.Role.TOOL, f"functions.{names[row['tool_call_id']]}")
        message = harmony.Message.from_author_and_content(author, content)
        return [message.with_channel("commentary").with_recipient("assistant")]
    messages = []
    thinking = row.get("thinking") or row.get("reasoning") or row.get("reasoning_content")
    if thinking:
        messages.append(assistant(thinking, "analysis"))
    if content:
        messages.append(assistant(content, "commentary" if row.get("tool_calls") else "final"))
    for call in row.get("tool_calls", ()):
        name, arguments = call["function"]["name"], call["function"]["arguments"]
        names[call["id"]] = name
        if not isinstance(arguments, str):
            arguments = json.dumps({} if arguments is None else arguments, separators=(",", ":"), ensure_ascii=False)
        message = assistant(arguments, "commentary").with_recipient(f"functions.{name}")
        messages.append(message.with_content_type("<|constrain|>json"))
    return messages


def _by_template(tokenizer: PreTrainedTokenizerFast, case: Mapping[str, Any], *, prompt: bool) -> list[int]:
    options = {key: value for key, value in case.items() if key != "messages"}
    return tokenizer.apply_chat_template(case["messages"], add_generation_prompt=prompt, return_dict=False, **options)


@pytest.mark.parametrize("name", CONVERSATIONS)
def test_the_template_gives_openai_harmonys_ids_for_completion(name: str, tokenizer: PreTrainedTokenizerFast) -> None:
    case = CONVERSATIONS[name]
    expected = oracle().render_conversation_for_completion(_reference(case), harmony.Role.ASSISTANT)
    found = _by_template(tokenizer, case, prompt=True)
    assert tokenizer.decode(found) == tokenizer.decode(expected)
    assert found == expected


@pytest.mark.parametrize("name", CONVERSATIONS)
def test_the_template_gives_openai_harmonys_ids_for_training(name: str, tokenizer: PreTrainedTokenizerFast) -> None:
    case = CONVERSATIONS[name]
    expected = oracle().render_conversation_for_training(_reference(case))
    assert _by_template(tokenizer, case, prompt=False) == expected


@pytest.mark.parametrize("name", CONVERSATIONS)
def test_the_template_and_ossias_renderer_agree(name: str, tokenizer: PreTrainedTokenizerFast) -> None:
    case = CONVERSATIONS[name]
    rows = case["messages"]
    keys = {"model_identity": "identity", "knowledge_cutoff": "knowledge_cutoff", "current_date": "current_date"}
    system = System(**{ours: case[theirs] for theirs, ours in keys.items() if theirs in case})
    open_calls = bool(rows[-1].get("tool_calls"))
    if open_calls:
        rows = [*rows, *(_result("ok", call["id"]) for call in rows[-1]["tool_calls"])]
    conversation = conversation_from_messages(
        rows, tools=case.get("tools"), reasoning_effort=case.get("reasoning_effort"), system=system
    )
    assert _by_template(tokenizer, case | {"messages": rows}, prompt=True) == renderer().completion(conversation)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"role": "function", "content": "x"}, "role function is not one of system"),
        ({"role": "assistant", "channel": "analysis", "content": "x"}, "names its channel"),
    ],
)
def test_the_template_refuses_what_it_would_otherwise_leave_out(
    row: dict[str, Any], message: str, tokenizer: PreTrainedTokenizerFast
) -> None:
    with pytest.raises(TemplateError, match=message):
        _by_template(tokenizer, {"messages": [_user("Hi"), row]}, prompt=True)
