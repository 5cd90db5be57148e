"""An environment in the usual, wrong way: `exec` in its own process, and `==`. What the attacks are there to find."""

from __future__ import annotations

import random
from collections.abc import Iterator

from ossia.rl.env import OneStep, Split, Task, Turn
from ossia.rl.envs.code import answered, code_of, seeded


class Naive:
    """Sums of squares again, without a jail."""

    def tasks(self, split: Split, seed: int) -> Iterator[Task]:
        return seeded("Write a function `solve(xs)` that returns the sum of squares.", "naive", split, seed)

    def open(self, task: Task, seed: int) -> OneStep:
        def verdict(turn: Turn) -> tuple[float, dict[str, float]]:
            code = code_of(turn, "python")
            if code.text is None:
                return 0.0, {}
            scope: dict = {}
            exec(code.text, scope)
            rng = random.Random(task.info["seed"])
            for _ in range(5):
                xs = [rng.randint(-99, 99) for _ in range(rng.randint(1, 30))]
                if scope["solve"](list(xs)) != sum(x * x for x in xs):
                    return 0.0, {}
            return 1.0, {}

        return OneStep(verdict)

    def examples(self, task: Task) -> tuple[Turn, list[Turn]]:
        return answered("def solve(xs):\n    return sum(x * x for x in xs)", "python"), []


def make() -> Naive:
    return Naive()


class Useless(Naive):
    """Its right answer is wrong."""

    def examples(self, task: Task) -> tuple[Turn, list[Turn]]:
        return answered("def solve(xs):\n    return -1", "python"), []
