"""The HTTP side: routes, who may come in, and errors in OpenAI's shape. It runs on the event loop and never waits.

| route                                          |                                                                |
|------------------------------------------------|----------------------------------------------------------------|
| POST /v1/chat/completions, /v1/responses, /v1/completions | answers, whole or as server-sent events             |
| GET /v1/models, /v1/models/NAME                | the models and their adapters                                  |
| GET /v1/ossia/info                             | what the chat page needs to know                               |
| GET /health, /metrics                          | whether it serves; Prometheus                                  |
| GET /, /page/...                               | the chat page                                                  |
With a key everything under /v1 and /metrics asks for it. What names another server is refused, see web/address.py.
"""

from __future__ import annotations

import asyncio
import hmac
import json
import logging
import secrets
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from fastapi import FastAPI, Request, Response
from starlette.exceptions import HTTPException
from starlette.responses import FileResponse
from starlette.staticfiles import StaticFiles
from starlette.types import ASGIApp, Message, Receive, Scope, Send

import ossia
from ossia.harmony import Vocabulary
from ossia.web.address import foreign_name
from ossia.web.answering import Answer, Generation, Json, answer_stream, answer_whole
from ossia.web.follow import RunAdapter
from ossia.web.hosting import Hosted
from ossia.web.metrics import IDLE, Metrics
from ossia.web.protocol.bodies import ChatBody, ChoiceFields, CompletionBody, ResponseBody, read_body
from ossia.web.protocol.chat import ChatAnswer, Head
from ossia.web.protocol.completions import TextAnswer
from ossia.web.protocol.errors import ApiError, internal
from ossia.web.protocol.prompts import Job, Served, chat_job, completion_job, unknown_model
from ossia.web.protocol.responses_in import response_job
from ossia.web.protocol.responses_out import ResponseAnswer
from ossia.web.protocol.turn import PlainTurn, Turn
from ossia.web.worker import Worker

log = logging.getLogger("ossia.web")
PAGE = Path(__file__).parent / "page"
MAX_BODY_BYTES = 16 * 2**20
_LOCKED = ("/v1/", "/metrics")
_FRESH = {"Cache-Control": "no-cache", "X-Content-Type-Options": "nosniff"}
_Body = TypeVar("_Body", ChatBody, CompletionBody, ResponseBody)


@dataclass(slots=True)
class Server:
    """What the routes share.

    models    each with names of its own
    hosts     that requests may name as the server, and as the site they come from; None: any
    draining  no new answers are begun
    render    one thread on which prompts are rendered, so that a long one holds nobody up
    """

    models: tuple[Hosted, ...]
    metrics: Metrics
    api_key: str | None = None
    hosts: frozenset[str] | None = None
    max_body_bytes: int = MAX_BODY_BYTES
    draining: bool = False
    render: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(1, "ossia-render"))

    @property
    def names(self) -> list[str]:
        """Of the models, each with its adapters behind it."""
        return [name for one in self.models for name in (one.served.name, *one.served.adapters)]

    @property
    def followed(self) -> list[tuple[RunAdapter, Worker]]:
        """The adapters that follow a run, and who serves them."""
        return [(run, one.worker) for one in self.models for run in one.runs.values()]

    @property
    def outstanding(self) -> int:
        """Sequences that run or wait."""
        return sum(one.worker.outstanding for one in self.models)

    @property
    def is_dead(self) -> bool:
        """Whether an engine's thread has ended by a fault."""
        return any(one.worker.dead for one in self.models)

    def find(self, model: str) -> Hosted:
        """Which model has this name, or an adapter of it, or else was started as it. Raises ApiError."""
        for one in self.models:
            if model in (one.served.name, *one.served.adapters):
                return one
        for one in self.models:
            if model in one.served.aliases:
                return one
        raise unknown_model(model, self.names)


def create_app(server: Server) -> FastAPI:
    """The application for an ASGI server."""
    app = FastAPI(title="Ossia", version=ossia.__version__, openapi_url=None, docs_url=None, redoc_url=None)
    app.add_middleware(Gate, server=server)
    app.add_exception_handler(ApiError, _api_error)
    app.add_exception_handler(HTTPException, _http_error)
    app.add_exception_handler(Exception, _fault)
    _add_answers(app, server)
    _add_facts(app, server)
    app.mount("/page", PageFiles(directory=PAGE), name="page")

    @app.get("/")
    async def page() -> Response:
        return FileResponse(PAGE / "index.html", headers=_FRESH)

    return app


