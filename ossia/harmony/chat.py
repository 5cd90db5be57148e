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

import difflib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, NoReturn

from ossia.errors import HarmonyError
from ossia.harmony.messages import CHANNELS, CONSTRAIN_JSON, ROLES, Conversation, Effort, Message, System, Tool
from ossia.harmony.vocab import check_field

THINKING = ("thinking", "reasoning", "reasoning_content")
ASSISTANT_KEYS = (*THINKING, "tool_calls", "channel", "recipient", "content_type", "refusal")
KEYS = ("role", "content", "name", "train", "weight", "tool_call_id", *ASSISTANT_KEYS)
IGNORED_KEYS = ("id", "annotations", "metadata", "timestamp")  # bookkeeping that says nothing to the model
NAME = re.compile(r"[A-Za-z0-9_.-]+")
USER_NAME = re.compile(r"[^\s<|\\/>]+")
INSTRUCTIONS = "# Instructions\n\n"
_NULL_SAYS_SOMETHING = ("default", "const")  # in a JSON Schema; under any other key null is no schema and no setting


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
    if isinstance(messages, str) or not isinstance(messages, Sequence) or not messages:
        _fail("messages", f"expected a list with at least one message, found {_seen(messages)}")
    head = system or System()
    if reasoning_effort is not None:
        head = replace(head, reasoning_effort=reasoning_effort)
    functions = tools_from_openai(tools) if tools is not None else ()
    names = {tool.name for tool in functions} if tools is not None else None
    reader = _Reader(names, frozenset(head.builtin_tools), [] if developer is None else [developer])
    for index, row in enumerate(messages):
        reader.read(row, f"messages[{index}]")
    instructions = "\n\n".join(reader.instructions) if reader.instructions else None
    return Conversation(tuple(reader.messages), head, instructions, functions)


