"""Parts of a turn -> an OpenAI response: the events of its stream, and the object that they add up to.

Each part is an item: reasoning (in its own words, no summary), a message (phase commentary for what is said before a
call), a function call. Every event carries its place in the sequence.
"""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from typing import Any

from ossia.harmony import Vocabulary
from ossia.web.protocol.bodies import ResponseBody
from ossia.web.protocol.chat import Head, Usage, call_id, token_logprob
from ossia.web.protocol.errors import ApiError
from ossia.web.protocol.turn import Begin, End, More, Piece, Placed

Event = dict[str, Any]


class ResponseAnswer:
    """A response: events from the pieces of its one choice; the last one holds the whole.

    named        whether the events of its stream have names
    fingerprint  `system_fingerprint`, beyond OpenAI's own fields here; None: left out
    """

    named = True

    def __init__(self, head: Head, body: ResponseBody, vocab: Vocabulary, *, logprobs: bool) -> None:
        self.fingerprint: str | None = None
        self._vocab, self._logprobs = vocab, logprobs
        self._about = _about(head, body)
        self._sequence = -1
        self._output: list[dict[str, Any]] = []
        self._item: dict[str, Any] = {}
        self._end: End | None = None

    def begin(self) -> list[Event]:
        """The first events."""
        response = self._response("in_progress")
        return [
            self._event("response.created", response=response),
            self._event("response.in_progress", response=response),
        ]

    def take(self, index: int, pieces: Sequence[Piece], end: End | None) -> list[Event]:
        """The events of more pieces; there is only choice 0."""
        assert index == 0, index
        events: list[Event] = []
        for piece in pieces:
            if isinstance(piece, Begin):
                events += self._open(piece)
            elif isinstance(piece, More):
                events.append(self._more(piece))
            else:
                events += self._close(piece.whole)
        self._end = end
        return events

    def finish(self, usage: Usage) -> list[Event]:
        """The last event."""
        response = self.whole(usage)
        return [self._event(f"response.{response['status']}", response=response)]

    def whole(self, usage: Usage) -> dict[str, Any]:
        """What a client gets that doesn't stream."""
        response = self._response("incomplete" if self._end == "length" else "completed", usage)
        if self._end == "length":
            response["incomplete_details"] = {"reason": "max_output_tokens"}
        return response

    def fail(self, error: ApiError) -> list[Event]:
        """The last event where something went wrong under way."""
        response = self._response("failed")
        code = "rate_limit_exceeded" if error.status == 429 else "server_error"
        response["error"] = {"code": code, "message": str(error)}
        return [self._event("response.failed", response=response)]

    def _open(self, piece: Begin) -> list[Event]:
        self._item = item = _new_item(piece)
        self._output.append(item)
        place = {"output_index": len(self._output) - 1}
        events = [self._event("response.output_item.added", **place, item=_copied(item, content=[]))]
        if piece.kind != "call":
            item["content"] = [_part(piece.kind)]
            events.append(self._event("response.content_part.added", **self._place(), part=_part(piece.kind)))
        return events

    def _more(self, piece: More) -> Event:
        kind, place = self._item["type"], self._place()
        if kind == "function_call":
            self._item["arguments"] += piece.text
            return self._event("response.function_call_arguments.delta", **place, delta=piece.text)
        part = self._item["content"][0]
        part["text"] += piece.text
        if kind == "reasoning":
            return self._event("response.reasoning_text.delta", **place, delta=piece.text)
        logprobs = self._logprobs_of(piece.tokens)
        part["logprobs"] += logprobs
        return self._event("response.output_text.delta", **place, delta=piece.text, logprobs=logprobs)

    def _close(self, whole: bool) -> list[Event]:
        item, place = self._item, self._place()
        item["status"] = "completed" if whole else "incomplete"
        events = []
        if item["type"] == "function_call":
            done = {"arguments": item["arguments"], "name": item["name"]}
            events.append(self._event("response.function_call_arguments.done", **place, **done))
        else:
            part = item["content"][0]
            if item["type"] == "reasoning":
                events.append(self._event("response.reasoning_text.done", **place, text=part["text"]))
            else:
                said = {"text": part["text"], "logprobs": part["logprobs"]}
                events.append(self._event("response.output_text.done", **place, **said))
            events.append(self._event("response.content_part.done", **place, part=part))
        index = len(self._output) - 1
        return [*events, self._event("response.output_item.done", output_index=index, item=item)]

    def _logprobs_of(self, tokens: tuple[Placed, ...]) -> list[dict[str, Any]]:
        return [token_logprob(self._vocab, one.token) for one in tokens] if self._logprobs else []

    def _place(self) -> dict[str, Any]:
        place = {"item_id": self._item["id"], "output_index": len(self._output) - 1}
        return place if self._item["type"] == "function_call" else {**place, "content_index": 0}

    def _event(self, kind: str, **fields: Any) -> Event:
        self._sequence += 1
        return {"type": kind, "sequence_number": self._sequence, **fields}

    def _response(self, status: str, usage: Usage | None = None) -> dict[str, Any]:
        counted = None
        if usage is not None:
            counted = {
                "input_tokens": usage.prompt,
                "input_tokens_details": {"cached_tokens": 0, "cache_write_tokens": 0},
                "output_tokens": usage.completion,
                "output_tokens_details": {"reasoning_tokens": usage.reasoning},
                "total_tokens": usage.prompt + usage.completion,
            }
        made_by = {} if self.fingerprint is None else {"system_fingerprint": self.fingerprint}
        output = [dict(item) for item in self._output]
        return {**self._about, **made_by, "status": status, "output": output, "usage": counted}


