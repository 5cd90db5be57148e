"""What a row says: a Harmony conversation, a text, or ids. Which layout it has, `layout.py` tells."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from itertools import groupby
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ossia.config.schema import is_day
from ossia.data.layout import REQUIRED, Layout
from ossia.data.rows import Row, TableValue, parse_json
from ossia.data.sample import Sample
from ossia.errors import DataError, HarmonyError, RecipeError, TokenizerError
from ossia.harmony.chat import THINKING, Chat, read_chat
from ossia.harmony.messages import CONSTRAIN_JSON, LEAST_WEIGHT, MOST_WEIGHT, WEIGHTS, Conversation, System
from ossia.harmony.openai_tools import check_keys, nearest
from ossia.harmony.render import Renderer, Span, TrainOn, message_weights
from ossia.harmony.vocab import Vocabulary, check_field

Message = dict[str, Any]
Placed = tuple[Message, str]  # a message in OpenAI's form, and where the row has it: "conversations[2]"
_SHAREGPT_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "system": "system",
    "function_call": "assistant",
    "observation": "tool",
    "tool": "tool",
}
_MESSAGE_FIELD = re.compile(r"messages\[(\d+)\]")


class Encoder(NamedTuple):
    """What turns words into ids, and decides which are trained."""

    vocab: Vocabulary
    renderer: Renderer
    train_on: TrainOn


def build(layout: Layout, row: Row, where: str, encoder: Encoder, notes: list[str] | None = None) -> list[Sample]:
    """The samples of one row.

    notes   takes, in words that fit behind "rows with", what is legal in the row but may not be meant
    Raises  DataError, HarmonyError or TokenizerError without the place, for a row that isn't of this layout
    """
    fields = layout.fields(row)
    for name in REQUIRED[layout.format]:
        if name not in fields:
            column = layout.name(name)
            if column in row:
                raise DataError(f"{column}: is null; rows of the format {layout.format} have something in it")
            raise DataError(
                f"{column}: missing; rows of the format {layout.format} have it. "
                f"Found: {', '.join(row) or 'nothing'}{nearest(column, row)}"
            )
    if layout.format == "tokens":
        return [_tokens(fields, where, encoder.vocab.size, [] if notes is None else notes)]
    if layout.format == "text":
        return [_plain_text(_text(fields, "text"), where, encoder.vocab)]
    messages = _READERS[layout.format](fields, layout)
    chat = _chat(messages, fields, layout)
    try:
        _check_trained(chat, encoder.train_on)
    except HarmonyError as error:
        raise _in_the_row(error, [place for _, place in messages], layout) from error
    if notes is not None:
        notes += dict.fromkeys([*chat.notes, *_loose_ends(chat.conversation)])
    found = encoder.renderer.samples(chat.conversation, encoder.train_on)
    return [Sample.from_rendered(rendered, where) for rendered in found]


def _check_trained(chat: Chat, train_on: TrainOn) -> None:
    """Refuse what would teach a malformed call or an empty answer. Raises HarmonyError naming the field.

    What isn't trained may be malformed: a model has to be able to read of its own mistakes.
    """
    messages = chat.conversation.messages
    for message, field, weight in zip(messages, chat.fields, message_weights(messages, train_on), strict=True):
        if not weight:
            continue
        if message.channel == "final" and not message.content:
            raise HarmonyError(
                "an empty answer would be trained; leave the row out, or keep it with train: false", field
            )
        if message.content_type != CONSTRAIN_JSON:
            continue
        what = "arguments of a call" if message.recipient else "text that is marked as JSON"
        try:
            value = parse_json(message.content, strict=True)
            if message.recipient is None or isinstance(value, dict):
                continue
            found = f"found {_kind(value)}, but they have to be a JSON object"
        except ValueError as error:
            found = f"not valid JSON: {error}"
        way_out = "mend it, or keep the message as context that isn't trained with train: false beside its role"
        raise HarmonyError(f"{what}, {found}; {way_out}", field)


def _loose_ends(conversation: Conversation) -> Iterator[str]:
    """What a conversation lacks that a cut or a mistake in its export may have taken."""
    messages = conversation.messages
    if messages[-1].role != "assistant":
        yield "text after the last answer or call, which nothing is trained on"
    if any(message.role == "user" and not message.content.strip() for message in messages):
        yield "a user message without text"
    for message, following in zip(messages, [*messages[1:], None], strict=True):
        ends = message.recipient is not None or message.channel == "final"
        if message.role == "assistant" and not ends and (following is None or following.role != "assistant"):
            yield "thinking or a preamble that no answer or call follows, in which the model learns no end of its turn"


def _chat(messages: list[Placed], fields: Row, layout: Layout) -> Chat:
    """What the row says itself, and where it says nothing the source, then the recipe."""
    source, harmony = layout.source, layout.harmony
    tools = _tools(fields)
    if tools is None and source.tools is not None:
        tools = list(source.tools)
    head = System(
        identity=_text(fields, "identity", harmony.identity),
        knowledge_cutoff=_text(fields, "knowledge_cutoff", harmony.knowledge_cutoff),
        current_date=_day(fields, harmony.current_date),
        reasoning_effort=_text(fields, "reasoning_effort", source.reasoning_effort or harmony.reasoning_effort),
        builtin_tools=_builtin_tools(fields),
    )
    instructions = [_text(fields, "developer", source.developer), _text(fields, "system")]
    developer = "\n\n".join(text for text in instructions if text) or None
    try:
        return read_chat([message for message, _ in messages], tools=tools, developer=developer, system=head)
    except HarmonyError as error:
        if error.field.startswith("tools") and fields.get("tools") is None:
            raise RecipeError(f"data.{error}\n  next: mend the tools that the recipe gives to {source.path}") from error
        raise _in_the_row(error, [place for _, place in messages], layout) from error


def _in_the_row(error: HarmonyError, places: list[str], layout: Layout) -> HarmonyError:
    """The error with the row's own name for the field: `conversations[2].value` instead of `messages[2].content`."""
    match = _MESSAGE_FIELD.match(error.field)
    if error.field == "messages":
        name = " and ".join(map(layout.name, REQUIRED[layout.format]))
        return HarmonyError(str(error).removeprefix("messages: "), name)
    if error.field.startswith("tools"):
        return HarmonyError(str(error).removeprefix(f"{error.field}: "), layout.name("tools") + error.field[5:])
    if match is None or int(match[1]) >= len(places):
        return error
    place, rest = places[int(match[1])], error.field[match.end() :]
    if not place.endswith("]"):
        rest = rest.removeprefix(".content")  # the column holds the text itself
        if rest.removeprefix(".") in THINKING:
            place, rest = layout.name(rest.removeprefix(".")), ""
    elif layout.format == "sharegpt":
        rest = rest.replace(".content", ".value").replace(".role", ".from")
        rest = ".value" if rest.startswith(".tool_calls") else rest  # its JSON text became the call
    return HarmonyError(str(error).removeprefix(f"{error.field}: "), place + rest)


