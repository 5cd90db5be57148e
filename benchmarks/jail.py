"""Question: how many fresh jails a second do two cores give, and what does a flood of hanging programs cost a run?

Run: python -m benchmarks.jail      Needs: 2 quiet cores, 3 minutes      Answer quoted in: docs/rl.md

A jail is counted whole: the code goes in, is loaded, called once, its answer judged, its process ended. The flood is in
a step of a run: the demo shape with random weights samples 64 answers, each of which is judged by a program of its own,
on as many threads as the recipe's default, while others are still being sampled. Of these programs so many hang, and
each may take its time limit: its share. What the step takes longer than one whose programs are all short, over that
share, has to be at most 1, but for a fiftieth that a clock may be off.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from itertools import count
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import where, write_result
from benchmarks.serve_load import make_model
from ossia.config import HarmonyConfig
from ossia.config.rl import RlConfig
from ossia.engine import Engine
from ossia.harmony.render import Renderer
from ossia.model.open import open_model
from ossia.rl.env import OneStep, Split, Task, Turn, final
from ossia.rl.jail import Jail, Limits
from ossia.rl.judge import Judge
from ossia.rl.rollout import Limits as Lengths
from ossia.rl.rollout import Rollout
from ossia.rl.sampler import EngineSampler
from ossia.rl.tasks import NamedEnv, TaskStream

GOAL_PER_S, GOAL_COST = 400, 1.02
PACKAGES = ("torch", "numpy")
SHORT = "def solve(xs):\n    return sum(x * x for x in xs)\n"
HANGING = {
    "a loop that catches everything": (
        "def solve(xs):\n while True:\n  try:\n   while True: pass\n  except BaseException: pass\n"
    ),
    "one call of C": "import re\ndef solve(xs): return re.match('(a+)+$', 'a' * 64 + 'b')\n",
    "sleep": "import time\ndef solve(xs): time.sleep(1e6)\n",
}
PROMPTS, GROUP, NEW = 8, 8, 64


def jails_per_s(jail: Jail, threads: int, seconds: float) -> float:
    """Short programs that came to their end, from so many threads at once."""
    end = time.perf_counter() + seconds
    done = [0] * threads

    def work(mine: int) -> None:
        while time.perf_counter() < end:
            with jail.open(SHORT, seed=done[mine]) as program:
                outcome = program.call("solve", [1, 2, 3])
            assert outcome.value == 14, outcome
            done[mine] += 1

    started = time.perf_counter()
    workers = [threading.Thread(target=work, args=(mine,)) for mine in range(threads)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    return sum(done) / (time.perf_counter() - started)


def milliseconds(jail: Jail, repeats: int) -> dict[str, list[float]]:
    """Of one whole jail with nobody else in it, and of a call into one that is there."""
    whole, call = [], []
    for _ in range(repeats):
        started = time.perf_counter()
        with jail.open(SHORT) as program:
            program.call("solve", [1, 2, 3])
        whole.append((time.perf_counter() - started) * 1e3)
    with jail.open(SHORT) as program:
        for _ in range(repeats):
            started = time.perf_counter()
            program.call("solve", [1, 2, 3])
            call.append((time.perf_counter() - started) * 1e3)
    return {"jail": whole, "call": call}


class Judged:
    """Pays for a program that it brings itself, whatever the model says; every so many-th hangs."""

    def __init__(self, jail: Jail, program: str = SHORT, every: int = 1) -> None:
        self._jail, self._program, self._every = jail, program, every
        self._opened = count()

    def tasks(self, split: Split, seed: int) -> Iterator[Task]:
        """Endless."""
        for number in count():
            yield Task({"messages": [{"role": "user", "content": f"{number}"}]}, {}, f"{split} {seed} {number}")

    def open(self, task: Task, seed: int) -> OneStep:
        """See Env."""
        code = self._program if next(self._opened) % self._every == 0 else SHORT

        def verdict(turn: Turn) -> tuple[float, dict[str, float]]:
            with self._jail.open(code) as program:
                outcome = program.call("solve", [1, 2, 3])
            return float(outcome.value == 14), {"timeout": float(outcome.failure == "timeout")}

        return OneStep(verdict)

    def examples(self, task: Task) -> tuple[Turn, Sequence[Turn]]:
        """None that could be wrong."""
        return final(""), ()


class Steps:
    """Steps of a run: the same tokens are sampled in each."""

    def __init__(self, model: Path) -> None:
        transformer, self._vocab = open_model(str(model), dtype="float32", device="cpu")
        self._rl = RlConfig()
        engine = Engine(transformer, vocab=self._vocab, max_batch=PROMPTS * GROUP)
        self._sampler = EngineSampler(engine.session())

    def take(self, env: Judged) -> tuple[float, int]:
        """Seconds that a step's sampling and judging took, and how many of its programs ran into their limit."""
        judge = Judge(self._rl.reward_workers, self._rl.reward_timeout_s)
        tasks = TaskStream([NamedEnv("env", env, 1.0)], "train", 0, Renderer(self._vocab), HarmonyConfig(), 2048)
        rollout = Rollout(self._sampler, self._vocab, judge, Lengths(NEW, 1, 2048 + NEW), routes=True)
        started = time.perf_counter()
        groups = rollout.sample(tasks.take(PROMPTS), GROUP, version=0, seed_of=lambda t: t.asked.number * 99 + t.sample)
        seconds = time.perf_counter() - started
        judge.close()
        found = [trajectory for group in groups for trajectory in group]
        failed = [trajectory.failure for trajectory in found if trajectory.failure is not None]
        assert not failed, failed
        return seconds, round(sum(trajectory.metrics["timeout"] for trajectory in found))


