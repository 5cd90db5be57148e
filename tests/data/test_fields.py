"""An error names the field that the user wrote, not what it became on the way to Harmony."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest

from ossia.errors import DataError
from tests.data.conftest import Read
from tests.data.test_formats import ANSWER, USER, messages, turns

EVERY_TEXT = messages(
    {"role": "system", "content": "one"},
    {"role": "developer", "content": "two"},
    {"role": "user", "content": [{"type": "text", "text": "three"}, "four"], "name": "eve"},
    {
        "role": "assistant",
        "thinking": "five",
        "content": "six",
        "tool_calls": [
            {"id": "1", "function": {"name": "weather", "arguments": '{"city": "Oslo"}'}},
            {"id": "2", "function": {"name": "weather", "arguments": {"city": "Rome"}}},
        ],
    },
    {"role": "tool", "tool_call_id": "1", "content": "seven"},
    {"role": "tool", "tool_call_id": "2", "content": "eight"},
    {"role": "developer", "content": "nine"},
    {"role": "assistant", "channel": "commentary", "content_type": "text", "content": "ten"},
    {"role": "assistant", "content": "eleven"},
    developer="twelve",
    identity="thirteen",
    knowledge_cutoff="fourteen",
    current_date="2015-01-05",
    tools=[
        {
            "type": "function",
            "function": {"name": "weather", "description": "sixteen", "parameters": {"description": "seventeen"}},
        }
    ],
)
TEXTS: list[tuple[dict[str, Any], dict[str, str], list[str]]] = [
    (
        EVERY_TEXT,
        {},
        [
            "messages[0].content",
            "messages[1].content",
            "messages[2].content[0].text",
            "messages[2].content[1]",
            "messages[2].name",
            "messages[3].thinking",
            "messages[3].content",
            "messages[3].tool_calls[0].function.arguments",
            "messages[3].tool_calls[1].function.arguments",
            "messages[4].content",
            "messages[5].content",
            "messages[6].content",
            "messages[7].content_type",
            "messages[7].content",
            "messages[8].content",
            "developer",
            "identity",
            "knowledge_cutoff",
            "current_date",
            "tools[0].function.description",
            "tools[0].function.parameters.description",
        ],
    ),
    (
        turns(("system", "a"), ("human", "b"), ("function_call", '{"name": "f", "arguments": {"x": "c"}}'))
        | {"system": "d"},
        {},
        ["conversations[0].value", "conversations[1].value", "conversations[2].value", "system"],
    ),
    ({"instruction": "a", "output": "b", "reasoning": "c"}, {}, ["instruction", "output", "reasoning"]),
    ({"prompt": [USER], "completion": "b", "thinking": "c"}, {}, ["prompt[0].content", "completion", "thinking"]),
    ({"question": "a", "answer": "b"}, {"prompt": "question", "completion": "answer"}, ["question", "answer"]),
    ({"dialog": [USER, ANSWER]}, {"messages": "dialog"}, ["dialog[0].content", "dialog[1].content"]),
    ({"conversations": [USER, ANSWER]}, {}, ["conversations[1].content"]),
    ({"text": "a"}, {}, ["text"]),
]


@pytest.mark.parametrize(
    ("row", "columns", "field"), [(row, columns, field) for row, columns, fields in TEXTS for field in fields]
)
def test_half_a_character_is_told_by_the_rows_own_field(
    read: Read, row: dict[str, Any], columns: dict[str, str], field: str
) -> None:
    broken = json.loads(json.dumps(row))
    *path, last = (int(index) if index else name for name, index in re.findall(r"([a-z_]+)|\[(\d+)\]", field))
    inside = broken
    for piece in path:
        inside = inside[piece]
    if isinstance(inside[last], dict):
        inside, last = inside[last], "city"
    text = inside[last]  # inside the quotes where the text is JSON
    inside[last] = text.replace('"}', '\ud83d"}') if text.startswith("{") else f"{text}\ud83d"
    with pytest.raises(
        DataError, match=rf"rows0.jsonl:1: {re.escape(field)}(.city)?: the text has a lone surrogate U\+D83D"
    ):
        read(broken, columns=columns)
