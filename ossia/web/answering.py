"""One HTTP request's answer: tokens of its choices as they come -> one JSON object, or a stream of server-sent events.

Whoever stops reading frees the slot: a connection that closes ends the answer, streaming or not.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Sequence
from typing import Any, Protocol

from starlette.responses import Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from ossia.web.protocol.chat import Usage
from ossia.web.protocol.errors import ApiError
from ossia.web.protocol.prompts import Job
from ossia.web.protocol.turn import End, Piece, PlainTurn, Turn
from ossia.web.worker import Accepted, Echoed, Event, Failed, Worker


class Answer(Protocol):
    """How a route writes its answer."""

    named: bool
    fingerprint: str | None  # what the answer comes from, where that changes: OpenAI's `system_fingerprint`

    def begin(self) -> list[dict[str, Any]]:
        """The first events of a stream."""

    def take(self, index: int, pieces: Sequence[Piece], end: End | None) -> list[dict[str, Any]]:
        """The events of more pieces of a choice."""

    def finish(self, usage: Usage) -> list[dict[str, Any]]:
        """The last events."""

    def fail(self, error: ApiError) -> list[dict[str, Any]]:
        """The last event where something went wrong under way."""

    def whole(self, usage: Usage) -> dict[str, Any]:
        """What a client gets that doesn't stream."""


class Json(Response):
    """A JSON object."""

    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        """Compact UTF-8; half a surrogate pair, which only a client can have sent, becomes a question mark."""
        return encode(content).encode("utf-8", "replace")


def encode(content: Any) -> str:
    """Compact JSON on one line."""
    return json.dumps(content, ensure_ascii=False, allow_nan=False, separators=(",", ":"))


class Generation:
    """A job in the engine. Raises ApiError where the engine is full. Close it, whatever happens."""

    def __init__(self, worker: Worker, job: Job, turns: Sequence[Turn | PlainTurn]) -> None:
        self._worker, self._job, self._turns = worker, job, turns
        self._ticket = worker.submit(job.requests, job.echo)

    @property
    def usage(self) -> Usage:
        """Tokens so far."""
        sampled = sum(turn.num_tokens for turn in self._turns)
        return Usage(self._job.prompts, sampled, sum(turn.num_reasoning for turn in self._turns))

    async def accepted(self, answer: Answer) -> None:
        """Wait until the engine has taken it. Raises ApiError if it doesn't."""
        event = await self._ticket.events.get()
        if isinstance(event, Failed):
            raise event.error
        assert isinstance(event, Accepted), event
        if event.step is not None:
            answer.fingerprint = f"step-{event.step}"
        self._worker.metrics.prompt(self._job.prompts)

    async def parts(self) -> AsyncIterator[tuple[int, list[Piece], End | None]]:
        """(choice, its new pieces, why it ended), as they come, to the end of all. Raises ApiError."""
        left = set(range(len(self._turns)))
        while left:
            for index, pieces in self._read(await self._news()).items():
                end = self._turns[index].end
                if end is not None:
                    left.discard(index)
                if pieces or end is not None:
                    yield index, pieces, end

    def close(self) -> None:
        """No more of it is wanted."""
        self._worker.cancel(self._ticket)

    async def _news(self) -> list[Event]:
        queue = self._ticket.events
        events = [await queue.get()]
        while not queue.empty():
            events.append(queue.get_nowait())
        return events

    def _read(self, events: Sequence[Event]) -> dict[int, list[Piece]]:
        found: dict[int, list[Piece]] = {}
        for event in events:
            if isinstance(event, Failed):
                raise event.error
            assert not isinstance(event, Accepted)
            turn = self._turns[event.choice]
            if turn.end is not None:
                continue
            if isinstance(event, Echoed):
                assert isinstance(turn, PlainTurn)
                found.setdefault(event.choice, []).extend(turn.echo(event.prompt, event.whole))
                continue
            found.setdefault(event.choice, []).extend(turn.push(event.token))
            if turn.end is not None:
                self._worker.cancel(self._ticket, event.choice)  # the engine doesn't know of stop texts
        return found


async def answer_whole(generation: Generation, answer: Answer, receive: Receive) -> Response:
    """The answer as one object. Raises ApiError; asyncio.CancelledError when nobody waits for it any more."""

    async def work() -> Response:
        await generation.accepted(answer)
        async for index, pieces, end in generation.parts():
            answer.take(index, pieces, end)
        return Json(answer.whole(generation.usage))

    working, leaving = asyncio.ensure_future(work()), asyncio.ensure_future(_left(receive))
    try:
        await asyncio.wait((working, leaving), return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return working.result()
        return Response(status_code=499)  # nobody reads it
    finally:
        generation.close()
        for task in (working, leaving):
            task.cancel()


async def _left(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class Events(StreamingResponse):
    """The answer as server-sent events; the generation is closed even if nothing was ever read."""

    def __init__(self, generation: Generation, answer: Answer) -> None:
        self._generation = generation
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        super().__init__(_events(generation, answer), media_type="text/event-stream", headers=headers)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send it."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._generation.close()


async def answer_stream(generation: Generation, answer: Answer) -> Response:
    """The answer as events, once the engine has taken it. Raises ApiError if it doesn't."""
    try:
        await generation.accepted(answer)
    except ApiError:
        generation.close()
        raise
    return Events(generation, answer)


async def _events(generation: Generation, answer: Answer) -> AsyncIterator[bytes]:
    yield _lines(answer, answer.begin())
    try:
        async for index, pieces, end in generation.parts():
            yield _lines(answer, answer.take(index, pieces, end))
        yield _lines(answer, answer.finish(generation.usage))
    except ApiError as error:
        yield _lines(answer, answer.fail(error))
    if not answer.named:
        yield b"data: [DONE]\n\n"


def _lines(answer: Answer, events: Sequence[dict[str, Any]]) -> bytes:
    found = []
    for event in events:
        name = f"event: {event['type']}\n" if answer.named else ""
        found.append(f"{name}data: {encode(event)}\n\n")
    return "".join(found).encode("utf-8", "replace")