def _new_item(piece: Begin) -> dict[str, Any]:
    number = secrets.token_hex(12)
    if piece.kind == "call":
        call = {"type": "function_call", "id": f"fc_{number}", "call_id": call_id(), "name": piece.name}
        return {**call, "arguments": "", "status": "in_progress"}
    if piece.kind == "reasoning":
        return {"type": "reasoning", "id": f"rs_{number}", "summary": [], "content": [], "status": "in_progress"}
    message = {"type": "message", "id": f"msg_{number}", "role": "assistant", "content": [], "status": "in_progress"}
    return {**message, "phase": "commentary" if piece.preamble else "final_answer"}


def _part(kind: str) -> dict[str, Any]:
    if kind == "reasoning":
        return {"type": "reasoning_text", "text": ""}
    return {"type": "output_text", "text": "", "annotations": [], "logprobs": []}


def _copied(item: dict[str, Any], **changes: Any) -> dict[str, Any]:
    """The item as it is now; changes only to keys that it has."""
    return {key: changes.get(key, value) for key, value in item.items()}


def _about(head: Head, body: ResponseBody) -> dict[str, Any]:
    """What every state of the response repeats: its id, and what was asked for."""
    reasoning = {"effort": "medium" if body.reasoning is None else body.reasoning.effort or "medium", "summary": None}
    text = {"type": "text"} if body.text is None or body.text.format is None else body.text.format
    return {
        "id": head.id,
        "object": "response",
        "created_at": head.created,
        "model": head.model,
        "error": None,
        "incomplete_details": None,
        "instructions": body.instructions,
        "max_output_tokens": body.max_output_tokens,
        "metadata": body.metadata or {},
        "parallel_tool_calls": body.parallel_tool_calls is not False,
        "previous_response_id": None,
        "reasoning": reasoning,
        "store": False,
        "temperature": 1.0 if body.temperature is None else body.temperature,
        "text": {"format": text},
        "tool_choice": body.tool_choice or "auto",
        "tools": body.tools or [],
        "top_p": 1.0 if body.top_p is None else body.top_p,
        "truncation": "disabled",
    }
