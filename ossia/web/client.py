"""`ossia chat http://...`: the terminal chat with a model behind any OpenAI-compatible server.

It uses chat completions alone, streamed: what ossia, vLLM, SGLang and llama.cpp have in common. Reasoning is shown
where the server sends it, under either of its names.
"""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from http.client import HTTPException
from typing import Any, Literal
from urllib.parse import urlsplit

from ossia.chat import Chat, Event, Screen, converse
from ossia.errors import UserError
from ossia.harmony import Closed, Conversation, Delta, Effort, Message, Opened, System, messages_to_openai

_WAIT_S = 600.0  # for the next bytes: a long prompt on a slow machine
_HERE = ("127.0.0.1", "::1", "localhost", "0.0.0.0")
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
    server = _Server(url, api_key)
    names = server.models()
    if not names or (model is not None and model not in names):
        raise UserError(f"{server.base}: there is no model {model!r}; allowed: {', '.join(names) or 'none'}")
    source = _RemoteSource(server, {**settings, "model": model or names[0]})
    head = System(reasoning_effort=effort) if system is None else System(system, reasoning_effort=effort)
    converse(Chat(source, Screen(), head, developer), f"{source.model} at {server.base}")


class _Server:
    """Requests to one server."""

    def __init__(self, url: str, api_key: str | None) -> None:
        base = url.rstrip("/")
        self.base = base if base.endswith("/v1") else f"{base}/v1"
        try:
            host = urlsplit(self.base).hostname
        except ValueError:
            host = None
        if host is None:
            raise UserError(f"{url}: expected an address like http://127.0.0.1:8000")
        # a proxy that the machine is set up with doesn't lead back to this machine
        proxies = [urllib.request.ProxyHandler({})] if host in _HERE else []
        self._opener = urllib.request.build_opener(*proxies)
        self._headers = {"Content-Type": "application/json"}
        if api_key is not None:
            self._headers["Authorization"] = f"Bearer {api_key}"

    def get(self, path: str) -> Any:
        """A JSON object. Raises UserError."""
        with self._open(path, None) as answer:
            return self._json(answer.read())

    def models(self) -> list[str]:
        """The names that it lists. Raises UserError."""
        found = self.get("/models")
        listed = found.get("data") if isinstance(found, Mapping) else None
        if not isinstance(listed, list) or not all(isinstance(one, Mapping) and "id" in one for one in listed):
            raise UserError(f"{self.base}/models: answered no list of models; is it an OpenAI-compatible server?")
        return [str(one["id"]) for one in listed]

    def stream(self, path: str, body: Mapping[str, Any]) -> Iterator[Any]:
        """The objects of server-sent events, up to [DONE]. Raises UserError, also for an error among them."""
        with self._open(path, body) as answer:
            for line in answer:
                data = line.strip().removeprefix(b"data:").strip()
                if data == b"[DONE]":
                    return
                if line.startswith(b"data:"):
                    event = self._json(data)
                    if not isinstance(event, Mapping) or event.get("error"):
                        raise UserError(f"{self.base}: {_message_of(event)}")
                    yield event

    @contextmanager
    def _open(self, path: str, body: Mapping[str, Any] | None) -> Iterator[Any]:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.base + path, data, self._headers)
        try:
            with self._opener.open(request, timeout=_WAIT_S) as answer:
                yield answer
        except urllib.error.HTTPError as error:
            with error:
                said = error.read().decode("utf-8", "replace")
            words = _message_of(said)
            hint = "\n  next: give it with --api-key" if error.code == 401 else ""
            raise UserError(f"{self.base}{path}: {error.code} {error.reason}: {words}{hint}") from None
        except (OSError, ValueError, HTTPException) as error:
            raise UserError(f"{self.base}: can't be reached: {error}\n  next: check the address") from None

    def _json(self, data: bytes) -> Any:
        try:
            return json.loads(data)
        except ValueError:
            raise UserError(f"{self.base}: answered {data[:80]!r}, which is no JSON") from None


def _message_of(said: Any) -> str:
    """What an error says: OpenAI's shape, another object, or any text, of which the beginning."""
    if isinstance(said, str):
        try:
            said = json.loads(said)
        except ValueError:
            return said.strip()[:200]
    error = said.get("error", said) if isinstance(said, Mapping) else said
    return str(error.get("message", error) if isinstance(error, Mapping) else error)[:1000]


class _RemoteSource:
    """Answers of a server, as the messages that its deltas add up to."""

    def __init__(self, server: _Server, settings: Mapping[str, Any]) -> None:
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
