"""Every attack on one environment: in processes that are replaced when an attack ends or stops them."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue
from types import TracebackType
from typing import Any, Self

from ossia.errors import RewardError
from ossia.rl.attacks.corpus import PROGRAMS, Attack, read_attacks

_START = "import json, sys; sys.path[:] = json.loads(sys.argv[2]); from ossia.rl.attacks.worker import main; main()"
_READY_S = 300.0  # imports, and honest answers in a slow environment
_FOUND = {"reward", "failed", "earned", "touched", "honest", "broke", "broke_why", "seconds", "task"}
_GO_S = 1.0
_LATE_S = 3.0  # that a sign of life may be late
_TURNS = 8  # judged for one attack, at most: its own, an honest answer's, and what that is compared with
_MOST_SAID = 2000  # characters of a process's last words


@dataclass(frozen=True, slots=True)
class Result:
    """What came of an attack.

    reward   that it earned; `earned`: more than it may
    touched  what it touched outside, in words
    broke    an honest answer right after it earned less than before (`honest`)
    failed   why there was no verdict, or it wasn't run; "" if there was
    run      whether it was run at all
    task     that it was tried on
    """

    attack: Attack
    reward: float = 0.0
    earned: bool = False
    touched: tuple[str, ...] = ()
    broke: bool = False
    honest: float = 0.0
    failed: str = ""
    run: bool = True
    seconds: float = 0.0
    task: str = ""

    @property
    def held(self) -> bool:
        """Whether the environment withstood it."""
        return not (self.earned or self.touched or self.broke)


@dataclass(frozen=True, slots=True)
class Report:
    """All of them.

    target   the form of the environment's answers, in words
    honest   what its own right answer earned before any attack; failure: the most that an honest failure did
    levels   of the jails that it opened
    """

    env: str
    target: str
    honest: float
    failure: float
    levels: tuple[str, ...]
    results: tuple[Result, ...]

    @property
    def held(self) -> bool:
        """Whether the environment withstood all that were run."""
        return all(result.held for result in self.results)


def attack(
    env: str,
    options: Mapping[str, Any],
    *,
    folders: Sequence[Path] = (PROGRAMS,),
    only: Callable[[Attack], bool] = lambda attack: True,
    workers: int = 2,
    seed: int = 0,
    timeout_s: float = 30.0,
    told: Callable[[Result, int], None] = lambda result, of: None,
) -> Report:
    """Try every attack that fits an environment's form of answers, and an honest answer after each.

    env        a name or reference, with `options`: as in a recipe's `env`
    folders    of attacks; `only`: which of them
    workers    processes that judge at the same time; clocks that an environment pays by want 1
    timeout_s  for one verdict
    told       called after each attack, with how many there are
    Raises     RewardError where no honest answer earns more than a failure, or nothing fits; RecipeError, DataError,
               JailError

    Attacks that would hurt the machine come last, and aren't run where one of the others touched anything.
    """
    attacks = {one.name: one for one in read_attacks(folders) if only(one)}
    order = {
        "env": env,
        "options": dict(options),
        "folders": [str(folder.resolve()) for folder in folders],
        "seed": seed,
        "timeout_s": timeout_s,
    }
    with ExitStack() as held:
        benches: SimpleQueue[_Judging] = SimpleQueue()
        first = held.enter_context(_Judging(order, timeout_s))
        fits = [attacks[name] for name in first.known["fits"] if name in attacks]
        if not fits:
            raise RewardError(f"env {env}: none of {len(attacks)} attacks is one on {first.known['target']}")
        benches.put(first)
        for _ in range(min(workers, len(fits)) - 1):
            benches.put(held.enter_context(_Judging(order, timeout_s)))

        def judge(numbered: tuple[int, Attack]) -> Result:
            bench = benches.get()
            try:
                result = bench.judge(numbered[1], numbered[0])
            finally:
                benches.put(bench)
            told(result, len(fits))
            return result

        pool = held.enter_context(ThreadPoolExecutor(workers))
        numbered = list(enumerate(fits))
        results = list(pool.map(judge, [pair for pair in numbered if not pair[1].harms]))
        jailed = not any(result.touched for result in results)
        harmful = [pair for pair in numbered if pair[1].harms]
        if jailed:
            results += pool.map(judge, harmful)
        else:
            why = "left out: code isn't locked in there, and this would hurt the machine"
            results += [Result(one, run=False, failed=why) for _, one in harmful]
    known = first.known
    results.sort(key=lambda result: result.attack.name)
    return Report(env, known["target"], known["honest"], known["failure"], tuple(known["levels"]), tuple(results))


class _Judging:
    """A `worker`, started anew whenever an attack was its end; a context manager."""

    def __init__(self, order: dict[str, Any], timeout_s: float) -> None:
        self._order = order
        # a program that lets no other thread run can't be timed in there
        self._most_s, self._quiet_s = timeout_s * _TURNS, timeout_s + _LATE_S
        self._held = ExitStack()
        self.known: dict[str, Any] = {}

    def __enter__(self) -> Self:
        self._start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._held.close()

    def judge(self, attack: Attack, number: int) -> Result:
        """What comes of one attack."""
        said = self._ask({"name": attack.name, "number": number}, self._most_s, self._quiet_s)
        found = said.get("result") if said is not None else None
        if found is None and said == {"result": None}:
            return Result(attack, run=False, failed="it fits no task's question")
        if not isinstance(found, dict) or set(found) != _FOUND:
            words = self._last_words()
            self._again()
            return Result(attack, touched=("ended, stopped or confused the process that judges",), failed=words)
        if found["touched"]:  # whatever it changed, the next one is judged by a process that it didn't
            self._again()
        return Result(
            attack,
            reward=found["reward"],
            earned=found["earned"],
            touched=tuple(found["touched"]),
            broke=found["broke"],
            honest=found["honest"],
            failed=found["failed"] or (found["broke_why"] if found["broke"] else ""),
            seconds=found["seconds"],
            task=found["task"],
        )

    def _again(self) -> None:
        self._held.close()
        self._start()

    def _start(self) -> None:
        self._near, far = socket.socketpair()
        self._said = tempfile.TemporaryFile()  # noqa: SIM115 - closed by the stack
        self._held.callback(self._said.close)
        with far:
            process = subprocess.Popen(
                [sys.executable, "-c", _START, str(far.fileno()), json.dumps(sys.path)],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=self._said,
                pass_fds=[far.fileno()],
                start_new_session=True,
            )
        self._held.callback(_end, process)
        self._held.callback(self._near.close)
        known = self._ask(self._order, _READY_S, _READY_S)
        if known is None:
            raise RewardError(f"env {self._order['env']}: the process that judges ended: {self._last_words()}")
        if "error" in known:
            raise RewardError(known["error"])
        self._held.callback(shutil.rmtree, known["folder"], ignore_errors=True)  # of one that couldn't itself
        self.known = self.known or known

    def _ask(self, question: dict[str, Any], most_s: float, quiet_s: float) -> dict[str, Any] | None:
        """The answer; None where there is none in time, or none that is one.

        quiet_s  without a sign of life; most_s: with them
        """
        end = time.monotonic() + most_s
        try:
            self._near.sendall(json.dumps(question).encode() + b"\n")
            data = bytearray()
            while not (data.endswith(b"\n") and data.strip()):
                self._near.settimeout(max(0.01, min(quiet_s, end - time.monotonic())))
                part = self._near.recv(1 << 16)
                if not part:
                    return None
                data += part
            answer = json.loads(data)
        except (OSError, ValueError):
            return None
        return answer if isinstance(answer, dict) else None

    def _last_words(self) -> str:
        self._said.seek(0)
        return self._said.read().decode(errors="replace").strip()[-_MOST_SAID:]


def _end(process: subprocess.Popen[bytes]) -> None:
    """End it, and what else is in its session; first, it may go by itself and put its canaries away."""
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(_GO_S)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
