"""OpenAI chat messages to a Harmony conversation (`to_openai.py` has the way back).

| row                                      | becomes                                                              |
|------------------------------------------|----------------------------------------------------------------------|
| system, developer                        | the developer message's instructions; later ones a developer message |
| thinking, reasoning or reasoning_content | analysis                                                             |
| assistant content beside tool_calls      | commentary (a preamble)                                              |
| tool_calls                               | commentary to=functions.NAME, arguments as they were written         |
| tool                                     | functions.NAME to=assistant, on its call's channel                   |
| assistant content                        | final                                                                |

An assistant row may name a `channel` (and `recipient`, `content_type`) itself. Any row may have `train` and `weight`.
A key whose value is null is an absent key, in a row, a call and a tool: tables (Arrow, Parquet, what is exported from
them) give every object the keys that any of them has. Only inside the arguments of a call is null a value like others.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from ossia.errors import HarmonyError
from ossia.harmony.messages import CHANNELS, CONSTRAIN_JSON, ROLES, WEIGHTS, Conversation, Effort, Message, System
from ossia.harmony.openai_tools import (
    NAME,
    check_keys,
    check_texts,
    fail,
    function_called,
    name_of,
    nearest,
    seen,
    tools_from_openai,
)
from ossia.harmony.vocab import check_field

THINKING = ("thinking", "reasoning", "reasoning_content")
ASSISTANT_KEYS = (*THINKING, "tool_calls", "channel", "recipient", "content_type", "refusal")
KEYS = ("role", "content", "name", "train", "weight", "tool_call_id", *ASSISTANT_KEYS)
IGNORED_KEYS = ("id", "annotations", "metadata", "timestamp")  # bookkeeping that says nothing to the model
USER_NAME = re.compile(r"[^\s<|\\/>]+")
INSTRUCTIONS = "# Instructions\n\n"
CONTENT_TYPE = re.compile(r"(<\|constrain\|>)?[A-Za-z0-9_.+/-]+")
PART_KEYS = ("type", "text", "refusal")
_PARTS = {"text": "text", "input_text": "text", "output_text": "text", "refusal": "refusal"}  # kind -> key of its text
_IGNORED_PART_KEYS = ("id", "annotations", "logprobs", "cache_control")


def conversation_from_messages(
    messages: Sequence[Mapping[str, Any]],
    *,
    tools: Sequence[Mapping[str, Any]] | None = None,
    developer: str | None = None,
    reasoning_effort: Effort | None = None,
    system: System | None = None,
) -> Conversation:
    """Read OpenAI chat messages.

    tools             OpenAI tools, `{"type": "function", "function": {...}}` or the bare function
    developer         instructions that come before those of the rows
    reasoning_effort  replaces the system message's
    system            identity, cutoff, date, effort and builtin tools (default: System())
    Raises            HarmonyError whose field is like `messages[2].tool_calls[0].function.name`
    """
    head = system or System()
    if reasoning_effort is not None:
        head = replace(head, reasoning_effort=reasoning_effort)
    return read_chat(messages, tools=tools, developer=developer, system=head).conversation


class Chat(NamedTuple):
    """OpenAI chat messages that were read.

    fields  where the text of each of the conversation's messages stands: `messages[2].tool_calls[0].function.arguments`
    notes   a line for each thing in the tools' schemas that is legal and says nothing to the model
    """

    conversation: Conversation
    fields: tuple[str, ...]
    notes: list[str]


def read_chat(
    messages: Sequence[Mapping[str, Any]],
    *,
    tools: Sequence[Mapping[str, Any]] | None,
    developer: str | None,
    system: System,
) -> Chat:
    """`conversation_from_messages`, and where each message came from. Raises HarmonyError naming the field."""
    if isinstance(messages, str) or not isinstance(messages, Sequence) or not messages:
        fail("messages", f"expected a list with at least one message, found {seen(messages)}")
    notes: list[str] = []
    functions = tools_from_openai(tools, notes) if tools is not None else ()
    names = {tool.name for tool in functions} if tools is not None else None
    reader = _Reader(names, frozenset(system.builtin_tools), [] if developer is None else [developer])
    for index, row in enumerate(messages):
        reader.read(row, f"messages[{index}]")
    instructions = "\n\n".join(reader.instructions) if reader.instructions else None
    conversation = Conversation(tuple(reader.messages), system, instructions, functions)
    return Chat(conversation, tuple(reader.fields), notes)


class _Call(NamedTuple):
    """A call that has no result yet."""

    id: str | None
    recipient: str
    channel: str | None
    field: str


@dataclass
class _Reader:
    """Takes row after row; holds what was read and which calls wait for their results."""

    functions: set[str] | None  # the names that may be called; None: no tools were given, any
    builtin: frozenset[str]
    instructions: list[str]

    def __post_init__(self) -> None:
        self.messages: list[Message] = []
        self.fields: list[str] = []  # where the text of each stands
        self.waiting: list[_Call] = []

    def read(self, row: Mapping[str, Any], field: str) -> None:
        """Read one row; `field` names it in errors."""
        if not isinstance(row, Mapping):
            fail(field, f"expected an object with role and content, found {seen(row)}")
        role = row.get("role")
        if role not in ROLES:
            fail(f"{field}.role", f"found {seen(role)}; allowed: {', '.join(ROLES)}{nearest(role, ROLES)}")
        _check_keys(row, role, field)
        if role != "tool" and self.waiting:
            call = self.waiting[0]
            fail(call.field, f"the call of {call.recipient} has no result (role tool) before {field}")
        if role == "assistant":
            self._assistant(row, field)
        elif role == "tool":
            self._tool(row, field)
        elif role == "user":
            text, name = _text(row.get("content"), f"{field}.content"), _given(row, "name")
            if name is not None and not (isinstance(name, str) and USER_NAME.fullmatch(name)):
                fail(f"{field}.name", f"expected a name without spaces or any of <>|/\\, found {seen(name)}")
            check_field(name or "", f"{field}.name")
            self._add(row, field, Message("user", text, name=name))
        elif self.messages:
            self._add(row, field, Message("developer", INSTRUCTIONS + _text(row.get("content"), f"{field}.content")))
        else:
            text = _text(row.get("content"), f"{field}.content")
            self.instructions.append(_with_settings(row, field, Message("developer", text)).content)

    def _add(self, row: Mapping[str, Any], field: str, message: Message, place: str = "") -> None:
        self.messages.append(_with_settings(row, field, message))
        self.fields.append(place or f"{field}.content")

    def _assistant(self, row: Mapping[str, Any], field: str) -> None:
        thinking = _thinking(row, field)
        calls = row.get("tool_calls")
        calls = () if calls is None or calls in ("", {}) else calls
        content = None if row.get("content") is None else _text(row["content"], f"{field}.content")
        if (refusal := row.get("refusal")) not in (None, ""):
            if content:
                fail(f"{field}.refusal", "an assistant message has content or a refusal, not both")
            content = _text(refusal, f"{field}.refusal")
        native = row.get("channel") is not None or row.get("recipient") is not None
        if isinstance(calls, str) or not isinstance(calls, Sequence):
            fail(f"{field}.tool_calls", f"expected a list of calls, found {seen(calls)}")
        if thinking is None and not calls and not content and not native:
            needs = f"content, tool_calls, or one of {', '.join(THINKING)}"
            fail(field, f"an assistant message needs {needs}; all are empty")
        if row.get("content_type") not in (None, "") and not native:
            fail(f"{field}.content_type", "needs a channel beside it; a message without one has no content type")
        if thinking is not None:
            self._add(row, field, Message("assistant", thinking, "analysis"), field)
        if native:
            self._native(row, field, content)
        elif content is not None and (content or not calls):
            self._add(row, field, Message("assistant", content, "commentary" if calls else "final"))
        for index, call in enumerate(calls):
            self._call(row, field, call, f"{field}.tool_calls[{index}]")

    def _native(self, row: Mapping[str, Any], field: str, content: str | None) -> None:
        """A row that says its channel itself."""
        channel, recipient, content_type = row.get("channel"), row.get("recipient"), row.get("content_type")
        if channel not in CHANNELS:
            fail(
                f"{field}.channel", f"found {seen(channel)}; allowed: {', '.join(CHANNELS)}{nearest(channel, CHANNELS)}"
            )
        if content is None or row.get("tool_calls"):
            fail(f"{field}.channel", "a message with a channel of its own needs content, and has no tool_calls")
        if recipient is not None and (not isinstance(recipient, str) or not NAME.fullmatch(recipient)):
            fail(f"{field}.recipient", f"expected a name like functions.get_weather, found {seen(recipient)}")
        if not isinstance(content_type, str | None):
            fail(f"{field}.content_type", f"expected text like <|constrain|>json, found {seen(content_type)}")
        check_field(content_type or "", f"{field}.content_type")
        if content_type and not CONTENT_TYPE.fullmatch(content_type):
            fail(f"{field}.content_type", f"expected a word like json or <|constrain|>json, found {seen(content_type)}")
        recipient = None if recipient == "all" else recipient  # as Harmony takes a message without one
        if recipient is not None and channel == "final":
            fail(f"{field}.recipient", "an answer, on the channel final, has none; calls are in commentary or analysis")
        if recipient is not None and recipient.startswith("functions."):
            self._check_known(name_of(recipient, f"{field}.recipient"), f"{field}.recipient")
        message = Message("assistant", content, channel, recipient, content_type=content_type or None)
        self._add(row, field, message)
        if recipient is not None:
            self.waiting.append(_Call(None, recipient, channel, field))

    def _call(self, row: Mapping[str, Any], row_field: str, call: Any, field: str) -> None:
        function, function_field = function_called(call, field)
        number = _given(call, "id")
        if not isinstance(number, str | None):
            fail(f"{field}.id", f"expected text, found {seen(number)}")
        if number is not None and any(number == other.id for other in self.waiting):
            fail(f"{field}.id", f"{seen(number)} is the id of an earlier call too; each call needs its own")
        name = name_of(function.get("name"), f"{function_field}.name")
        arguments = _arguments(function.get("arguments"), f"{function_field}.arguments")
        if self._is_builtin(name):
            message = Message("assistant", arguments, "analysis", name, content_type="code")
        else:
            self._check_known(name, f"{function_field}.name")
            message = Message("assistant", arguments, "commentary", f"functions.{name}", content_type=CONSTRAIN_JSON)
        self._add(row, row_field, message, f"{function_field}.arguments")
        assert message.recipient is not None
        self.waiting.append(_Call(number, message.recipient, message.channel, field))

    def _is_builtin(self, name: str) -> bool:
        return name.partition(".")[0] in self.builtin and name not in (self.functions or ())

    def _check_known(self, name: str, field: str) -> None:
        if self.functions is not None and name not in self.functions:
            known = ", ".join(sorted(self.functions)) or "none"
            fail(field, f"{name} is not among the row's tools; known: {known}{nearest(name, self.functions)}")

    def _tool(self, row: Mapping[str, Any], field: str) -> None:
        call = self._match(row, field)
        self.waiting.remove(call)
        text = _text(row.get("content"), f"{field}.content")
        self._add(row, field, Message("tool", text, call.channel, "assistant", call.recipient))

    def _match(self, row: Mapping[str, Any], field: str) -> _Call:
        """The waiting call that a tool row answers: by its id, else by name, else the only one."""
        number, name = _given(row, "tool_call_id"), _given(row, "name")
        if not isinstance(number, str | None):
            fail(f"{field}.tool_call_id", f"expected text, found {seen(number)}")
        open_calls = ", ".join(f"{call.id or 'no id'} ({call.recipient})" for call in self.waiting)
        if not self.waiting:
            fail(field, "a tool result without a call before it that waits for one")
        candidates = self.waiting
        if number is not None and any(call.id is not None for call in candidates):
            candidates = [call for call in candidates if call.id == number]
            if not candidates:
                fail(f"{field}.tool_call_id", f"{seen(number)} answers no open call; open: {open_calls}")
        if name is not None:
            candidates = [call for call in candidates if name in (call.recipient, call.recipient.partition(".")[2])]
            if not candidates:
                fail(f"{field}.name", f"{seen(name)} answers no open call; open: {open_calls}")
        elif len(candidates) > 1:
            fail(field, f"tool_call_id or name must say which call this answers; open: {open_calls}")
        return candidates[0]


def _given(row: Mapping[str, Any], key: str) -> Any:
    """The value of a key; an empty text says no more than null."""
    value = row.get(key)
    return None if value == "" else value


def _with_settings(row: Mapping[str, Any], field: str, message: Message) -> Message:
    """The message with the row's `train` and `weight`."""
    train, weight = row.get("train"), row.get("weight")
    if not isinstance(train, bool | None):
        fail(f"{field}.train", f"expected true or false, found {seen(train)}")
    if isinstance(weight, bool) or not isinstance(weight, int | float | None):
        fail(f"{field}.weight", f"expected a number >= 0, found {seen(weight)}")
    if train is None and weight is None:
        return message
    if message.role != "assistant" and weight not in (None, 0, 1):
        fail(f"{field}.weight", f"found {seen(weight)}, but only assistant messages are trained; leave it out")
    if train and weight == 0:
        fail(f"{field}.weight", "is 0, which is not trained, but train is true; keep one of them")
    try:
        return replace(message, train=train, weight=1.0 if weight is None else float(weight))
    except OverflowError:
        fail(f"{field}.weight", f"found a number of {len(str(weight))} digits; {WEIGHTS}")
    except HarmonyError as error:
        fail(f"{field}.{error.field}", str(error).removeprefix(f"{error.field}: "))


