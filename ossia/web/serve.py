"""`ossia serve`: a model, its adapters, one engine, and an HTTP server around it until a signal ends it.

The first SIGTERM or Ctrl-C drains: no new answers, running ones finish as long as the drain limit lasts. The second one
breaks them off.
"""

from __future__ import annotations

import asyncio
import logging
import re
import signal
import socket
import sys
import time
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from types import FrameType

import uvicorn

from ossia.config import is_hub_name
from ossia.engine import Engine
from ossia.engine.grammar import GrammarCompiler
from ossia.errors import Interrupted, UserError
from ossia.harmony import Renderer
from ossia.model.lora import Lora
from ossia.model.open import DeviceChoice, DtypeName, WeightsChoice, open_model
from ossia.model.peft import find_adapter, load_adapter
from ossia.web.address import check_key, listen, open_to_all
from ossia.web.app import Server, create_app
from ossia.web.protocol.errors import ApiError
from ossia.web.protocol.prompts import Served
from ossia.web.worker import Worker

log = logging.getLogger("ossia.web")
_NAME = re.compile(r"[\w.:/@-]+")
_CLOSE_S = 5  # for connections to take their last bytes


def run_server(
    model: str,
    *,
    adapters: Sequence[str] = (),
    host: str = "127.0.0.1",
    port: int = 8000,
    api_key: str | None = None,
    max_batch: int = 64,
    max_queue: int = 256,
    max_length: int | None = None,
    drain_s: float = 30.0,
    dtype: DtypeName = "bfloat16",
    weights: WeightsChoice = "auto",
    device: DeviceChoice = "auto",
) -> None:
    """Serve until a signal comes.

    adapters    NAME=DIR each: a run folder, or a folder in PEFT's format; requests choose one by its name
    port        0: any that is free; the line that says the server is ready names it
    max_batch   sequences that run at once, max_queue: that may wait beside them
    max_length  tokens of a prompt and its answer; None: the model's positions
    drain_s     how long running answers may go on after the first signal
    Raises      UserError for a model, an adapter or an address that can't be used; Interrupted where answers were
                broken off
    """
    check_key(api_key)
    named = _named(adapters)
    name = model if is_hub_name(model) else Path(model).expanduser().resolve().name
    if name in named:
        raise UserError(f"--adapter {name}=...: the model itself has that name; choose another")
    _log_to_stderr()
    with listen(host, port) as listener:
        transformer, vocab = open_model(model, dtype=dtype, weights=weights, device=device)
        arch, base = transformer.arch, transformer.weights.checkpoint
        most = arch.max_positions
        if max_length is not None and not 2 <= max_length <= most:
            raise UserError(f"--max-length: found {max_length}; allowed: 2 to {most}, this model's positions")
        loras: dict[str, Lora | None] = {
            one: load_adapter(path, arch, transformer.device, base=base) for one, path in named.items()
        }
        grammar = GrammarCompiler(vocab, arch.vocab_size) if find_spec("llguidance") else None
        served = Served(
            name,
            vocab,
            Renderer(vocab),
            arch.vocab_size,
            max_length or most,
            int(time.time()),
            dtype,
            grammar,
            tuple(named),
            (model,),
        )
        engine = Engine(transformer, vocab=vocab, adapters=loras, max_batch=max_batch)
        if warning := open_to_all(host, api_key):
            log.warning(warning)
        server = Server(served, Worker(engine, max_queue=max_queue), api_key=api_key)
        serve(server, listener, drain_s=drain_s)


def serve(server: Server, listener: socket.socket, *, drain_s: float) -> None:
    """Serve on a socket until a signal comes. Raises Interrupted if answers were broken off."""
    server.worker.start()
    http = _Http(server, drain_s)
    host, port = listener.getsockname()[:2]
    where = f"[{host}]" if ":" in host else host
    models = ", ".join((server.served.name, *server.served.adapters))
    print(f"ossia serves {models} at http://{where}:{port}", file=sys.stderr, flush=True)
    http.run([listener])
    server.worker.stop()
    server.render.shutdown()
    assert not server.worker.dead, "the engine's thread ended; its error is above"
    if http.broken_off:
        raise Interrupted(f"stopped; {http.broken_off} answers were broken off")


class _Http(uvicorn.Server):
    """uvicorn, with a drain of our own: its sockets stay open, so that who comes late is told why."""

    def __init__(self, server: Server, drain_s: float) -> None:
        super().__init__(
            uvicorn.Config(
                create_app(server),
                log_config=None,
                log_level="error",
                access_log=False,
                lifespan="off",
                ws="none",
                server_header=False,
                timeout_graceful_shutdown=_CLOSE_S,
            )
        )
        self._server, self._drain_s = server, drain_s
        self._until = float("inf")
        self._hurry = False
        self.broken_off = 0

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """A signal came."""
        self._hurry = self._server.draining
        self._server.draining = True
        self._until = min(self._until, time.monotonic() + self._drain_s)
        name = signal.Signals(sig).name
        running = self._server.worker.outstanding
        words = "stopping at once" if self._hurry else f"finishing {running} sequences; once more stops at once"
        print(f"ossia: {name}, {words}", file=sys.stderr, flush=True)

    async def on_tick(self, counter: int) -> bool:
        """Ten times a second: whether it is over."""
        worker = self._server.worker
        if self._server.draining and (self._hurry or time.monotonic() > self._until):
            self.broken_off = worker.fail_all(ApiError("the server is shutting down", status=503, code="shutting_down"))
            await asyncio.sleep(0)
            return True
        if self._server.draining and not worker.outstanding:
            return True
        return await super().on_tick(counter) or worker.dead


def _named(adapters: Sequence[str]) -> dict[str, Path]:
    """NAME=DIR each -> where they are. Raises UserError."""
    found: dict[str, Path] = {}
    for given in adapters:
        name, equals, folder = given.partition("=")
        if not equals or not folder or not _NAME.fullmatch(name):
            raise UserError(f"--adapter {given}: expected NAME=DIR, like --adapter math=runs/math")
        if name in found:
            raise UserError(f"--adapter {given}: {name} is named twice")
        found[name] = find_adapter(folder)
    return found


def _log_to_stderr() -> None:
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(message)s"))
    log.handlers = [handler]
    log.propagate = False
    log.setLevel(logging.INFO)
