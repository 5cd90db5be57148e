"""`Jail`: zygotes of one level, and programs forked from them; `Jails`: those of a run, opened once for each wish."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Mapping, Sequence
from types import MappingProxyType, TracebackType
from typing import Self

from ossia.errors import JailError
from ossia.rl.jail.levels import require, require_known, spawn_order, zygote_config
from ossia.rl.jail.outcome import DEFAULT_LIMITS, Level, Limits
from ossia.rl.jail.program import Program, Session
from ossia.rl.jail.shared import MOST_SHARED, Shared
from ossia.rl.jail.tool import DEFAULT_TOOL_LIMITS, ToolLimits, ToolOutcome, run_tool
from ossia.rl.jail.worker import Process, Worker


class Jail:
    """Where programs are locked in; a context manager. Several threads may open programs at once.

    level          compute (no file can be opened), read (the standard library, installed packages and system libraries
                   can be read), tools (as read; and `tool` runs compilers and shells), weak (limits alone)
    workers        zygotes, one a core that programs may use
    preload        modules that programs find imported; each is imported once, by each zygote
    warm           code of yours that a zygote runs after these, for what they do lazily
    reads_nothing  of level read or tools, but no file can be read: only what a program is given can be loaded, so that
                   none of the machine's libraries does its work for it
    allow_weak     accept the level weak, which keeps nobody from reading and writing your files

    Raises JailError where the machine can't give the level, or a module can't be imported.
    """

    def __init__(
        self,
        level: Level = "compute",
        *,
        workers: int = 1,
        preload: Sequence[str] = (),
        warm: str = "",
        reads_nothing: bool = False,
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
        self._config = zygote_config(level, preload, warm, reads_nothing=reads_nothing)
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

    def open(
        self,
        code: str,
        limits: Limits = DEFAULT_LIMITS,
        *,
        seed: int = 0,
        shared: Mapping[str, Shared] = MappingProxyType({}),
    ) -> Program:
        """A process of its own with the code loaded; `Program.failure` says so where it couldn't be.

        seed    of `random` (and numpy's, where preloaded) in the program: the same program draws the same numbers
        shared  libraries and arrays, by the names that the code finds them under; a library needs level read or tools
        """
        _check_shared(shared, self.level)
        return Program(self._spawn(limits, seed, shared), self.level, limits, code)

    def tool(
        self,
        argv: Sequence[str],
        files: Mapping[str, bytes] = MappingProxyType({}),
        *,
        wanted: Sequence[str] = (),
        limits: ToolLimits = DEFAULT_TOOL_LIMITS,
    ) -> ToolOutcome:
        """Run a compiler, a shell or another program of this machine's, and whatever that starts, to its end.

        argv    it and its arguments, found as a shell finds it in /usr/bin; its folder is /work, in memory and empty
        files   by name, what the folder holds at first; `wanted`: what is brought back of it, where it is there
        Raises  JailError where this jail's level is compute or read, or no tool can be started; ValueError for a name
                that isn't a plain relative path. What the tool does is told by the outcome.
        """
        if self.level not in ("tools", "weak"):
            raise JailError(f"jail: level {self.level} runs no tools\n  next: Jail('tools')")
        with self._lock:
            if not self._open:
                raise JailError("jail: it is closed")
        return run_tool(self.level, argv, files, wanted, limits)

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

    def _spawn(self, limits: Limits, seed: int, shared: Mapping[str, Shared] = MappingProxyType({})) -> Process:
        worker = self._worker()
        return worker.spawn(spawn_order(worker, limits, seed, shared), [one.fd for one in shared.values()])

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


def _check_shared(shared: Mapping[str, Shared], level: Level) -> None:
    wrong = [name for name in shared if not name.isidentifier()]
    if wrong or len(shared) > MOST_SHARED:
        found = f"{len(shared)} pieces" if not wrong else f"{wrong[0]!r}"
        raise ValueError(f"shared: {found}; allowed: at most {MOST_SHARED}, each named as a variable of the program's")
    if level == "compute" and any(one.kind == "library" for one in shared.values()):
        raise ValueError("shared: a program of level compute can open no library; allowed: levels read and tools")


class Jails:
    """Where the environments of a run have what a model wrote run; a context manager.

    workers     zygotes of each jail, one a core that programs may use
    allow_weak  where the machine can't give a level, take `weak` for it: limits alone, your files open to the program
    """

    def __init__(self, *, workers: int = 1, allow_weak: bool = False) -> None:
        self._workers, self._allow_weak = workers, allow_weak
        self._opened: dict[tuple[Level, tuple[str, ...], str, bool], Jail] = {}

    def get(
        self, level: Level = "compute", *, preload: Sequence[str] = (), warm: str = "", reads_nothing: bool = False
    ) -> Jail:
        """The jail for these wishes, which are those of `Jail`; the same one each time.

        Ask while an environment is being made, so that a run that can't have it ends before any weight is read.
        Raises JailError where the machine can't give the level, or a module can't be imported.
        """
        key = (level, tuple(preload), warm, reads_nothing)
        if key not in self._opened:
            self._opened[key] = self._open(*key)
        return self._opened[key]

    @property
    def levels(self) -> tuple[str, ...]:
        """The levels of what was opened, each once: for logs."""
        return tuple(dict.fromkeys(jail.level for jail in self._opened.values()))

    def close(self) -> None:
        """End all programs."""
        for jail in self._opened.values():
            jail.close()
        self._opened.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _open(self, level: Level, preload: tuple[str, ...], warm: str, reads_nothing: bool) -> Jail:
        try:
            return Jail(level, workers=self._workers, preload=preload, warm=warm, reads_nothing=reads_nothing)
        except JailError as error:
            if not self._allow_weak:
                raise JailError(
                    f"{error}\n  next: another machine, or `rl.jail: weak` for programs that you trust"
                ) from error
            return Jail("weak", workers=self._workers, preload=preload, warm=warm, allow_weak=True)
