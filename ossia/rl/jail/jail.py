"""`Jail`: zygotes of one level, and programs forked from them."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Sequence
from types import TracebackType
from typing import Self

from ossia.errors import JailError
from ossia.rl.jail.levels import require, require_known, spawn_order, zygote_config
from ossia.rl.jail.outcome import DEFAULT_LIMITS, Level, Limits
from ossia.rl.jail.program import Program, Session
from ossia.rl.jail.worker import Process, Worker


class Jail:
    """Where programs are locked in; a context manager. Several threads may open programs at once.

    level       compute (no file can be opened), read (the standard library, installed packages and system libraries can
                be read), tools (as read; and `tool` runs compilers and shells), weak (limits alone)
    workers     zygotes, one a core that programs may use
    preload     modules that programs find imported; each is imported once, by each zygote
    warm        code of yours that a zygote runs after these, for what they do lazily
    allow_weak  accept the level weak, which keeps nobody from reading and writing your files

    Raises JailError where the machine can't give the level, or a module can't be imported.
    """

    def __init__(
        self,
        level: Level = "compute",
        *,
        workers: int = 1,
        preload: Sequence[str] = (),
        warm: str = "",
        allow_weak: bool = False,
    ) -> None:
        if workers < 1:
            raise ValueError(f"workers: {workers}; allowed: 1 or more")
        if level == "weak" and not allow_weak:
            raise JailError(
                "jail: level weak keeps no program from your files; to run one so all the same: allow_weak=True"
            )
        require_known(level)
        self.level: Level = level
        self._config = zygote_config(level, preload, warm)
        self._lock = threading.Lock()
        self._workers: list[Worker] = []
        self._turns = itertools.count()
        self._open = True
        try:
            for _ in range(workers):
                self._workers.append(Worker(self._config))
            require(level, self._workers[0])
        except JailError:
            self.close()
            raise

    def open(self, code: str, limits: Limits = DEFAULT_LIMITS, *, seed: int = 0) -> Program:
        """A process of its own with the code loaded; `Program.failure` says so where it couldn't be.

        seed  of `random` (and numpy's, where preloaded) in the program: the same program draws the same numbers
        """
        return Program(self._spawn(limits, seed), self.level, limits, code)

    def session(self, limits: Limits = DEFAULT_LIMITS, *, seed: int = 0) -> Session:
        """An empty Python session."""
        return Session(self._spawn(limits, seed), self.level, limits)

    def close(self) -> None:
        """End all programs and the zygotes."""
        with self._lock:
            self._open = False
            for worker in self._workers:
                worker.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _spawn(self, limits: Limits, seed: int) -> Process:
        worker = self._worker()
        return worker.spawn(spawn_order(worker, limits, seed), [])

    def _worker(self) -> Worker:
        """The next zygote in turn; one that was killed is started anew."""
        with self._lock:
            if not self._open:
                raise JailError("jail: it is closed")
            index = next(self._turns) % len(self._workers)
            if not self._workers[index].alive():
                self._workers[index].close()
                self._workers[index] = Worker(self._config)
            return self._workers[index]
