"""Requests to an OpenAI-compatible server: whole JSON objects, or the events of a stream. Safe for threads.

Own code because it is short, and the standard library is enough for it.
"""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http.client import HTTPException
from typing import Any
from urllib.parse import urlsplit

from ossia.errors import ServerError, UserError

_HERE = ("127.0.0.1", "::1", "localhost", "0.0.0.0")


class Server:
    """One server; `base` is its address, up to /v1."""

    def __init__(self, url: str, api_key: str | None = None, *, wait_s: float = 600.0) -> None:
        """url     with or without /v1
        wait_s  seconds that it may take for its next bytes
        Raises  UserError if that is no address
        """
        base = url.rstrip("/")
        self.base = base if base.endswith("/v1") else f"{base}/v1"
        self._wait_s = wait_s
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
        """A JSON object. Raises ServerError."""
        with self._open(path, None) as answer:
            return self._json(answer.read())

    def post(self, path: str, body: Mapping[str, Any]) -> Any:
        """The JSON object that it answers. Raises ServerError."""
        with self._open(path, body) as answer:
            return self._json(answer.read())

    def tell(self, path: str, body: Mapping[str, Any]) -> None:
        """Post where nothing but that it was taken matters. Raises ServerError."""
        with self._open(path, body) as answer:
            answer.read()

    def cards(self) -> list[Mapping[str, Any]]:
        """What it says of each model that it lists, its name as `id`. Raises ServerError."""
        found = self.get("/models")
        listed = found.get("data") if isinstance(found, Mapping) else None
        if not isinstance(listed, list) or not all(isinstance(one, Mapping) and "id" in one for one in listed):
            raise ServerError(f"{self.base}/models: answered no list of models; is it an OpenAI-compatible server?")
        return listed

    def stream(self, path: str, body: Mapping[str, Any]) -> Iterator[Any]:
        """The objects of server-sent events, up to [DONE]. Raises ServerError, also for an error among them."""
        with self._open(path, body) as answer:
            for line in answer:
                data = line.strip().removeprefix(b"data:").strip()
                if data == b"[DONE]":
                    return
                if line.startswith(b"data:"):
                    event = self._json(data)
                    if not isinstance(event, Mapping) or event.get("error"):
                        raise ServerError(f"{self.base}: {_message_of(event)}")
                    yield event

    @contextmanager
    def _open(self, path: str, body: Mapping[str, Any] | None) -> Iterator[Any]:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.base + path, data, self._headers)
        try:
            with self._opener.open(request, timeout=self._wait_s) as answer:
                yield answer
        except urllib.error.HTTPError as error:
            with error:
                said = error.read().decode("utf-8", "replace")
            words = _message_of(said)
            hint = "\n  next: give it with --api-key" if error.code == 401 else ""
            message = f"{self.base}{path}: {error.code} {error.reason}: {words}{hint}"
            raise ServerError(message, error.code) from None
        except (OSError, ValueError, HTTPException) as error:
            raise ServerError(f"{self.base}: can't be reached: {error}\n  next: check the address") from None

    def _json(self, data: bytes) -> Any:
        try:
            return json.loads(data)
        except ValueError:
            raise ServerError(f"{self.base}: answered {data[:80]!r}, which is no JSON") from None


def _message_of(said: Any) -> str:
    """What an error says: OpenAI's shape, another object, or any text, of which the beginning."""
    if isinstance(said, str):
        try:
            said = json.loads(said)
        except ValueError:
            return said.strip()[:200]
    error = said.get("error", said) if isinstance(said, Mapping) else said
    return str(error.get("message", error) if isinstance(error, Mapping) else error)[:1000]