def tools_from_openai(tools: Sequence[Mapping[str, Any]]) -> tuple[Tool, ...]:
    """Read a list of OpenAI function tools. Raises HarmonyError naming the field, `tools[1].function.name`."""
    if isinstance(tools, str) or not isinstance(tools, Sequence):
        _fail("tools", f"expected a list of function tools, found {_seen(tools)}")
    found: dict[str, Tool] = {}
    for index, row in enumerate(tools):
        function, field = _function(row, f"tools[{index}]")
        name = _name(function.get("name"), f"{field}.name")
        description = function.get("description")
        parameters = function.get("parameters")
        if not isinstance(description, str | None):
            _fail(f"{field}.description", f"expected text, found {_seen(description)}")
        if not isinstance(parameters, Mapping | None):
            _fail(f"{field}.parameters", f"expected a JSON Schema object, found {_seen(parameters)}")
        _check_texts(function, field)
        if name in found:
            _fail(f"{field}.name", f"the tool {name} is listed twice")
        found[name] = Tool(name, description or "", None if parameters is None else _without_nulls(parameters))
    return tuple(found.values())


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
        self.waiting: list[_Call] = []

    def read(self, row: Mapping[str, Any], field: str) -> None:
        """Read one row; `field` names it in errors."""
        if not isinstance(row, Mapping):
            _fail(field, f"expected an object with role and content, found {_seen(row)}")
        role = row.get("role")
        if role not in ROLES:
            _fail(f"{field}.role", f"found {_seen(role)}; allowed: {', '.join(ROLES)}{_nearest(role, ROLES)}")
        _check_keys(row, role, field)
        if role != "tool" and self.waiting:
            call = self.waiting[0]
            _fail(call.field, f"the call of {call.recipient} has no result (role tool) before {field}")
        if role == "assistant":
            self._assistant(row, field)
        elif role == "tool":
            self._tool(row, field)
        elif role == "user":
            text, name = _text(row.get("content"), f"{field}.content"), row.get("name") or None
            if name is not None and not (isinstance(name, str) and USER_NAME.fullmatch(name)):
                _fail(f"{field}.name", f"expected a name without spaces or any of <>|/\\, found {_seen(name)}")
            check_field(name or "", f"{field}.name")
            self._add(row, field, Message("user", text, name=name))
        elif self.messages:
            self._add(row, field, Message("developer", INSTRUCTIONS + _text(row.get("content"), f"{field}.content")))
        else:
            text = _text(row.get("content"), f"{field}.content")
            self.instructions.append(_with_settings(row, field, Message("developer", text)).content)

    def _add(self, row: Mapping[str, Any], field: str, message: Message) -> None:
        self.messages.append(_with_settings(row, field, message))

    def _assistant(self, row: Mapping[str, Any], field: str) -> None:
        thinking = _thinking(row, field)
        calls = row.get("tool_calls") or ()
        content = None if row.get("content") is None else _text(row["content"], f"{field}.content")
        if (refusal := row.get("refusal")) is not None:
            if content:
                _fail(f"{field}.refusal", "an assistant message has content or a refusal, not both")
            content = _text(refusal, f"{field}.refusal")
        native = row.get("channel") is not None or row.get("recipient") is not None
        if thinking is None and not calls and not content and not native:
            needs = f"content, tool_calls, or one of {', '.join(THINKING)}"
            _fail(field, f"an assistant message needs {needs}; all are empty")
        if isinstance(calls, str) or not isinstance(calls, Sequence):
            _fail(f"{field}.tool_calls", f"expected a list of calls, found {_seen(calls)}")
        if thinking is not None:
            self._add(row, field, Message("assistant", thinking, "analysis"))
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
            _fail(f"{field}.channel", f"found {_seen(channel)}; allowed: {', '.join(CHANNELS)}")
        if content is None or row.get("tool_calls"):
            _fail(f"{field}.channel", "a message with a channel of its own needs content, and has no tool_calls")
        if recipient is not None and (not isinstance(recipient, str) or not NAME.fullmatch(recipient)):
            _fail(f"{field}.recipient", f"expected a name like functions.get_weather, found {_seen(recipient)}")
        if not isinstance(content_type, str | None):
            _fail(f"{field}.content_type", f"expected text like <|constrain|>json, found {_seen(content_type)}")
        check_field(content_type or "", f"{field}.content_type")
        message = Message("assistant", content, channel, recipient, content_type=content_type)
        self._add(row, field, message)
        if recipient is not None:
            self.waiting.append(_Call(None, recipient, channel, field))

    def _call(self, row: Mapping[str, Any], row_field: str, call: Any, field: str) -> None:
        function, function_field = _function(call, field)
        number = call.get("id")
        if not isinstance(number, str | None):
            _fail(f"{field}.id", f"expected text, found {_seen(number)}")
        name = _name(function.get("name"), f"{function_field}.name")
        arguments = _arguments(function.get("arguments"), f"{function_field}.arguments")
        if self._is_builtin(name):
            message = Message("assistant", arguments, "analysis", name, content_type="code")
        else:
            self._check_known(name, f"{function_field}.name")
            message = Message("assistant", arguments, "commentary", f"functions.{name}", content_type=CONSTRAIN_JSON)
        self._add(row, row_field, message)
        assert message.recipient is not None
        self.waiting.append(_Call(number, message.recipient, message.channel, field))

    def _is_builtin(self, name: str) -> bool:
        return name.partition(".")[0] in self.builtin and name not in (self.functions or ())

    def _check_known(self, name: str, field: str) -> None:
        if self.functions is not None and name not in self.functions:
            known = ", ".join(sorted(self.functions)) or "none"
            _fail(field, f"{name} is not among the row's tools; known: {known}{_nearest(name, self.functions)}")

    def _tool(self, row: Mapping[str, Any], field: str) -> None:
        call = self._match(row, field)
        self.waiting.remove(call)
        text = _text(row.get("content"), f"{field}.content")
        self._add(row, field, Message("tool", text, call.channel, "assistant", call.recipient))

    def _match(self, row: Mapping[str, Any], field: str) -> _Call:
        """The waiting call that a tool row answers: by its id, else by name, else the only one."""
        number, name = row.get("tool_call_id"), row.get("name")
        open_calls = ", ".join(f"{call.id or 'no id'} ({call.recipient})" for call in self.waiting)
        if not self.waiting:
            _fail(field, "a tool result without a call before it that waits for one")
        candidates = self.waiting
        if number is not None and any(call.id is not None for call in candidates):
            candidates = [call for call in candidates if call.id == number]
            if not candidates:
                _fail(f"{field}.tool_call_id", f"{_seen(number)} answers no open call; open: {open_calls}")
        if name is not None:
            candidates = [call for call in candidates if name in (call.recipient, call.recipient.partition(".")[2])]
            if not candidates:
                _fail(f"{field}.name", f"{_seen(name)} answers no open call; open: {open_calls}")
        elif number is None and len(candidates) > 1:
            _fail(field, f"tool_call_id or name must say which call this answers; open: {open_calls}")
        return candidates[0]


def _with_settings(row: Mapping[str, Any], field: str, message: Message) -> Message:
    """The message with the row's `train` and `weight`."""
    train, weight = row.get("train"), row.get("weight")
    if not isinstance(train, bool | None):
        _fail(f"{field}.train", f"expected true or false, found {_seen(train)}")
    if isinstance(weight, bool) or not isinstance(weight, int | float | None):
        _fail(f"{field}.weight", f"expected a number >= 0, found {_seen(weight)}")
    if train is None and weight is None:
        return message
    try:
        return replace(message, train=train, weight=1.0 if weight is None else float(weight))
    except HarmonyError as error:
        _fail(f"{field}.{error.field}", str(error).removeprefix(f"{error.field}: "))


def _thinking(row: Mapping[str, Any], field: str) -> str | None:
    given = {key: row[key] for key in THINKING if row.get(key) not in (None, "")}
    texts = {_text(value, f"{field}.{key}") for key, value in given.items()}
    if len(texts) > 1:
        _fail(field, f"{' and '.join(given)} say different things; keep one of them")
    return texts.pop() if texts else None


