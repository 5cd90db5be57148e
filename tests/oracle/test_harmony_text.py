"""Our token ids and tool types against openai-harmony 0.0.8, on generated texts and schemas and on real files."""

from __future__ import annotations

import inspect
import types
from pathlib import Path
from random import Random
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ossia.errors import HarmonyError
from ossia.harmony import Conversation, Message, Tool
from ossia.harmony.tools import builtin_tools, function_tools
from tests.harmony.support import TEXTS, library, library_messages, o200k, oracle, renderer, schemas

PIECES = [
    "a",
    "A",
    "bb",
    "Zz",
    " ",
    "  ",
    "\n",
    "\r\n",
    "\t",
    "1",
    "22",
    "é",
    "ß",
    "日本",
    "👩‍👩‍👧",
    "\u0301",
    "'s",
    "'LL",
    "...",
]
PIECES += [
    "/",
    "//",
    "_",
    "-",
    "<|",
    "|>",
    "\u00a0",
    "\u3000",
    "ǅ",
    "ʰ",
    "Ⅷ",
    "٣",
    "ा",
    "\x00",
    "=",
    "the",
    "ing",
    "ство",
]


def settled(examples: int) -> settings:
    checks = list(HealthCheck)
    return settings(max_examples=examples, derandomize=True, deadline=None, database=None, suppress_health_check=checks)


def library_tools(tools: list[Tool]) -> str:
    messages = library_messages(Conversation((), tools=tuple(tools)))
    text = oracle().decode(oracle().render(messages[1]))
    return text.removeprefix("<|start|>developer<|message|>").removesuffix("<|end|>")


@settled(400)
@given(st.one_of(TEXTS, st.text(max_size=120), st.lists(st.sampled_from(PIECES), max_size=40).map("".join)))
def test_generated_text_has_the_ids_of_the_library(text: str) -> None:
    assert o200k().encode(text) == oracle().encode(text, disallowed_special=())


def test_source_code_and_long_runs_have_the_ids_of_the_library() -> None:
    random = Random(0)
    texts = [Path(__file__).read_text(encoding="utf-8"), inspect.getsource(types), inspect.getsource(inspect)]
    texts += [random.choice("aA bx=-_.*#01\n") * random.randint(1, 300) + random.choice(PIECES) for _ in range(200)]
    for text in texts:
        assert o200k().encode(text) == oracle().encode(text, disallowed_special=())


@settled(500)
@given(schemas().filter(lambda schema: isinstance(schema, dict)), TEXTS)
def test_generated_schemas_become_the_types_of_the_library(schema: dict[str, Any], description: str) -> None:
    tools = [Tool("call-me", description, schema), Tool("next", "", None)]
    assert function_tools(tools) == library_tools(tools)


ONE = {"type": "string", "description": "one", "default": "x"}
TWO = {"type": "number", "description": "two", "default": 2, "nullable": True}
PICK = {"type": "string", "enum": ["a", "b"], "default": "a"}


@pytest.mark.parametrize(
    "schema",
    [
        {"description": "one", "oneOf": [ONE, TWO]},
        {"description": "two", "oneOf": [ONE, TWO]},
        {"description": "other", "oneOf": [ONE, TWO, PICK], "default": "x"},
        {"oneOf": [ONE, TWO, PICK], "enum": ["x"], "default": "x", "examples": ["x"], "title": "Any"},
        {"oneOf": [], "description": "none"},
        {"type": "array", "items": {"oneOf": [ONE, TWO, PICK]}},
        {"type": "array", "items": {"type": "object", "description": "d", "properties": {"x": ONE, "y": PICK}}},
        {"type": ["integer", "null"], "nullable": True},
        {"type": "object", "additionalProperties": {"type": "string"}},
        {"$ref": "#/$defs/x"},
        {"allOf": [ONE], "anyOf": [TWO], "const": 3, "format": "date"},
    ],
)
def test_schemas_with_alternatives_become_the_types_of_the_library(schema: dict[str, Any]) -> None:
    nested = {"type": "object", "properties": {"it": schema, "in": {"type": "object", "properties": {"it": schema}}}}
    tools = [Tool("f", "d", schema), Tool("g", "d", nested)]
    assert function_tools(tools) == library_tools(tools)


@settled(500)
@given(
    st.one_of(
        st.floats(allow_nan=False, allow_infinity=False, min_value=-1e300, max_value=1e300),
        st.integers(-(2**80), 2**80),
        st.sampled_from([1e16, 1e15, 1e-5, -1.5e-5, 9.99e-5, 1e-4, 1e-6, -0.0, 5e-324, 2**63, 2**64, -(2**63) - 1]),
    )
)
def test_default_numbers_are_written_like_the_library(number: float) -> None:
    tool = Tool("f", "", {"type": "object", "properties": {"x": {"type": "number", "default": number}}})
    assert function_tools([tool]) == library_tools([tool])


@pytest.mark.parametrize("number", [float("nan"), float("inf"), -float("inf"), 10**400])
def test_a_default_that_json_lacks_is_refused(number: float) -> None:
    tool = Tool("f", "", {"type": "object", "properties": {"x": {"default": number}}})
    with pytest.raises(HarmonyError, match="JSON number"):
        function_tools([tool])


@pytest.mark.parametrize("names", [("browser",), ("python",), ("python", "browser")])
def test_builtin_tools_read_like_the_library(names: Any) -> None:
    head = library.SystemContent.new()
    for name in names:
        head = head.with_browser_tool() if name == "browser" else head.with_python_tool()
    text = oracle().decode(oracle().render(library.Message.from_role_and_content(library.Role.SYSTEM, head)))
    assert f"\n\n{builtin_tools(names)}\n\n# Valid channels" in text


@settled(300)
@given(
    st.builds(
        Message,
        role=st.sampled_from(["user", "assistant", "developer", "tool"]),
        content=TEXTS,
        channel=st.none() | TEXTS,
        recipient=st.none() | TEXTS | st.just("all"),
        name=TEXTS.filter(bool),
        content_type=st.none() | TEXTS | st.sampled_from(["<|constrain|>", "<|constrain|>json", "<|constrain|> x"]),
    )
)
def test_headers_of_any_text_have_the_ids_of_the_library(message: Message) -> None:
    ours = renderer().completion(Conversation((message,)))
    system, theirs = map(oracle().render, library_messages(Conversation((message,))))
    assert ours[len(system) : -2] == theirs
