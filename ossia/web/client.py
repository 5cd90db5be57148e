"""`ossia chat http://...`: the terminal chat with a model behind any OpenAI-compatible server.

It uses chat completions alone, streamed: what ossia, vLLM, SGLang and llama.cpp have in common. Reasoning is shown
where the server sends it, under either of its names.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

from ossia.chat import Chat, Event, Screen, converse
from ossia.errors import UserError
from ossia.harmony import Closed, Conversation, Delta, Effort, Message, Opened, System, messages_to_openai
from ossia.remote import Server

_CALL_TYPE = "<|constrain|>json"


def run_remote_chat(
    url: str,
    *,
    model: str | None = None,
    api_key: str | None = None,
    system: str | None = None,
    developer: str | None = None,
    effort: Effort = "medium",
    settings: Mapping[str, Any],
) -> None:
    """Ask and answer until the input ends.

    url       of the server, with or without /v1
    model     one of those that it lists; None: the first
    settings  fields of the request beside messages: temperature, max_tokens, ...
    Raises    UserError if the server can't be reached, refuses, or has no such model; in a pipe also for one question
    """
    server = Server(url, api_key)
    names = [str(card["id"]) for card in server.cards()]
    if not names or (model is not None and model not in names):
        raise UserError(f"{server.base}: there is no model {model!r}; allowed: {', '.join(names) or 'none'}")
    source = _RemoteSource(server, {**settings, "model": model or names[0]})
    head = System(reasoning_effort=effort) if system is None else System(system, reasoning_effort=effort)
    converse(Chat(source, Screen(), head, developer), f"{source.model} at {server.base}")


class _RemoteSource:
    """Answers of a server, as the messages that its deltas add up to."""

    def __init__(self, server: Server, settings: Mapping[str, Any]) -> None:
        self._server, self._settings, self.model = server, settings, settings["model"]
        self._open: Message | None = None
        self._text: list[str] = []
        self.finish: Literal["stop", "length", "call"] | None = None

    def answer(self, conversation: Conversation) -> Iterator[Sequence[Event]]:
        """Raises UserError if the server refuses, or can't be reached any more."""
        self._open, self.finish = None, None
        body = {
            **self._settings,
            "messages": _rows(conversation),
            "reasoning_effort": conversation.system.reasoning_effort,
            "stream": True,
        }
        for chunk in self._server.stream("/chat/completions", body):
            for choice in chunk.get("choices") or ():
                events = self._take(choice.get("delta") or {})
                if choice.get("finish_reason"):
                    events += self.rest()
                    self.finish = _FINISHES.get(choice["finish_reason"], "stop")
                if events:
                    yield events

    def rest(self) -> list[Event]:
        """What is open is complete now."""
        if self._open is None:
            return []
        message, self._open = self._open, None
        complete = Message(
            "assistant", "".join(self._text), message.channel, message.recipient, content_type=message.content_type
        )
        self._text = []
        return [Closed(complete)]

    def _take(self, delta: Mapping[str, Any]) -> list[Event]:
        events: list[Event] = []
        if reasoning := delta.get("reasoning_content") or delta.get("reasoning"):
            events += self._more(Message("assistant", "", "analysis"), reasoning)
        if content := delta.get("content"):
            events += self._more(Message("assistant", "", "final"), content)
        for call in delta.get("tool_calls") or ():
            function = call.get("function") or {}
            if function.get("name"):
                if self._open is not None and self._open.channel == "final":
                    self._open = Message("assistant", "", "commentary")  # what is said before a call
                events += self.rest()
                name = f"functions.{function['name']}"
                events += self._begin(Message("assistant", "", "commentary", name, content_type=_CALL_TYPE))
            if function.get("arguments"):
                self._text.append(function["arguments"])
                events.append(Delta(function["arguments"]))
        return events

    def _more(self, kind: Message, text: str) -> list[Event]:
        events: list[Event] = []
        if self._open != kind:
            events += self.rest()
            events += self._begin(kind)
        self._text.append(text)
        return [*events, Delta(text)]

    def _begin(self, message: Message) -> list[Event]:
        self._open = message
        return [Opened(message)]


_FINISHES: dict[str, Literal["stop", "length", "call"]] = {"length": "length", "tool_calls": "call"}


def _rows(conversation: Conversation) -> list[dict[str, Any]]:
    """The conversation as any server reads it: reasoning is sent back with calls alone, where Harmony keeps it."""
    rows = messages_to_openai(conversation.messages)
    for row in rows:
        if not row.get("tool_calls"):
            row.pop("reasoning_content", None)
    rows = [row for row in rows if row["content"] is not None or row.get("tool_calls")]
    default = System().identity
    identity = conversation.system.identity if conversation.system.identity != default else None
    told = "\n\n".join(filter(None, (identity, conversation.instructions)))
    return [{"role": "system", "content": told}, *rows] if told else rows
