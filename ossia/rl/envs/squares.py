"""A function that adds up squares: the smallest environment that runs what a model wrote, to read and to start from.

The three rules of `rl/jail` in a few lines: the program runs in the jail, its inputs are drawn after it was loaded, and
the right results are worked out here, of which the program gets none. It is also what the attacks are tried on first.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from ossia.rl.env import OneStep, Split, Task, Turn
from ossia.rl.envs.code import answered, code_of, seeded, unusable
from ossia.rl.envs.options import check_range
from ossia.rl.jail import Jails, Limits

_LARGEST = 999
_MOST = 60
_PROMPT = """\
Write a Python function `solve(xs)` that returns the sum of the squares of the whole numbers in the list `xs`, which \
may be empty. Answer with one block of Python code, ```python ... ```, that defines the function."""


@dataclass(frozen=True, slots=True)
class Squares:
    """Sums of squares.

    jails    where programs run
    calls    lists that a program has to get right, all of them, of random lengths
    seconds  of CPU that one call may take
    """

    jails: Jails
    calls: int = 6
    seconds: float = 0.5

    def __post_init__(self) -> None:
        check_range("squares", "calls", self.calls, 1, 1000)
        check_range("squares", "seconds", self.seconds, 0.05, 60)
        self.jails.get("compute")

    def tasks(self, split: Split, seed: int) -> Iterator[Task]:
        """See Env. One question; the tasks differ by their lists."""
        return seeded(_PROMPT, "squares, lists", split, seed)

    def open(self, task: Task, seed: int) -> OneStep:
        """See Env."""
        jail = self.jails.get("compute")
        limits = Limits(cpu_s=self.seconds, wall_s=4 * self.seconds, total_s=(self.calls + 1) * self.seconds)

        def verdict(turn: Turn) -> tuple[float, dict[str, float]]:
            code = code_of(turn, "python")
            if code.text is None:
                return 0.0, dict(code.metrics())
            rng, right = random.Random(f"{task.info['seed']} {seed}"), 0
            with jail.open(code.text, limits) as program:
                for number in range(self.calls):
                    length = rng.randint(_MOST // 2, _MOST) if number == 0 else rng.randint(0, _MOST)
                    xs = [rng.randint(-_LARGEST, _LARGEST) for _ in range(length)]
                    value = program.call("solve", xs).value
                    if type(value) is not int or value != sum(x * x for x in xs):
                        break
                    right += 1
            return float(right == self.calls), {**code.metrics(), "calls_right": float(right)}

        return OneStep(verdict)

    def examples(self, task: Task) -> tuple[Turn, Sequence[Turn]]:
        """See Env."""
        good = "def solve(xs):\n    return sum(x * x for x in xs)"
        wrong = ["def solve(xs):\n    return sum(xs) ** 2", "def solve(xs):\n    return sum(abs(x) for x in xs)"]
        return answered(good, "python"), [*(answered(code, "python") for code in wrong), *unusable(good, "python")]