def flood(model: Path, jail: Jail, every: int, repeats: int) -> dict[str, Any]:
    """Steps without and with each kind of hanging program, in turn, after one that warms up."""
    steps, limits, workers = Steps(model), Limits(), RlConfig().reward_workers
    steps.take(Judged(jail))
    seconds: dict[str, list[float]] = {"none": [], **{kind: [] for kind in HANGING}}
    hung = -(-PROMPTS * GROUP // every)
    for _ in range(repeats):
        for kind in seconds:
            env = Judged(jail) if kind == "none" else Judged(jail, HANGING[kind], every)
            took_s, timeouts = steps.take(env)
            assert timeouts == (0 if kind == "none" else hung), (kind, timeouts)
            seconds[kind].append(took_s)
            print(f"flood of {kind}: {took_s:.2f} s", file=sys.stderr, flush=True)
    shares_s = {kind: hung * (limits.wall_s if kind == "sleep" else limits.cpu_s) / workers for kind in HANGING}
    without_s = statistics.median(seconds["none"])
    cost = {kind: (statistics.median(seconds[kind]) - without_s) / share for kind, share in shares_s.items()}
    return {"programs": PROMPTS * GROUP, "hanging": hung, "share_s": shares_s, "cost": cost, "raw_s": seconds}


def main() -> None:
    """Measure, write benchmarks/results/jail.json, print what was found; exit code 1 if a goal is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=2.0, help="of each count of jails")
    parser.add_argument("--repeats", type=int, default=7, help="counts of jails")
    parser.add_argument("--every", type=int, default=4, help="one of so many programs hangs")
    parser.add_argument("--floods", type=int, default=3, help="steps of each kind")
    options = parser.parse_args()
    torch.set_num_threads(1)
    workers = RlConfig().reward_workers
    with tempfile.TemporaryDirectory() as scratch, Jail(workers=workers) as jail:
        rates: dict[int, list[float]] = {threads: [] for threads in (1, workers)}
        for _ in range(options.repeats + 1):
            for threads, found in rates.items():
                found.append(jails_per_s(jail, threads, options.seconds))
                print(f"{threads} threads: {found[-1]:.0f} jails a second", file=sys.stderr, flush=True)
        alone = milliseconds(jail, 200)
        flooded = flood(make_model(Path(scratch)), jail, options.every, options.floods)
    rates = {threads: found[1:] for threads, found in rates.items()}
    medians = {threads: statistics.median(found) for threads, found in rates.items()}
    result = {
        "question": (__doc__ or "").splitlines()[0],
        "config": {**vars(options), "zygotes": workers, "prompts": PROMPTS, "group": GROUP, "max_new": NEW},
        "goal": {"jails_per_s": GOAL_PER_S, "cost": GOAL_COST},
        **where(PACKAGES),
        "jails_per_s": medians,
        "median_ms": {name: statistics.median(times) for name, times in alone.items()},
        "flood": flooded,
        "raw": {"jails_per_s": rates, "ms": alone},
    }
    print(write_result("jail", result))
    print(f"jails a second from {workers} threads: {medians[workers]:.0f}; goal: {GOAL_PER_S}")
    for kind, cost in flooded["cost"].items():
        print(f"{flooded['hanging']} of {flooded['programs']} programs, {kind}: {cost:.2f} of their own time share")
    sys.exit(0 if medians[workers] >= GOAL_PER_S and max(flooded["cost"].values()) <= GOAL_COST else 1)


if __name__ == "__main__":
    main()
