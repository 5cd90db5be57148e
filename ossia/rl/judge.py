"""Turns are judged on threads beside generation: what an environment raises, or takes too long for, costs one sample.

A thread that hangs can't be stopped, so it is left behind and another takes its place; it doesn't keep the process
alive. Own code because the pools of `concurrent.futures` wait for their threads at exit.
"""

from __future__ import annotations

import queue
import threading
import time
from dataclasses import dataclass, field

from ossia.rl.env import Caught, Env, Episode, Step, Task, Turn

_LOOK_S = 0.05  # between two looks at what has had its time


@dataclass(slots=True)
class Verdict:
    """What became of one turn: a step, or why there is none. `done` is set once either is known.

    is_late  the turn had its time; its thread may still be at it
    """

    episode: Episode
    turn: Turn
    step: Step | None = None
    failure: str | None = None
    started_s: float = 0.0
    seconds: float = 0.0
    is_late: bool = False
    done: threading.Event = field(default_factory=threading.Event)


class Judge:
    """Judges turns on `workers` threads."""

    def __init__(self, workers: int, timeout_s: float) -> None:
        self._timeout_s = timeout_s
        self._jobs: queue.SimpleQueue[Verdict | None] = queue.SimpleQueue()
        self._workers = workers
        self._lock = threading.Lock()  # of `_running` and of who sets a verdict
        self._running: dict[int, Verdict] = {}
        for _ in range(workers):
            self._hire()

    def submit(self, episode: Episode, turn: Turn) -> Verdict:
        """Have a turn judged; the verdict is filled in by and by."""
        verdict = Verdict(episode, turn)
        self._jobs.put(verdict)
        return verdict

    def wait(self, verdict: Verdict) -> Verdict:
        """The verdict once it is known, or once the turn has had its time."""
        # All that run are watched, not this one alone: it may have to wait for a thread that hangs in another.
        while not verdict.done.wait(min(_LOOK_S, self._timeout_s)):
            self._give_up()
        return verdict

    def close(self) -> None:
        """Let the threads end."""
        for _ in range(self._workers):
            self._jobs.put(None)

    def _give_up(self) -> None:
        """Turns that have had their time get no verdict; another thread takes the place of each that hangs there."""
        now = time.monotonic()
        with self._lock:
            late = [one for one in self._running.values() if now - one.started_s >= self._timeout_s]
            for verdict in late:
                del self._running[id(verdict)]
                verdict.failure = f"no verdict after {self._timeout_s:g} s"
                verdict.seconds, verdict.is_late = self._timeout_s, True
                verdict.done.set()
        for _ in late:
            self._hire()

    def _hire(self) -> None:
        threading.Thread(target=self._work, name="judge", daemon=True).start()

    def _work(self) -> None:
        while (verdict := self._jobs.get()) is not None:
            verdict.started_s = time.monotonic()
            with self._lock:
                self._running[id(verdict)] = verdict
            caught = Caught()
            step: Step | None = None
            with caught:
                step = verdict.episode.step(verdict.turn)
            with self._lock:
                if self._running.pop(id(verdict), None) is None:
                    return  # too late: this thread's place was taken
                verdict.seconds = time.monotonic() - verdict.started_s
                if caught.why is not None:
                    verdict.failure = caught.why
                elif isinstance(step, Step):
                    verdict.step = step
                else:
                    verdict.failure = f"the environment returned {type(step).__name__}, not a Step"
                verdict.done.set()


class Opened:
    """An episode that is opened at its first turn, on the judge's thread: so what its environment raises then costs
    that sample alone too, and the opening of many goes on beside generation."""

    def __init__(self, env: Env, task: Task, seed: int) -> None:
        self._env, self._task, self._seed = env, task, seed
        self._episode: Episode | None = None

    def step(self, turn: Turn) -> Step:
        """See Episode."""
        if self._episode is None:
            self._episode = self._env.open(self._task, self._seed)
        return self._episode.step(turn)

    def close(self) -> None:
        """See Episode."""
        if self._episode is not None:
            self._episode.close()