class PageFiles(StaticFiles):
    """The chat page's files, asked for again each time, so that a newer server's never mix with an older one's."""

    def file_response(self, *args: Any, **kwargs: Any) -> Response:
        """The file, or a 304 where the browser has it already."""
        found = super().file_response(*args, **kwargs)
        found.headers.update(_FRESH)
        return found


def _add_answers(app: FastAPI, server: Server) -> None:
    async def read(
        request: Request, kind: type[_Body], job_of: Callable[[_Body, Served], Job]
    ) -> tuple[_Body, Job, Hosted]:
        body = read_body(kind, await _read_json(request, server.max_body_bytes))
        hosted = server.find(body.model)
        job = await asyncio.get_running_loop().run_in_executor(server.render, job_of, body, hosted.served)
        return body, job, hosted

    async def reply(request: Request, generation: Generation, answer: Answer, stream: bool | None) -> Response:
        if stream:
            return await answer_stream(generation, answer)
        return await answer_whole(generation, answer, request.receive)

    @app.post("/v1/chat/completions")
    async def chat(request: Request) -> Response:
        body, job, hosted = await read(request, ChatBody, chat_job)
        vocab = hosted.served.vocab
        turns = [_turn(vocab, job) for _ in job.requests]
        options = {"logprobs": job.logprobs, "says_usage": _says_usage(body)}
        answer = ChatAnswer(Head.new("chatcmpl-", time.time(), body.model), vocab, len(turns), **options)
        return await reply(request, Generation(hosted.worker, job, turns), answer, body.stream)

    @app.post("/v1/completions")
    async def completions(request: Request) -> Response:
        body, job, hosted = await read(request, CompletionBody, completion_job)
        vocab = hosted.served.vocab
        turns = [PlainTurn(vocab, job.stops, one.stops) for one in job.requests]
        options = {"logprobs": job.logprobs, "says_usage": _says_usage(body)}
        answer = TextAnswer(Head.new("cmpl-", time.time(), body.model), vocab, len(turns), **options)
        return await reply(request, Generation(hosted.worker, job, turns), answer, body.stream)

    @app.post("/v1/responses")
    async def responses(request: Request) -> Response:
        body, job, hosted = await read(request, ResponseBody, response_job)
        vocab = hosted.served.vocab
        answer = ResponseAnswer(Head.new("resp_", time.time(), body.model), body, vocab, logprobs=job.logprobs)
        return await reply(request, Generation(hosted.worker, job, [_turn(vocab, job)]), answer, body.stream)