def _builtin_tools(fields: Row) -> Any:
    names = fields.get("builtin_tools", [])
    if not isinstance(names, list) or not all(name in ("browser", "python") for name in names):
        raise DataError(f"builtin_tools: expected a list of browser and python, found {names!r}")
    return tuple(names)


def _text(fields: Row, name: str, default: str | None = None) -> Any:
    value = fields.get(name, default)
    if value is not None and not isinstance(value, str):
        raise DataError(f"{name}: expected text, found {_kind(value)}")
    check_field(value or "", name)
    return value


def _day(fields: Row, default: str | None) -> str | None:
    day: str | None = _text(fields, "current_date", default)
    if day is not None and not is_day(day):
        raise DataError(f"current_date: expected a day as YYYY-MM-DD, found {day[:40]!r}")
    return day


def _kind(value: Any) -> str:
    if isinstance(value, TableValue):
        return f"a value of the type {value.kind}, which JSON doesn't have; store it as text"
    names = {dict: "an object", list: "a list", str: "text", bool: "true or false", int: "a number", float: "a number"}
    return names.get(type(value), "null" if value is None else type(value).__name__)


def _tools(fields: Row) -> list[dict[str, Any]] | None:
    """Function tools in OpenAI's form; many files carry the list as JSON text."""
    value = fields.get("tools")
    if isinstance(value, str):
        try:
            value = parse_json(value, strict=True) if value.strip() else None
        except ValueError as error:
            raise DataError(f"tools: text that isn't JSON: {error}") from error
    if value is not None and not isinstance(value, list):
        raise DataError(f"tools: expected a list of tools, found {_kind(value)}")
    return value


