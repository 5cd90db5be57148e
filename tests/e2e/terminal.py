"""Programs in terminals of their own, as people use them."""

from __future__ import annotations

import os
import pty
import select
import signal
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from tests.e2e.conftest import START


class Terminal:
    """A program in a terminal of its own."""

    def __init__(self, pid: int, descriptor: int) -> None:
        self.pid, self._descriptor, self.seen, self._read_to = pid, descriptor, "", 0

    def type(self, keys: str) -> None:
        os.write(self._descriptor, keys.encode())

    def wait_for(self, words: str, timeout_s: float = 120.0) -> str:
        """What came since the last wait, up to and with `words`."""
        end = time.monotonic() + timeout_s
        while (found := self.seen.find(words, self._read_to)) < 0:
            ready, _, _ = select.select([self._descriptor], [], [], max(0.0, end - time.monotonic()))
            assert ready, f"no {words!r} in {self.seen[self._read_to :]!r}"
            self.seen += os.read(self._descriptor, 65536).decode(errors="replace").replace("\r\n", "\n")
        begun, self._read_to = self._read_to, found + len(words)
        return self.seen[begun : self._read_to]

    def exit_code(self) -> int:
        _, status = os.waitpid(self.pid, 0)
        self.pid = 0
        return os.waitstatus_to_exitcode(status)


@contextmanager
def terminal(*arguments: str | Path, start: Sequence[str] = START) -> Iterator[Terminal]:
    """`ossia` with these arguments in a new terminal; `start` is the command that it is started by."""
    pid, descriptor = pty.fork()
    if pid == 0:
        os.execv(start[0], [*start, *map(str, arguments)])
    screen = Terminal(pid, descriptor)
    try:
        yield screen
    finally:
        if screen.pid:
            os.kill(screen.pid, signal.SIGKILL)
            os.waitpid(screen.pid, 0)
        os.close(descriptor)
