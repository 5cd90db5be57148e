"""Code of a model's in a process of its own: one frame out, one frame back, time and failure judged by the parent."""

from __future__ import annotations

import os
import select
import signal
import time
from typing import Any

from ossia.errors import JailError
from ossia.rl.jail.frames import HEADER, FrameError, Plain, Reply, decode, encode
from ossia.rl.jail.outcome import Closing, Failure, Level, Limits, Outcome
from ossia.rl.jail.worker import Process

_READY_S = 60.0
_PIECE_BYTES = 1 << 16
_LEAST_WAIT_S = 0.001
_GRACE_S = 0.1  # between the end of a channel and that of its process, before this side makes an end
MOST_OUTPUT = 20_000  # characters of a session's run


class _Ended(Exception):
    """A call that brought no reply."""

    def __init__(self, failure: Failure, detail: str) -> None:
        super().__init__(detail)
        self.failure: Failure = failure


class _Jailed(Closing):
    """A process and the exchange of frames with it. One thread at a time."""

    def __init__(self, process: Process, level: Level, limits: Limits) -> None:
        self._process = process
        self._level: Level = level
        self._limits = limits
        self._number = 0
        self._left_s = limits.total_s
        self._ended: str | None = None
        self._poll = select.poll()
        self._poll.register(process.channel, select.POLLIN)
        self._ready()

    @property
    def cpu_s(self) -> float:
        """Seconds of CPU that its process has used in all, also between calls; 0 once that has ended."""
        return self._process.cpu_s()

    def close(self) -> None:
        """End its process."""
        if self._ended is None:
            self._process.end(status=False)
            self._ended = "closed"

    def _ready(self) -> None:
        """Wait until it has locked itself in. What fails here is no program's doing: none has been sent yet."""
        channel = self._process.channel
        channel.settimeout(_READY_S)
        try:
            word = channel.recv(_PIECE_BYTES)
        except OSError as error:
            word = str(error).encode()
        if word != b"R":
            self._process.end(status=False)
            raise JailError(f"jail: a process couldn't lock itself in at level {self._level}: {word.decode()}")

    def _exchange(self, op: str, *given: Plain) -> Outcome:
        """Send a request and await its reply; whatever else happens ends the process."""
        if self._ended is not None:
            return Outcome(None, "closed", f"the program has ended: {self._ended}", 0.0, 0.0, self._level)
        self._number += 1
        frame = encode([self._number, op, *given])
        cpu, start = self._process.cpu_s(), time.perf_counter()
        try:
            reply = self._answer(frame, cpu, start)
        except _Ended as ended:
            wall_s, cpu_s = time.perf_counter() - start, max(0.0, self._process.cpu_s() - cpu)
            failure, detail = self._end(ended)
            return Outcome(None, failure, detail, wall_s, cpu_s, self._level)
        wall_s, cpu_s = time.perf_counter() - start, max(0.0, self._process.cpu_s() - cpu)
        self._left_s -= wall_s
        failure: Failure | None = None if reply.kind == "ok" else reply.kind  # type: ignore[assignment]
        return Outcome(reply.value, failure, reply.detail, wall_s, cpu_s, self._level)

    def _answer(self, frame: bytes, cpu: float, start: float) -> Reply:
        channel, clock = self._process.channel, _Clock(self._process, self._limits, self._left_s, cpu, start)
        try:
            if self._poll.poll(0) and channel.recv(1):
                raise _Ended("protocol", "it sent what it wasn't asked for")
            view = memoryview(frame)
            while view:
                channel.settimeout(clock.wait_s())
                with clock:
                    view = view[channel.send(view) :]
            data = bytearray()
            size = HEADER.size
            while len(data) < size:
                channel.settimeout(clock.wait_s())
                with clock:
                    part = channel.recv(_PIECE_BYTES)
                    if not part:
                        raise _Ended("crash", "")
                    data += part
                if size == HEADER.size and len(data) >= size:
                    size += HEADER.unpack_from(data)[0]
                    if size > self._limits.max_reply_bytes + HEADER.size:
                        raise _Ended("protocol", f"a reply of more than {self._limits.max_reply_bytes:,} bytes")
        except (ConnectionError, BrokenPipeError):
            raise _Ended("crash", "") from None
        if len(data) > size:
            raise _Ended("protocol", "more than a reply")
        try:
            return decode(bytes(data[HEADER.size :]), self._number)
        except FrameError as error:
            raise _Ended("protocol", f"no reply: {error}") from None

    def _end(self, ended: _Ended) -> tuple[Failure, str]:
        """Kill and reap the process; how it failed, after its exit status where that is what told."""
        crashed = ended.failure == "crash"
        left_by_itself = crashed and self._process.ends_within(_GRACE_S)
        status = self._process.end(status=crashed)
        failure, detail = ended.failure, str(ended)
        if crashed:
            failure, detail = _cause(status) if left_by_itself else ("crash", "it closed its channel")
        self._ended = f"{failure}, {detail}"
        return failure, detail