def _add_facts(app: FastAPI, server: Server) -> None:
    @app.get("/v1/models")
    async def list_models() -> Response:
        return Json({"object": "list", "data": [_model(server.find(name), name) for name in server.names]})

    @app.get("/v1/models/{name:path}")
    async def one_model(name: str) -> Response:
        hosted = server.find(name)
        return Json(_model(hosted, hosted.served.adapter(name) or hosted.served.name))

    @app.get("/v1/ossia/info")
    async def info() -> Response:
        about = {"version": ossia.__version__, "dtype": server.models[0].served.dtype}
        return Json({**about, "models": [_about(server.find(name), name) for name in server.names]})

    @app.get("/health")
    async def health() -> Response:
        status = "engine stopped" if server.is_dead else "draining" if server.draining else "ok"
        load = sum((one.worker.load() for one in server.models), IDLE)
        return Json({"status": status, **load._asdict()}, 200 if status == "ok" else 503)

    @app.get("/metrics")
    async def metrics() -> Response:
        return Response(server.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")


def _model(hosted: Hosted, name: str) -> dict[str, Any]:
    """A model or an adapter as OpenAI lists it."""
    served = hosted.served
    found = {
        "id": name,
        "object": "model",
        "created": served.created,
        "owned_by": "ossia",
        "parent": None if name == served.name else served.name,
        "max_model_len": served.max_length,
    }
    return found | ({"step": hosted.worker.steps[name]} if name in hosted.worker.steps else {})


def _about(hosted: Hosted, name: str) -> dict[str, Any]:
    """What the chat page needs to know of a model or an adapter; `problem`: why its newest checkpoint isn't served."""
    served, run = hosted.served, hosted.runs.get(name)
    followed = {} if run is None else {"step": hosted.worker.steps.get(name), "problem": run.problem}
    is_adapter = name in served.adapters
    about = {"id": name, "adapter": is_adapter, "parent": served.name if is_adapter else None}
    return {**about, "context_length": served.max_length, **followed}


def _turn(vocab: Vocabulary, job: Job) -> Turn:
    return Turn(vocab, job.stops, one_call=job.one_call, only_final=job.only_json)


def _says_usage(body: ChoiceFields) -> bool:
    if body.stream_options is not None and not body.stream:
        raise ApiError("stream_options: only a stream has them", param="stream_options")
    return bool(body.stream_options is not None and body.stream_options.include_usage)


async def _read_json(request: Request, limit: int) -> Any:
    """The body. Raises ApiError 415, 413 or 400."""
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        raise ApiError("the body has to be JSON: send the header Content-Type: application/json", status=415)
    too_large = ApiError(f"the body is larger than {limit} bytes", status=413, code="body_too_large")
    length = request.headers.get("content-length", "0")
    if length.isdigit() and int(length) > limit:
        raise too_large
    data = bytearray()
    async for chunk in request.stream():
        data += chunk
        if len(data) > limit:
            raise too_large
    try:
        return json.loads(data, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise ApiError(f"the body is not JSON: {error}", code="invalid_json") from None


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not a JSON number")


async def _api_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return Json(error.body, error.status, error.headers)


async def _http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    words = f"{request.method} {request.url.path}: {error.detail}"
    return Json(ApiError(words, status=error.status_code).body, error.status_code, error.headers)


async def _fault(request: Request, error: Exception) -> Response:
    number = f"err_{secrets.token_hex(8)}"
    log.error("%s: %s %s failed", number, request.method, request.url.path, exc_info=error)
    return await _api_error(request, internal(number))


class Gate:
    """Around every request: its id, the key, and what is counted and logged."""

    def __init__(self, app: ASGIApp, server: Server) -> None:
        self._app, self._server = app, server

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let a request in, or answer it here."""
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        number, begun, status = f"req_{secrets.token_hex(8)}", time.monotonic(), 500

        async def sending(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message["headers"], (b"x-request-id", number.encode())]
            await send(message)

        refused = self._refusal(scope)
        try:
            if refused is None:
                await self._app(scope, receive, sending)
            else:
                await Json(refused.body, refused.status, refused.headers)(scope, receive, sending)
        finally:
            seconds = time.monotonic() - begun
            route = _route_of(scope)
            self._server.metrics.request(route, status, seconds)
            if route not in _QUIET:
                log.info("%s %s %s %d %.3f s", number, scope["method"], scope["path"], status, seconds)

    def _refusal(self, scope: Scope) -> ApiError | None:
        server, path = self._server, scope["path"]
        if server.hosts is not None and (found := foreign_name(scope["headers"], server.hosts)):
            return _not_meant(*found, server.hosts)
        if server.api_key is not None and path.startswith(_LOCKED):
            scheme, _, key = dict(scope["headers"]).get(b"authorization", b"").partition(b" ")
            is_right = hmac.compare_digest(key.strip(), server.api_key.encode())
            if not is_right or scheme.lower() != b"bearer":  # in any case: RFC 9110, section 11.1
                words = "no such API key; send the one that the server was started with: Authorization: Bearer KEY"
                return ApiError(words, status=401, code="invalid_api_key")
        if server.draining and scope["method"] == "POST":
            headers = {"Retry-After": "5", "Connection": "close"}
            return ApiError("the server is shutting down", status=503, code="shutting_down", headers=headers)
        return None


def _not_meant(header: str, said: str, hosts: frozenset[str]) -> ApiError:
    words = (
        f"{header} is {said[:200]!r}, and this server answers to {', '.join(sorted(hosts))} alone, so that no page of "
        "another site can use it; if it is meant, start the server with that name: ossia serve ... --allow-host NAME"
    )
    return ApiError(words, status=403, code="host_not_allowed")


_QUIET = ("/health", "/metrics", "/v1/ossia/info", "/page")  # asked for again and again by programs
_ROUTES = ("/v1/chat/completions", "/v1/responses", "/v1/completions", "/v1/models", *_QUIET, "/")


def _route_of(scope: Scope) -> str:
    """The path as metrics name it: one of a few, whatever clients ask for."""
    path = scope["path"]
    if path in _ROUTES:
        return str(path)
    return next((route for route in ("/v1/models", "/page") if path.startswith(f"{route}/")), "other")
