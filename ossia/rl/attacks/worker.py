"""The process that judges attacks: one environment, one attack after the other, an honest answer after each.

A process of its own because an environment without a jail would be ended, stopped or changed by what it judges; then
`run` starts another one. Orders and answers are lines of JSON on the socket whose number is its argument.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import socket
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from ossia.errors import OssiaError, RewardError
from ossia.rl.attacks.corpus import Attack, read_attacks
from ossia.rl.attacks.outside import Outside
from ossia.rl.attacks.target import Target, find_target
from ossia.rl.env import Env, Task, Turn
from ossia.rl.envs import make_env
from ossia.rl.jail import Jails
from ossia.rl.judge import Judge

TASKS = 4  # different ones that attacks are tried on, in turn
_LATE = "no verdict in time"
_TIDY_S = 5.0
# Where a clock decides what is earned, an honest answer has so many tries to earn so much of what it earned at first,
# counted from a failure's; anywhere else it has to earn the same.
_SHARE, _TRIES = 0.75, 4
_ROUNDING = 1e-6


@dataclass(frozen=True, slots=True)
class _Tried:
    """A task, its right answer, and what that and an honest failure earned before any attack."""

    task: Task
    right: Turn
    honest: float
    failure: float


class _Bench:
    """An environment with what is known of it: its tasks, what honest answers and failures earn."""

    def __init__(self, env: Env, name: str, seed: int, timeout_s: float) -> None:
        self._env, self._seed = env, seed
        self._judge, self._timeout_s = Judge(1, timeout_s), timeout_s
        asked = [(task, env.examples(task)[0]) for task in islice(env.tasks("train", seed), TASKS)]
        if not asked:
            raise RewardError(f"env {name}: it has no tasks to train on")
        self.target = find_target(*asked[0], name)
        tried, why, again = [], "", True
        for task, right in asked:
            honest, failed = self._reward(task, self.target.honest(right))
            again &= honest == self._reward(task, self.target.honest(right))[0]
            why = why or failed
            failure = max(self._reward(task, turns)[0] for turns in self.target.failures())
            tried.append(_Tried(task, right, honest, failure))
        self._tries, self._share = (1, 1.0) if again else (_TRIES, _SHARE)
        self._tasks = [one for one in tried if one.honest > one.failure]
        if not self._tasks:
            raise RewardError(
                f"env {name}: the right answer of its `examples` earns no more than an honest failure, "
                f"{tried[0].failure:g}: whether an attack earns anything can't be told\n  {why}".rstrip()
            )
        self.honest = max(one.honest for one in self._tasks)
        self.failure = max(one.failure for one in self._tasks)

    def attack(self, attack: Attack, number: int, outside: Outside) -> dict[str, Any] | None:
        """Judge one attack, look around, judge an honest answer; None where it doesn't fit any task.

        number  which of the tasks; another one where the attack happens to be its right answer
        """
        for offset in range(len(self._tasks)):
            tried = self._tasks[(number + offset) % len(self._tasks)]
            turns = self.target.turns(attack, tried.task, outside.words)
            if turns is not None and turns[-1].answer() != tried.right.answer():
                break
        else:
            return None
        outside.remember()
        start = time.monotonic()
        reward, failed = self._reward(tried.task, turns)
        seconds = time.monotonic() - start
        late = [f"kept the judge from a verdict for {self._timeout_s:g} s"] if failed == _LATE else []
        touched = [*late, *outside.touched()]
        honest, broke, broke_why = self._still(tried)
        most = max(self.honest, honest) if attack.may_earn_as_honest else tried.failure
        return {
            "reward": reward,
            "failed": failed,
            "earned": reward > most + _ROUNDING,
            "touched": touched,
            "honest": honest,
            "broke": broke,
            "broke_why": broke_why,
            "seconds": seconds,
            "task": tried.task.name,
        }

    def _still(self, tried: _Tried) -> tuple[float, bool, str]:
        """What an honest answer earns now, whether that is less than before, and why it had no verdict."""
        least = tried.failure + self._share * (tried.honest - tried.failure) - _ROUNDING
        best, failed = -math.inf, ""
        for _ in range(self._tries):
            honest, failed = self._reward(tried.task, self.target.honest(tried.right))
            best = max(best, honest)
            if best >= least:
                return best, False, failed
        return best, True, failed

    def _reward(self, task: Task, turns: Sequence[Turn]) -> tuple[float, str]:
        """What an episode earns, judged as in a run, and why it had no verdict."""
        episode, reward = self._env.open(task, self._seed), 0.0
        for turn in turns:
            verdict = self._judge.wait(self._judge.submit(episode, turn))
            if verdict.step is None:
                if verdict.is_late:
                    return 0.0, _LATE
                episode.close()
                return 0.0, verdict.failure or "no step"
            reward += verdict.step.reward
            if verdict.step.terminated or verdict.step.truncated:
                break
        episode.close()
        return reward, ""


def main() -> None:
    """Make the environment, say what is known of it, judge what is asked for."""
    with socket.socket(fileno=int(sys.argv[1])) as channel, channel.makefile("rw", encoding="ascii") as lines:
        order, said = json.loads(lines.readline()), _Said(lines)
        attacks = {attack.name: attack for attack in read_attacks([Path(folder) for folder in order["folders"]])}
        with Jails() as jails, Outside() as outside:
            try:
                env = make_env(order["env"], order["options"], jails)
                bench = _Bench(env, order["env"], order["seed"], order["timeout_s"])
            except OssiaError as error:
                said.say({"error": str(error)})
                return
            threading.Thread(target=said.live, name="live", daemon=True).start()
            outside.settle()
            said.say(_known(bench, attacks, jails) | {"folder": outside.words["FOLDER"]})
            for line in lines:
                asked = json.loads(line)
                said.say({"result": bench.attack(attacks[asked["name"]], asked["number"], outside)})


def _known(bench: _Bench, attacks: Mapping[str, Attack], jails: Jails) -> dict[str, Any]:
    target: Target = bench.target
    return {
        "target": str(target),
        "fits": [name for name, attack in attacks.items() if target.takes(attack)],
        "honest": bench.honest,
        "failure": bench.failure,
        "levels": jails.levels,
    }


class _Said:
    """What is said on the channel: answers, and an empty line every second for as long as threads can run here."""

    def __init__(self, lines: Any) -> None:
        self._lines, self._lock = lines, threading.Lock()

    def say(self, answer: dict[str, Any]) -> None:
        """A line with an answer."""
        self._write(json.dumps(answer))

    def live(self) -> None:
        """Never returns; once nobody listens any more, this process has a moment to tidy up and is ended."""
        with contextlib.suppress(OSError, ValueError):
            while True:
                self._write("")
                time.sleep(1)
        time.sleep(_TIDY_S)
        os._exit(1)  # a thread that an attack keeps busy would go on for ever

    def _write(self, text: str) -> None:
        with self._lock:
            self._lines.write(text + "\n")
            self._lines.flush()


if __name__ == "__main__":
    main()
