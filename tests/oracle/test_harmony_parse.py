"""Our parser against openai-harmony's, on rendered conversations and on ids that no renderer would write."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import openai_harmony as library
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ossia.harmony import Conversation, Message, StreamParser
from tests.harmony.support import CONVERSATIONS, o200k, oracle, renderer, trained_runs

SPECIALS = ["<|start|>", "<|end|>", "<|message|>", "<|channel|>", "<|constrain|>", "<|return|>", "<|call|>"]
WORDS = [
    "assistant",
    "user",
    "analysis",
    "final",
    "commentary",
    " to=functions.f",
    " code",
    "json",
    " ",
    "\n",
    " zebra",
]
WORDS += ["Grüße", " 你好", "🎻", "functions.f to=assistant"]


def settled(examples: int) -> settings:
    checks = list(HealthCheck)
    return settings(max_examples=examples, derandomize=True, deadline=None, database=None, suppress_health_check=checks)


def parse(ids: list[int], role: Any) -> StreamParser:
    parser = StreamParser(o200k(), role)
    for number in ids:
        parser.push(number)
    parser.finish()
    return parser


def library_parse(ids: list[int], role: Any) -> list[dict[str, Any]] | None:
    """The library's messages, or None where it refuses the ids."""
    parser = library.StreamableParser(oracle(), None if role is None else library.Role(role))
    try:
        for number in ids:
            parser.process(number)
        parser.process_eos()
    except library.HarmonyError:
        return None
    return [message.to_dict() for message in parser.messages]


def as_dict(message: Message) -> dict[str, Any]:
    content = [{"type": "text", "text": message.content}]
    made = {"role": message.role, "name": message.name, "content": content}
    keys = ("channel", "recipient", "content_type")
    return made | {key: value for key in keys if (value := getattr(message, key)) is not None}


def comparable(messages: list[Message]) -> list[dict[str, Any]]:
    return [as_dict(message) for message in messages]


def reads_better_here(message: Message) -> bool:
    """Headers that the library can't read back: a name after the role, and a content type without a recipient."""
    named = message.name is not None and message.role != "tool"
    return named or (message.content_type is not None and message.recipient is None) or message.recipient == "all"


@settled(200)
@given(CONVERSATIONS)
def test_rendered_conversations_parse_back_like_the_library(conversation: Conversation) -> None:
    ids = renderer().training_ids(conversation)
    parser = parse(ids, None)
    assert parser.problems == []
    if not any(map(reads_better_here, conversation.messages)):
        assert comparable(parser.messages) == library_parse(ids, None)
    kept = [message for message in parser.messages if message.role in ("user", "assistant", "tool")]
    said = [m for m in conversation.messages if m.role != "developer" and m.recipient != "all"]
    assert [message for message in said if message not in kept] == [
        message for message in said if message.channel == "analysis" and message not in kept
    ]


@settled(200)
@given(CONVERSATIONS)
def test_what_is_trained_parses_back_to_the_assistant_messages(conversation: Conversation) -> None:
    read: list[Message] = []
    for sample in renderer().samples(conversation):
        for _, sampled in trained_runs(sample):
            parser = parse(sampled, "assistant")
            read += parser.messages
            assert parser.problems == []
            if not any(map(reads_better_here, parser.messages)):
                assert comparable(parser.messages) == library_parse(sampled, "assistant")
    said = [message for message in conversation.messages if message.role == "assistant"]
    as_read = [
        replace(message, recipient=None if message.recipient == "all" else message.recipient) for message in said
    ]
    assert sorted(map(repr, read)) == sorted(map(repr, as_read))


@st.composite
def odd_ids(draw: st.DrawFn) -> list[int]:
    """Special tokens and words in any order, and now and then any id at all."""
    pieces = draw(st.lists(st.sampled_from([*SPECIALS, *SPECIALS, *WORDS]) | st.integers(0, 201_087), max_size=14))
    special, encode = o200k().special, o200k().encode
    ids: list[int] = []
    for piece in pieces:
        ids += [piece] if isinstance(piece, int) else [special[piece]] if piece in special else encode(piece)
    return ids


@settled(2000)
@given(odd_ids(), st.sampled_from(["assistant", None]))
def test_what_the_library_can_parse_parses_the_same_and_the_rest_is_kept(ids: list[int], role: Any) -> None:
    parser = parse(ids, role)
    theirs = library_parse(ids, role)
    begins_itself = role is not None and ids[:1] == [o200k().special["<|start|>"]]  # the library: part of the header
    if theirs is not None and not begins_itself and not any("header" in p.what for p in parser.problems):
        ours = comparable(parser.messages)
        lone_type = [m.content_type is not None and m.recipient is None for m in parser.messages]
        assert [m for m, lone in zip(ours, lone_type, strict=True) if not lone] == [
            m for m, lone in zip(theirs, lone_type, strict=True) if not lone
        ]
    if theirs is None:
        assert parser.problems
    found = " ".join([str(as_dict(message)) for message in parser.messages] + [p.text for p in parser.problems])
    for word in ("zebra", "Grüße", "你好", "🎻"):
        assert found.count(word) >= o200k().decode(ids).count(word)