def _text(value: Any, field: str) -> str:
    """Text, or a list of text parts, as one string."""
    if isinstance(value, str):
        check_field(value, field)
        return value
    if not isinstance(value, Sequence) or isinstance(value, bytes):
        _fail(field, f"expected text or a list of text parts, found {_seen(value)}")
    texts = []
    for index, part in enumerate(value):
        if isinstance(part, str):
            check_field(part, f"{field}[{index}]")
            texts.append(part)
            continue
        kind = part.get("type") if isinstance(part, Mapping) else None
        if kind not in ("text", "input_text", "output_text") or not isinstance(part.get("text"), str):
            expected = 'expected {"type": "text", "text": ...} (gpt-oss reads text only)'
            _fail(f"{field}[{index}]", f"{expected}, found {_seen(part)}")
        check_field(part["text"], f"{field}[{index}].text")
        texts.append(part["text"])
    return "".join(texts)


def _function(value: Any, field: str) -> tuple[Mapping[str, Any], str]:
    """The function's own object of a tool or a call, and its field: nested under `function`, or bare."""
    if not isinstance(value, Mapping):
        _fail(field, f"expected an object with a function, found {_seen(value)}")
    if value.get("type", "function") not in ("function", None):
        _fail(f"{field}.type", f"found {_seen(value['type'])}; allowed: function")
    function = value.get("function")
    if function is None:
        return value, field
    if not isinstance(function, Mapping):
        _fail(f"{field}.function", f"expected an object with a name, found {_seen(function)}")
    return function, f"{field}.function"


def _name(value: Any, field: str) -> str:
    if not isinstance(value, str) or not NAME.fullmatch(value):
        _fail(field, f"expected a name of letters, digits, _ . or -, found {_seen(value)}")
    return value.removeprefix("functions.")


def _arguments(value: Any, field: str) -> str:
    """Arguments as text: a string is kept as it is, an object becomes compact JSON."""
    if isinstance(value, str):
        check_field(value, field)
        return value
    if value is None:
        return "{}"
    if not isinstance(value, Mapping):
        _fail(field, f"expected a JSON object or its text, found {_seen(value)}")
    try:
        text = json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    except (TypeError, ValueError) as error:
        _fail(field, f"can't be written as JSON: {error}")
    check_field(text, field)
    return text


def _check_texts(value: Any, field: str) -> None:
    """Raise HarmonyError, naming the field, for a text anywhere inside `value` that isn't Unicode."""
    if isinstance(value, str):
        check_field(value, field)
    elif isinstance(value, Mapping):
        for key, item in value.items():
            _check_texts(key, field)
            _check_texts(item, f"{field}.{key}")
    elif isinstance(value, list | tuple):
        for index, item in enumerate(value):
            _check_texts(item, f"{field}[{index}]")


def _without_nulls(schema: Mapping[str, Any]) -> dict[str, Any]:
    """A JSON Schema without the keys and properties that are null, which no schema has on purpose."""
    kept: dict[str, Any] = {}
    for key, value in schema.items():
        if key in ("properties", "patternProperties", "$defs", "definitions") and isinstance(value, Mapping):
            schemas = {name: inner for name, inner in value.items() if inner is not None}
            kept[key] = {name: _without_nulls(s) if isinstance(s, Mapping) else s for name, s in schemas.items()}
        elif key in ("items", "additionalProperties", "not") and isinstance(value, Mapping):
            kept[key] = _without_nulls(value)
        elif key in ("oneOf", "anyOf", "allOf", "prefixItems") and isinstance(value, list):
            kept[key] = [_without_nulls(inner) if isinstance(inner, Mapping) else inner for inner in value]
        elif value is not None or key in _NULL_SAYS_SOMETHING:
            kept[key] = value
    return kept


def _check_keys(row: Mapping[str, Any], role: str, field: str) -> None:
    """Refuse keys that would be skipped in silence; null and empty values say nothing and may stand anywhere."""
    allowed = {"role", "content", "train", "weight", *IGNORED_KEYS}
    allowed |= {"assistant": set(ASSISTANT_KEYS), "tool": {"name", "tool_call_id"}, "user": {"name"}}.get(role, set())
    for key, value in row.items():
        if key in allowed or value is None or value in ("", [], {}):
            continue
        if key in KEYS:
            _fail(f"{field}.{key}", f"a message of role {role} has no {key}")
        _fail(f"{field}.{key}", f"unknown key; allowed: {', '.join(KEYS)}{_nearest(key, KEYS)}")


def _nearest(value: Any, allowed: Iterable[str]) -> str:
    near = difflib.get_close_matches(value, list(allowed), 1) if isinstance(value, str) else []
    return f"; did you mean {near[0]}?" if near else ""


def _seen(value: Any) -> str:
    """A value for a message: its beginning, and its type where that isn't plain from it."""
    text = repr(value)
    shown = text if len(text) <= 60 else f"{text[:57]}..."
    return shown if value is None or isinstance(value, str | int | float | bool) else f"{type(value).__name__} {shown}"


def _fail(field: str, message: str) -> NoReturn:
    raise HarmonyError(message, field)
