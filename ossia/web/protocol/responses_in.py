"""The body of /v1/responses -> a request of the engine.

Items become the messages of a chat, and errors name the item: `input[3].output`.
| item                                | becomes                                                            |
|-------------------------------------|--------------------------------------------------------------------|
| a text; message of any role         | a message; of the assistant, phase commentary: a preamble          |
| reasoning                           | the reasoning of the assistant message or call after it            |
| function_call                       | a call; calls that follow each other are made together             |
| function_call_output                | its result                                                         |
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

from ossia.web.protocol.bodies import ResponseBody
from ossia.web.protocol.errors import ApiError
from ossia.web.protocol.formats import read_format, read_tool_choice
from ossia.web.protocol.prompts import Chat, Job, Served, prepare, sampled

_ITEMS = {  # what an item of a type may hold; the last ones have no effect
    "message": ("type", "role", "content", "phase", "id", "status"),
    "reasoning": ("type", "content", "summary", "id", "status", "encrypted_content"),
    "function_call": ("type", "call_id", "name", "arguments", "id", "status", "namespace", "caller", "async"),
    "function_call_output": ("type", "call_id", "output", "id", "status", "caller"),
}
_ROLES = ("system", "developer", "user", "assistant")


def response_job(body: ResponseBody, served: Served) -> Job:
    """The engine's work for a response. Raises ApiError."""
    rows, items = _Items(body.input).read()
    tools = body.tools or []
    effort = None if body.reasoning is None else body.reasoning.effort
    wanted = read_format(None if body.text is None else body.text.format, "text.format", inner=None)
    chat = Chat(rows, tools, read_tool_choice(body.tool_choice, tools), effort, wanted, body.instructions)
    one_call = body.parallel_tool_calls is False
    try:
        ids, constraint = prepare(chat, served, one_call=one_call)
    except ApiError as error:
        if error.param and error.param.startswith("messages["):
            number, _, rest = error.param.removeprefix("messages[").partition("]")
            place = f"input[{items[int(number)]}]" if isinstance(body.input, list) else "input"
            words = str(error).replace(error.param, f"{place}{rest}", 1)
            raise ApiError(words, param=f"{place}{rest}") from None
        raise
    requests = sampled(
        body, served, [ids], body.max_output_tokens, top_logprobs=body.top_logprobs or 0, constraint=constraint
    )
    logprobs = "message.output_text.logprobs" in (body.include or ()) or bool(body.top_logprobs)
    return Job(requests, len(ids), (), one_call, wanted.schema is not None, logprobs)


class _Items:
    """Reads `input`, item after item."""

    def __init__(self, given: str | Sequence[Mapping[str, Any]]) -> None:
        self._given: Sequence[Mapping[str, Any]] = (
            [{"role": "user", "content": given}] if isinstance(given, str) else given
        )
        self._rows: list[dict[str, Any]] = []
        self._items: list[int] = []  # the item that each row began with
        self._open = False  # the last row takes more of the assistant's items

    def read(self) -> tuple[list[dict[str, Any]], list[int]]:
        """Chat messages, and for each the number of the item it comes from. Raises ApiError."""
        if not self._given:
            raise ApiError("input: found an empty list; allowed: a text, or one or more items", param="input")
        for index, item in enumerate(self._given):
            self._read(item, index)
        return self._rows, self._items

    def _read(self, item: Mapping[str, Any], index: int) -> None:
        kind = item.get("type", "message")
        if not isinstance(kind, str) or kind not in _ITEMS:
            _fail(f"input[{index}].type", f"found {kind!r}; allowed: {', '.join(_ITEMS)}")
        for key, value in item.items():
            if key not in _ITEMS[kind] and value is not None:
                _fail(f"input[{index}].{key}", f"an item of type {kind} has no such field here")
        if kind == "message":
            self._message(item, index)
        elif kind == "reasoning":
            row = self._assistant(index, new=self._open and self._rows[-1].keys() != {"role", "reasoning"})
            row["reasoning"] = "\n\n".join(filter(None, (row.get("reasoning"), _reasoning(item, index))))
        elif kind == "function_call":
            call = {"id": item.get("call_id"), "type": "function"}
            call["function"] = {"name": item.get("name"), "arguments": item.get("arguments")}
            self._assistant(index).setdefault("tool_calls", []).append(call)
        else:
            row = {"role": "tool", "tool_call_id": item.get("call_id"), "content": item.get("output")}
            self._add(row, index)

    def _message(self, item: Mapping[str, Any], index: int) -> None:
        role, phase = item.get("role"), item.get("phase")
        if role not in _ROLES:
            _fail(f"input[{index}].role", f"found {role!r}; allowed: {', '.join(_ROLES)}")
        if role != "assistant":
            self._add({"role": role, "content": item.get("content")}, index)
        elif phase not in (None, "commentary", "final_answer"):
            _fail(f"input[{index}].phase", f"found {phase!r}; allowed: commentary, final_answer")
        else:
            row = self._assistant(index, new=self._open and bool(self._rows[-1].keys() & {"content", "tool_calls"}))
            row["content"] = item.get("content")
            if phase == "commentary":
                row["channel"] = "commentary"
            self._open = False

    def _assistant(self, index: int, *, new: bool = False) -> dict[str, Any]:
        """The row that takes an assistant's item."""
        if not self._open or new:
            self._add({"role": "assistant"}, index)
            self._open = True
        return self._rows[-1]

    def _add(self, row: dict[str, Any], index: int) -> None:
        self._rows.append(row)
        self._items.append(index)
        self._open = False


def _reasoning(item: Mapping[str, Any], index: int) -> str:
    """The text of a reasoning item: what it says itself, and where it doesn't its summary."""
    for key in ("content", "summary"):
        parts = item.get(key) or []
        if not isinstance(parts, list) or not all(isinstance(part, dict) for part in parts):
            _fail(f"input[{index}].{key}", 'expected a list of parts like {"type": "reasoning_text", "text": ...}')
        texts = [part.get("text") for part in parts]
        if not all(isinstance(text, str) for text in texts):
            _fail(f"input[{index}].{key}", "a part has no text")
        if texts:
            return "\n\n".join(map(str, texts))
    return ""


def _fail(param: str, words: str) -> NoReturn:
    raise ApiError(f"{param}: {words}", param=param)
