"""Small exact tasks that a tiny model learns on a CPU: sort, reverse, add, count. Made from a seed, without end.

A problem is of the training or of the held-out tasks by a hash of its text, so that the two share none. The reward is 1
for the exact answer in the one final message, else 0.
"""

from __future__ import annotations

import random
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from ossia.rl.env import OneStep, Split, Task, Turn, final
from ossia.rl.envs.options import check_range

_HELD_OUT = 10  # one problem of so many


class _Exact:
    """Tasks with one right text. A subclass makes problems."""

    def problem(self, rng: random.Random) -> tuple[str, str]:
        """A question and its answer."""
        raise AssertionError

    def tasks(self, split: Split, seed: int) -> Iterator[Task]:
        """See Env."""
        rng = random.Random(f"{split} {seed}")
        while True:
            question, answer = self.problem(rng)
            if (split == "eval") == held_out(answer, question):
                row = {"messages": [{"role": "user", "content": question}]}
                yield Task(row, {"answer": answer}, question)

    def open(self, task: Task, seed: int) -> OneStep:
        """See Env."""

        def verdict(turn: Turn) -> tuple[float, dict[str, float]]:
            right, given = task.info["answer"], turn.answer()
            return float(given == right), {"well_formed": float(given is not None)}

        return OneStep(verdict)

    def examples(self, task: Task) -> tuple[Turn, Sequence[Turn]]:
        """See Env."""
        answer = task.info["answer"]
        wrong = [final(f"{answer} "), final(""), final(f"{answer}\n{answer}"), final(task.name), Turn((), None)]
        return final(answer), wrong


def held_out(answer: str, question: str) -> bool:
    """Whether a problem is of the held-out ones: by its answer where that says enough, so that it was never trained."""
    return zlib.crc32((answer if len(answer) > 3 else question).encode()) % _HELD_OUT == 0


@dataclass(frozen=True, slots=True)
class Sort(_Exact):
    """n different digits in rising order, asked as the demo's model was taught to be."""

    n: int = 6

    def __post_init__(self) -> None:
        check_range("sort", "n", self.n, 2, 9)

    def problem(self, rng: random.Random) -> tuple[str, str]:
        """See _Exact."""
        digits = rng.sample("0123456789", self.n)
        asked = rng.choice(("Sort these digits: {}", "Put these digits in order, smallest first: {}"))
        return asked.format(" ".join(digits)), " ".join(sorted(digits))


@dataclass(frozen=True, slots=True)
class Reverse(_Exact):
    """n letters from the last to the first."""

    n: int = 8

    def __post_init__(self) -> None:
        check_range("reverse", "n", self.n, 2, 64)

    def problem(self, rng: random.Random) -> tuple[str, str]:
        """See _Exact."""
        letters = rng.choices("abcdefghijklmnopqrstuvwxyz", k=self.n)
        return f"Reverse these letters: {' '.join(letters)}", " ".join(reversed(letters))


@dataclass(frozen=True, slots=True)
class Add(_Exact):
    """The sum of two numbers of `digits` digits."""

    digits: int = 2

    def __post_init__(self) -> None:
        check_range("add", "digits", self.digits, 1, 18)

    def problem(self, rng: random.Random) -> tuple[str, str]:
        """See _Exact."""
        a, b = (rng.randrange(10 ** (self.digits - 1), 10**self.digits) for _ in range(2))
        return f"Add: {a} + {b}", str(a + b)


@dataclass(frozen=True, slots=True)
class Count(_Exact):
    """How often one of n letters is there."""

    n: int = 10

    def __post_init__(self) -> None:
        check_range("count", "n", self.n, 2, 64)

    def problem(self, rng: random.Random) -> tuple[str, str]:
        """See _Exact."""
        letters = rng.choices("abc", k=self.n)
        asked = rng.choice("abc")
        return f"How many {asked} are here: {' '.join(letters)}", str(letters.count(asked))