class _Clock:
    """What is left of a call's time; as a context, it lets a wait that ran out pass, for `wait_s` to judge."""

    def __init__(self, process: Process, limits: Limits, left_s: float, cpu: float, start: float) -> None:
        self._process = process
        self._wall_end = start + min(limits.wall_s, left_s)
        self._cpu_end = cpu + limits.cpu_s
        self._first = min(limits.wall_s, left_s, limits.cpu_s)

    def wait_s(self) -> float:
        """How long to wait before asking again: no process without threads uses more CPU than time passes."""
        if self._first:
            first, self._first = self._first, 0.0
            return max(first, _LEAST_WAIT_S)
        wall = self._wall_end - time.perf_counter()
        cpu = self._cpu_end - self._process.cpu_s()
        if wall <= 0 or cpu <= 0:
            raise _Ended("timeout", f"no reply within its limit of {'wall-clock' if wall <= 0 else 'CPU'} seconds")
        return max(min(wall, cpu), _LEAST_WAIT_S)

    def __enter__(self) -> None: ...

    def __exit__(self, kind: type[BaseException] | None, error: Any, trace: Any) -> bool:
        return kind is TimeoutError


def _cause(status: int | None) -> tuple[Failure, str]:
    if status is None:
        return "crash", "its process is gone with the jail's zygote"
    if not os.WIFSIGNALED(status):
        return "crash", f"its process exited with {os.waitstatus_to_exitcode(status)}"
    number = os.WTERMSIG(status)
    if number == signal.SIGXCPU:
        return "timeout", "it used up its CPU seconds"
    if number == signal.SIGKILL:
        return "memory", "the system killed its process, as it does when memory runs out"
    return "crash", f"its process was ended by {signal.Signals(number).name}"


class Program(_Jailed):
    """A program in its jail; `Jail.open` makes it. One thread at a time may use it.

    failure  the Outcome of loading it where that failed; calls then return it
    """

    def __init__(self, process: Process, level: Level, limits: Limits, code: str) -> None:
        super().__init__(process, level, limits)
        loaded = self._exchange("load", code)
        self.failure: Outcome | None = loaded if loaded.failure is not None else None
        if self.failure is not None:
            self.close()

    def call(self, function: str, *args: Plain) -> Outcome:
        """Call a function of the program's; what it returns arrives as JSON has it: a tuple as a list.

        Raises TypeError or ValueError where an argument isn't plain (`frames.encode`).
        """
        if self.failure is not None:
            return self.failure
        return self._exchange("call", function, list(args))


class Session(_Jailed):
    """A Python session that keeps its variables from run to run; `Jail.session` makes it. One thread at a time."""

    def run(self, code: str) -> Outcome:
        """Run a cell. The value is what it printed, then the repr of its last expression; also beside an error.

        Text beyond MOST_OUTPUT characters is left out, and the value's last line says how much.
        """
        return self._exchange("run", code, MOST_OUTPUT)

    @property
    def ended(self) -> bool:
        """Whether its process, and with it all variables, is gone: a timeout, a crash, `close`."""
        return self._ended is not None