def _message_list(fields: Row, field: str, layout: Layout) -> list[Placed]:
    value, name = fields[field], layout.name(field)
    if not isinstance(value, list):
        expected = "a list of messages" if field in ("messages", "conversations") else "text or a list of messages"
        raise DataError(f"{name}: expected {expected}, found {_kind(value)}")
    for number, message in enumerate(value):
        if not isinstance(message, dict):
            raise DataError(f"{name}[{number}]: expected an object, found {_kind(message)}")
    return [(message, f"{name}[{number}]") for number, message in enumerate(value)]


def _thinking(fields: Row) -> Message:
    """The columns of thinking, which belong to the answer's message."""
    return {name: fields[name] for name in THINKING if name in fields}


def _from_messages(fields: Row, layout: Layout) -> list[Placed]:
    return _message_list(fields, "messages", layout)


def _from_alpaca(fields: Row, layout: Layout) -> list[Placed]:
    question = "\n\n".join(filter(None, [_text(fields, "instruction"), _text(fields, "input", "")]))
    answer = {"role": "assistant", "content": _text(fields, "output"), **_thinking(fields)}
    return [({"role": "user", "content": question}, layout.name("instruction")), (answer, layout.name("output"))]


def _from_prompt(fields: Row, layout: Layout) -> list[Placed]:
    """Text or messages on both sides; what the assistant says in the prompt is context, unless its `train` is true."""
    prompt, completion = fields["prompt"], fields["completion"]
    if isinstance(prompt, str):
        before: list[Placed] = [({"role": "user", "content": prompt}, layout.name("prompt"))]
    else:
        before = [
            (
                {**message, "train": message.get("train") or False} if message.get("role") == "assistant" else message,
                place,
            )
            for message, place in _message_list(fields, "prompt", layout)
        ]
    if isinstance(completion, str):
        answer = {"role": "assistant", "content": completion, **_thinking(fields)}
        return [*before, (answer, layout.name("completion"))]
    if thinking := _thinking(fields):
        raise DataError(f"{next(iter(thinking))}: expected inside the messages of `completion`, found beside them")
    after = _message_list(fields, "completion", layout)
    if not any(message.get("role") == "assistant" for message, _ in after):
        raise DataError(f"{layout.name('completion')}: expected an assistant message, found none of its {len(after)}")
    return [*before, *after]


def _from_sharegpt(fields: Row, layout: Layout) -> list[Placed]:
    messages: list[Placed] = []
    waiting: list[str] = []  # ids of calls whose results have not come yet
    for number, (turn, place) in enumerate(_message_list(fields, "conversations", layout)):
        speaker, text = turn.get("from"), turn.get("value")
        if not isinstance(text, str):
            raise DataError(f"{place}.value: expected text, found {_kind(text)}")
        if not isinstance(speaker, str) or speaker not in _SHAREGPT_ROLES:
            raise DataError(
                f"{place}.from: unknown speaker {speaker!r}; allowed: {', '.join(_SHAREGPT_ROLES)}"
                + nearest(speaker, _SHAREGPT_ROLES)
            )
        message: Message = {name: item for name, item in turn.items() if name not in ("from", "value")}
        for name in ("role", "content", *(["tool_calls"] if speaker == "function_call" else [])):
            if message.get(name) not in (None, "", []):
                raise DataError(f"{place}.{name}: stands beside from and value, which say it already; keep one of them")
        message |= {"role": _SHAREGPT_ROLES[speaker], "content": text}
        if speaker == "function_call":
            calls = _sharegpt_calls(text, place, number)
            waiting = [call["id"] for call in calls]
            message |= {"content": None, "tool_calls": calls}
        elif message["role"] == "tool" and waiting and not (message.get("tool_call_id") or message.get("name")):
            message["tool_call_id"] = waiting.pop(0)
        messages.append((message, place))
    return messages


def _sharegpt_calls(text: str, place: str, number: int) -> list[Message]:
    """`{"name": ..., "arguments": ...}`, or a list of these, as OpenAI's `tool_calls`."""
    try:
        value = parse_json(text, strict=True)
    except ValueError as error:
        raise DataError(f"{place}.value: a function_call has to be JSON: {error}") from error
    calls = value if isinstance(value, list) else [value]
    if not calls:
        raise DataError(f"{place}.value: a function_call without a call in it")
    for call in calls:
        if not isinstance(call, dict) or not isinstance(call.get("name"), str) or call.get("arguments") is None:
            raise DataError(f'{place}.value: expected {{"name": ..., "arguments": ...}}, found {text[:80]!r}')
        check_keys(call, f"{place}.value", ("name", "arguments", "id", "type", "index"))
    return [
        {
            "id": call.get("id") or f"call_{number}_{index}",
            "type": "function",
            "function": {"name": call["name"], "arguments": call["arguments"]},
        }
        for index, call in enumerate(calls)
    ]


