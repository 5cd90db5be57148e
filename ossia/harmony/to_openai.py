"""Harmony messages to OpenAI chat messages: the way back from `chat.py`."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any, Literal

from ossia.harmony.chat import INSTRUCTIONS
from ossia.harmony.messages import Message

Slot = Literal["reasoning", "content", "tool_calls"]
SETTINGS = ("train", "weight")


def messages_to_openai(messages: Sequence[Message], reasoning_key: str = "reasoning_content") -> list[dict[str, Any]]:
    """Consecutive assistant messages share a row where one row can say them: reasoning, content, then calls.

    reasoning_key  the key for analysis; `conversation_from_messages` reads thinking, reasoning and reasoning_content
    Messages that `conversation_from_messages` made read back equal. Calls get the ids call_1, call_2, ... in order; a
    sampled call's own channel and content type are not kept.
    """
    writer = _Writer(reasoning_key)
    for message, following in pairwise([*messages, None]):
        assert message is not None
        writer.add(message, following)
    return writer.rows


class _Writer:
    """Holds the rows so far, what the last of them can still take, and the calls without a result."""

    def __init__(self, reasoning_key: str) -> None:
        self.rows: list[dict[str, Any]] = []
        self._reasoning_key = reasoning_key
        self._room: tuple[Slot, ...] = ()
        self._calls: list[dict[str, Any]] = []
        self._waiting: list[dict[str, Any]] = []

    def add(self, message: Message, following: Message | None) -> None:
        """Write one message; `following` is the one after it."""
        if message.role == "tool":
            self._tool(message)
        elif message.role != "assistant":
            text = message.content.removeprefix(INSTRUCTIONS) if message.role == "developer" else message.content
            named = {} if message.name is None else {"name": message.name}
            self._row({"role": message.role, **named, "content": text, **_settings(message)})
        elif message.recipient is not None:
            self._call(message, message.recipient)
        elif message.channel == "analysis":
            self._assistant(message, "reasoning", ("content", "tool_calls"))[self._reasoning_key] = message.content
        elif message.channel != "commentary":
            self._assistant(message, "content", ())["content"] = message.content
        elif _is_preamble(message, following):
            self._assistant(message, "content", ("tool_calls",))["content"] = message.content
        else:
            channel = {"channel": "commentary", "content": message.content}
            self._row({"role": "assistant", **channel, **_settings(message)})

    def _row(self, row: dict[str, Any], room: tuple[Slot, ...] = ()) -> dict[str, Any]:
        self.rows.append(row)
        self._room = room
        return row

    def _assistant(self, message: Message, slot: Slot, room: tuple[Slot, ...]) -> dict[str, Any]:
        """The last row if it has room for `slot`, else a new one; it has `room` afterwards."""
        settings = _settings(message)
        if slot in self._room and settings == {key: self.rows[-1][key] for key in SETTINGS if key in self.rows[-1]}:
            self._room = room
            return self.rows[-1]
        return self._row({"role": "assistant", "content": None, **settings}, room)

    def _call(self, message: Message, recipient: str) -> None:
        function = {"name": recipient.removeprefix("functions."), "arguments": message.content}
        call = {"id": f"call_{len(self._calls) + 1}", "type": "function", "function": function}
        self._calls.append(call)
        self._waiting.append(call)
        row = self._assistant(message, "tool_calls", ("tool_calls",))
        row.setdefault("tool_calls", []).append(call)

    def _tool(self, message: Message) -> None:
        name = (message.name or "").removeprefix("functions.")
        call = next((call for call in self._waiting if call["function"]["name"] == name), None)
        answered = {}
        if call is not None:
            self._waiting.remove(call)
            answered = {"tool_call_id": call["id"]}
        self._row({"role": "tool", **answered, "name": name, "content": message.content, **_settings(message)})


def _settings(message: Message) -> dict[str, Any]:
    """`train` and `weight` where they say something."""
    train = {} if message.train is None else {"train": message.train}
    return train if message.weight == 1 else {**train, "weight": message.weight}


def _is_preamble(message: Message, following: Message | None) -> bool:
    """Whether a commentary message reads back as such from the content of the call's row after it."""
    if following is None or following.role != "assistant" or following.recipient is None:
        return False
    return bool(message.content) and _settings(message) == _settings(following)
