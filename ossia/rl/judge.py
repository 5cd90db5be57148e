"""Turns are judged on threads beside generation: what an environment raises, or takes too long for, costs one sample.

A thread that hangs can't be stopped, so it is left behind and another takes its place; it doesn't keep the process
alive. Own code because the pools of `concurrent.futures` wait for their threads at exit.
"""

from __future__ import annotations

import queue
import threading
import time
from dataclasses import dataclass, field
from types import TracebackType

from ossia.rl.env import Episode, Step, Turn


@dataclass(slots=True)
class Verdict:
    """What became of one turn: a step, or why there is none. `done` is set once either is known."""

    episode: Episode
    turn: Turn
    step: Step | None = None
    failure: str | None = None
    started_s: float | None = None
    seconds: float = 0.0
    done: threading.Event = field(default_factory=threading.Event)


class Judge:
    """Judges turns on `workers` threads."""

    def __init__(self, workers: int, timeout_s: float) -> None:
        self._timeout_s = timeout_s
        self._jobs: queue.SimpleQueue[Verdict | None] = queue.SimpleQueue()
        self._workers = workers
        for _ in range(workers):
            self._hire()

    def submit(self, episode: Episode, turn: Turn) -> Verdict:
        """Have a turn judged; the verdict is filled in by and by."""
        verdict = Verdict(episode, turn)
        self._jobs.put(verdict)
        return verdict

    def wait(self, verdict: Verdict) -> Verdict:
        """The verdict once it is known, or once the turn has had its time."""
        while not verdict.done.wait(0.05 if verdict.started_s is None else self._left(verdict)):
            if verdict.started_s is not None and self._left(verdict) <= 0:
                verdict.failure = f"no verdict after {self._timeout_s:g} s"
                verdict.seconds = self._timeout_s
                self._hire()  # for the thread that still hangs there
                break
        return verdict

    def close(self) -> None:
        """Let the threads end."""
        for _ in range(self._workers):
            self._jobs.put(None)

    def _left(self, verdict: Verdict) -> float:
        assert verdict.started_s is not None
        return max(0.0, verdict.started_s + self._timeout_s - time.monotonic())

    def _hire(self) -> None:
        threading.Thread(target=self._work, name="judge", daemon=True).start()

    def _work(self) -> None:
        while (verdict := self._jobs.get()) is not None:
            verdict.started_s = time.monotonic()
            caught = _Caught()
            step = None
            with caught:
                step = verdict.episode.step(verdict.turn)
            if verdict.failure is not None:
                return  # too late: this thread's place was taken
            verdict.seconds = time.monotonic() - verdict.started_s
            if step is None:
                verdict.failure = caught.why or "the environment returned no step"
            verdict.step = step
            verdict.done.set()


class _Caught:
    """Whatever an environment raises is a result of its own, not an error of the run."""

    why: str | None = None

    def __enter__(self) -> _Caught:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> bool:
        if error is None or kind is None or not issubclass(kind, Exception):
            return False
        self.why = f"{kind.__name__}: {error}"
        return True