def _thinking(row: Mapping[str, Any], field: str) -> str | None:
    given = {key: row[key] for key in THINKING if row.get(key) not in (None, "")}
    texts = {_text(value, f"{field}.{key}") for key, value in given.items()}
    if len(texts) > 1:
        fail(field, f"{' and '.join(given)} say different things; keep one of them")
    return texts.pop() if texts else None


def _text(value: Any, field: str) -> str:
    """Text, or a list of text parts, as one string."""
    if isinstance(value, str):
        check_field(value, field)
        return value
    if not isinstance(value, Sequence) or isinstance(value, bytes):
        fail(field, f"expected text or a list of text parts, found {seen(value)}")
    texts = []
    for index, part in enumerate(value):
        if isinstance(part, str):
            check_field(part, f"{field}[{index}]")
            texts.append(part)
            continue
        key = _PARTS.get(str(part.get("type")), "") if isinstance(part, Mapping) else ""
        if not isinstance(part, Mapping) or not isinstance(part.get(key), str):
            expected = 'expected {"type": "text", "text": ...} (gpt-oss reads text only)'
            fail(f"{field}[{index}]", f"{expected}, found {seen(part)}")
        for setting in ("train", "weight"):
            if part.get(setting) is not None:
                fail(f"{field}[{index}].{setting}", "is for a whole message; put it beside role")
        check_keys(part, f"{field}[{index}]", PART_KEYS, _IGNORED_PART_KEYS)
        check_field(part[key], f"{field}[{index}].{key}")
        texts.append(part[key])
    return "".join(texts)


def _arguments(value: Any, field: str) -> str:
    """Arguments as text: a string is kept as it is, an object becomes compact JSON."""
    if isinstance(value, str):
        check_field(value, field)
        return value
    if value is None:
        return "{}"
    if not isinstance(value, Mapping):
        fail(field, f"expected a JSON object or its text, found {seen(value)}")
    check_texts(value, field)
    try:
        return json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    except (TypeError, ValueError) as error:
        fail(field, f"can't be written as JSON: {error}")


def _check_keys(row: Mapping[str, Any], role: str, field: str) -> None:
    """Refuse keys that would be skipped in silence; null and empty values say nothing and may stand anywhere."""
    allowed = {"role", "content", "train", "weight", *IGNORED_KEYS}
    allowed |= {"assistant": set(ASSISTANT_KEYS), "tool": {"name", "tool_call_id"}, "user": {"name"}}.get(role, set())
    for key, value in row.items():
        if key in allowed or value is None or value in ("", [], {}):
            continue
        if key in KEYS:
            fail(f"{field}.{key}", f"a message of role {role} has no {key}")
        fail(f"{field}.{key}", f"unknown key; allowed: {', '.join(KEYS)}{nearest(key, KEYS)}")