_READERS: Mapping[str, Callable[[Row, Layout], list[Placed]]] = MappingProxyType(
    {"messages": _from_messages, "sharegpt": _from_sharegpt, "alpaca": _from_alpaca, "prompt": _from_prompt}
)


def _plain_text(text: str, where: str, vocab: Vocabulary) -> Sample:
    """A document as in pre-training: its text and `<|endoftext|>`, all of it trained but the first token."""
    end = vocab.special.get("<|endoftext|>")
    if end is None:
        raise TokenizerError("the tokenizer has no <|endoftext|>, which plain text ends in; use the checkpoint's own")
    ids = np.array([*vocab.encode(text), end], np.int32)
    weights = np.ones(len(ids), np.float32)
    weights[0] = 0
    return Sample(ids, weights, None, where, (Span(0, len(ids), "text", None),))


def _tokens(fields: Row, where: str, vocab_size: int, notes: list[str]) -> Sample:
    """Ids that are used as they are. A weight on the first one is dropped: nothing is before it to predict it from."""
    ids = _id_array(fields, "ids", vocab_size)
    targets = _id_array(fields, "targets", vocab_size) if "targets" in fields else None
    weights = _weight_array(fields, "weights")
    for name, values in (("weights", weights), ("targets", targets)):
        if values is not None and len(values) != len(ids):
            raise DataError(f"{name}: {len(values):,} entries for {len(ids):,} ids; expected as many")
    if not len(ids):
        raise DataError("ids: the list is empty")
    if weights[0]:
        notes.append("a weight on their first token, which isn't trained: nothing is before it to predict it from")
        weights[0] = 0
    return Sample(ids, weights, targets, where, _given_spans(fields, len(ids)))


def _id_array(fields: Row, name: str, vocab_size: int) -> NDArray[np.int32]:
    values = _numbers(fields, name, {int}, "whole numbers")
    if values and not (min(values) >= 0 and max(values) < vocab_size):
        index = next(index for index, value in enumerate(values) if not 0 <= value < vocab_size)
        found = f"{_shortened(values[index])} is not in the vocabulary of {vocab_size:,} tokens"
        raise DataError(f"{name}[{index}]: {found}")
    return np.array(values, np.int32)


def _weight_array(fields: Row, name: str) -> NDArray[np.float32]:
    values = _numbers(fields, name, {int, float}, "numbers")
    for index, value in enumerate(values):
        if not (value == 0 or LEAST_WEIGHT <= value <= MOST_WEIGHT):
            raise DataError(f"{name}[{index}]: found {_shortened(value)}; {WEIGHTS}")
    return np.array(values, np.float32)


def _numbers(fields: Row, name: str, kinds: set[type], expected: str) -> list[Any]:
    values = fields[name]
    if not isinstance(values, list):
        raise DataError(f"{name}: expected a list of {expected}, found {_kind(values)}")
    if not set(map(type, values)) <= kinds:
        index = next(index for index, value in enumerate(values) if type(value) not in kinds)
        found = repr(values[index])[:60] if isinstance(values[index], int | float) else _kind(values[index])
        raise DataError(f"{name}[{index}]: expected a list of {expected}, found {found}")
    return values


def _shortened(number: float) -> str:
    text = repr(number)
    return text if len(text) <= 40 else f"{text[:20]}... ({len(text)} digits)"


def _given_spans(fields: Row, size: int) -> tuple[Span, ...]:
    """Runs of equal role and channel, for display only, where a row brings them as `ossia data --json` writes them."""
    roles, channels = fields.get("roles"), fields.get("channels")
    for names in (roles, channels):
        if not isinstance(names, list) or len(names) != size or not all(isinstance(n, str | None) for n in names):
            return (Span(0, size, "tokens", None),)
    spans, start = [], 0
    for (role, channel), run in groupby(zip(roles, channels, strict=True)):
        end = start + len(list(run))
        spans.append(Span(start, end, role, channel))
        start = end
    return tuple(spans)
