"""The parent's hand on one zygote: start it, have it fork programs, and let go of their processes in order."""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ossia.errors import JailError

_ZYGOTE = Path(__file__).with_name("zygote.py")
_START_S = 120.0  # importing sympy from a cold disk takes seconds
_ANSWER_S = 60.0  # a fork takes a millisecond; a machine that swaps, longer
# Sets come in the same order in every run, and a preloaded library starts no threads: a fork would lose them.
_ENVIRONMENT = {"PYTHONHASHSEED": "0", "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}


@dataclass(frozen=True, slots=True)
class Process:
    """A forked program: its number (another's only after it is reaped), a pidfd, and the channel to it."""

    worker: Worker
    pid: int
    pidfd: int
    channel: socket.socket

    def cpu_s(self) -> float:
        """Seconds of CPU that it has used, by the kernel's count; 0 once it is reaped."""
        try:
            return time.clock_gettime(~self.pid << 3 | 2)  # CPUCLOCK_SCHED of a process: clock_getcpuclockid(3)
        except OSError:
            return 0.0

    def kill(self) -> None:
        """End it, whatever it is doing."""
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(self.pidfd, signal.SIGKILL)

    def ends_within(self, seconds: float) -> bool:
        """Whether it ends by itself in that time."""
        poll = select.poll()
        poll.register(self.pidfd, select.POLLIN)
        return bool(poll.poll(seconds * 1000))

    def end(self, *, status: bool) -> int | None:
        """Kill it and let go of it; its wait status where asked for and still to be had."""
        self.kill()
        found = self.worker.wait(self.pid) if status else self.worker.release(self.pid)
        os.close(self.pidfd)
        self.channel.close()
        return found


class Worker:
    """One zygote. Its methods may be called from several threads.

    reads  whether its programs may read any file
    """

    def __init__(self, config: dict[str, Any]) -> None:
        self.reads = bool(config["readable"])
        self._lock = threading.Lock()
        self._control, far = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._said = tempfile.TemporaryFile()  # noqa: SIM115 - closed by close()
        with far:
            self._zygote = subprocess.Popen(
                [sys.executable, "-s", "-S", "-P", str(_ZYGOTE), str(far.fileno())],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=self._said,
                pass_fds=[far.fileno()],
                env=_ENVIRONMENT,
                cwd="/",
                start_new_session=True,
            )
        try:
            self._control.settimeout(_START_S)
            hello = json.loads(self._ask(json.dumps(config).encode())[0])
            if hello["error"] is not None:
                raise JailError(f"jail: it can't be prepared: {hello['error']}")
        except JailError:
            self.close()
            raise
        self._control.settimeout(_ANSWER_S)
        self.base_bytes: int = hello["base_bytes"]
        self.as_nobody: bool = hello["nobody"]

    def spawn(self, order: dict[str, Any], shared: list[int]) -> Process:
        """A new process; its channel is ready, and what it is locked in by is in force before it reads from it."""
        near, far = socket.socketpair()
        try:
            with far, self._lock:
                answer, fds = self._ask(json.dumps({"op": "spawn", **order}).encode(), [far.fileno(), *shared])
        except JailError:
            near.close()
            raise
        return Process(self, int(answer), fds[0], near)

    def release(self, pid: int) -> None:
        """Have the zygote reap a killed process when it is dead."""
        with self._lock, contextlib.suppress(OSError):  # of a zygote that is gone: so are its children
            self._control.send(json.dumps({"op": "release", "pid": pid}).encode())

    def wait(self, pid: int) -> int | None:
        """Have the zygote reap a killed process; its wait status, None if the zygote is gone."""
        try:
            with self._lock:
                answer, _ = self._ask(json.dumps({"op": "wait", "pid": pid}).encode())
        except JailError:
            return None
        return int(json.loads(answer)[0])

    def alive(self) -> bool:
        """Whether the zygote runs."""
        return self._zygote.poll() is None

    def close(self) -> None:
        """End the zygote, and with it all its children."""
        self._zygote.kill()
        self._zygote.wait()
        self._control.close()
        self._said.close()

    def _ask(self, message: bytes, fds: list[int] = []) -> tuple[bytes, list[int]]:  # noqa: B006
        try:
            socket.send_fds(self._control, [message], fds)
            answer, handles, _, _ = socket.recv_fds(self._control, 1 << 16, 4)
        except OSError as error:  # TimeoutError too
            raise JailError(
                f"jail: its zygote doesn't answer: {error}; it was killed, or the machine is out of memory"
            ) from None
        if not answer:
            raise JailError(f"jail: its zygote is gone: {self._last_words()}")
        return answer, handles

    def _last_words(self) -> str:
        self._said.seek(0)
        lines = self._said.read().decode(errors="replace").split("\n")
        return next((line for line in reversed(lines) if line), "it was killed, or the machine is out of memory")
