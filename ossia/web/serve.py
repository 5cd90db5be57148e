"""`ossia serve`: models, their adapters, an engine each, and an HTTP server around them until a signal ends it.

The first SIGTERM or Ctrl-C drains: no new answers, running ones finish as long as the drain limit lasts. The second one
breaks them off.
"""

from __future__ import annotations

import asyncio
import logging
import signal
import socket
import sys
import time
from collections.abc import Sequence
from types import FrameType

import uvicorn

from ossia.errors import Interrupted
from ossia.model.open import DeviceChoice, DtypeName, WeightsChoice
from ossia.web.address import check_key, listen, open_to_all, own_names
from ossia.web.app import Server, create_app
from ossia.web.follow import Follower
from ossia.web.hosting import Limits, open_hosted, read_wanted
from ossia.web.metrics import Metrics
from ossia.web.protocol.errors import ApiError

log = logging.getLogger("ossia.web")
_CLOSE_S = 5  # for connections to take their last bytes


def run_server(
    models: Sequence[str],
    *,
    adapters: Sequence[str] = (),
    host: str = "127.0.0.1",
    port: int = 8000,
    api_key: str | None = None,
    allow_hosts: Sequence[str] = (),
    max_batch: int = 64,
    max_queue: int = 256,
    max_length: int | None = None,
    int8_cache: bool = False,
    drain_s: float = 30.0,
    dtype: DtypeName = "bfloat16",
    weights: WeightsChoice = "auto",
    device: DeviceChoice = "auto",
) -> None:
    """Serve until a signal comes.

    models      MODEL or NAME=MODEL each, with an engine each; requests choose one by its name
    adapters    NAME=DIR or MODEL:NAME=DIR each: a run folder, which is followed, or a folder in PEFT's format
    port        0: any that is free; the line that says the server is ready names it
    allow_hosts names of the server beside those of this machine, see `own_names`
    max_batch   sequences that run at once, max_queue: that may wait beside them; of each model
    max_length  tokens of a prompt and its answer; None: the model's positions
    int8_cache  keys and values in 8 bits
    drain_s     how long running answers may go on after the first signal
    Raises      UserError for a model, an adapter or an address that can't be used; Interrupted where answers were
                broken off
    """
    check_key(api_key)
    wanted = read_wanted(models, adapters)
    _log_to_stderr()
    with listen(host, port) as listener:
        names = own_names(listener.getsockname()[0], allow_hosts)
        metrics = Metrics()
        limits = Limits(max_batch, max_queue, max_length, int8_cache)
        hosted = open_hosted(wanted, metrics, limits, dtype=dtype, weights=weights, device=device)
        if warning := open_to_all(host, api_key):
            log.warning(warning)
        serve(Server(tuple(hosted), metrics, api_key=api_key, hosts=names), listener, drain_s=drain_s)


def serve(server: Server, listener: socket.socket, *, drain_s: float) -> None:
    """Serve on a socket until a signal comes. Raises Interrupted if answers were broken off."""
    follower = Follower(server.followed, server.metrics)
    for one in server.models:
        one.worker.start()
    follower.start()
    http = _Http(server, drain_s)
    host, port = listener.getsockname()[:2]
    where = f"[{host}]" if ":" in host else host
    print(f"ossia serves {', '.join(server.names)} at http://{where}:{port}", file=sys.stderr, flush=True)
    http.run([listener])
    follower.stop()
    for one in server.models:
        one.worker.stop()
    server.render.shutdown()
    assert not server.is_dead, "an engine's thread ended; its error is above"
    if http.broken_off:
        number = http.broken_off
        raise Interrupted(f"stopped; {number} {'answer was' if number == 1 else 'answers were'} broken off")


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
        running = self._server.outstanding
        words = "stopping at once" if self._hurry else f"finishing {running} sequences; once more stops at once"
        print(f"ossia: {name}, {words}", file=sys.stderr, flush=True)

    async def on_tick(self, counter: int) -> bool:
        """Ten times a second: whether it is over."""
        server = self._server
        if server.draining and (self._hurry or time.monotonic() > self._until):
            error = ApiError("the server is shutting down", status=503, code="shutting_down")
            self.broken_off = sum(one.worker.fail_all(error) for one in server.models)
            await asyncio.sleep(0)
            return True
        if server.draining and not server.outstanding:
            return True
        return await super().on_tick(counter) or server.is_dead


def _log_to_stderr() -> None:
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(message)s"))
    log.handlers = [handler]
    log.propagate = False
    log.setLevel(logging.INFO)
