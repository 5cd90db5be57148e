"""Matrix multiplication in Python: the model writes `matmul(A, B)`, and a right one is paid by how fast it is.

The clock is in the parent (`speed.Meter`). Each call has an input of its own, of a random size, made after the program
was loaded; the plain triple loop answers the same one first, in a jail of its own: what slows the machine slows both.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from ossia.errors import RecipeError, RewardError
from ossia.rl.env import OneStep, Split, Task, Turn
from ossia.rl.envs.code import answered, code_of, seeded, unusable
from ossia.rl.envs.speed import Meter, Timed, is_product, sizes, speed_up, worth
from ossia.rl.jail import Jails, Limits, Plain, Program

_LARGEST = 99  # of an input's numbers
_LIMITS = Limits(cpu_s=1.0, wall_s=4.0, total_s=20.0)

_PROMPT = """\
Write a Python function `matmul(A, B)` that multiplies two matrices and returns their product, as fast as you can.

`A` and `B` are lists of rows, each row a list of whole numbers from -{largest} to {largest}. Any size from 1 to \
{most} can occur, and the matrices needn't be square. Return a new list of lists of whole numbers.

Only the standard library can be imported; there is no numpy, and files can't be opened. Every result is checked, and \
one wrong number is worth nothing. A right function is paid by its speed, compared with three plain loops on the same \
matrices. Answer with one block of Python code, ```python ... ```, that defines the function."""

PLAIN = """
def matmul(A, B):
    C = [[0] * len(B[0]) for _ in range(len(A))]
    for i in range(len(A)):
        for j in range(len(B[0])):
            for k in range(len(B)):
                C[i][j] += A[i][k] * B[k][j]
    return C
"""
_GOOD = """
from operator import mul

def matmul(A, B):
    columns = list(zip(*B))
    return [[sum(map(mul, row, column)) for column in columns] for row in A]
"""


@dataclass(frozen=True, slots=True)
class Matmul:
    """Matrix products in Python.

    jails   where programs run
    most    largest size; timed calls have sizes from a quarter of it on
    rounds  timed calls; the median decides
    goal    how many times faster than three loops earns 1
    """

    jails: Jails
    most: int = 64
    rounds: int = 7
    goal: float = 3.0

    def __post_init__(self) -> None:
        if not 8 <= self.most <= 128:
            raise RecipeError(f"env.matmul: `most` is {self.most}; allowed: 8 to 128")
        if not 3 <= self.rounds <= 64:
            raise RecipeError(f"env.matmul: `rounds` is {self.rounds}; allowed: 3 to 64")
        if not 1.5 <= self.goal <= 100:
            raise RecipeError(f"env.matmul: `goal` is {self.goal:g}; allowed: 1.5 to 100")
        self.jails.get("compute")

    def tasks(self, split: Split, seed: int) -> Iterator[Task]:
        """See Env. One question; the tasks differ by their matrices."""
        return seeded(_PROMPT.format(largest=_LARGEST, most=self.most), "matmul, inputs", split, seed)

    def open(self, task: Task, seed: int) -> OneStep:
        """See Env."""
        jail = self.jails.get("compute")

        def verdict(turn: Turn) -> tuple[float, dict[str, float]]:
            code = code_of(turn, "python")
            figures = {**code.metrics(), "right": 0.0}
            if code.text is None:
                return 0.0, figures
            with jail.open(code.text, _LIMITS) as program, jail.open(PLAIN, _LIMITS) as plain:
                calls = self._calls(plain, program, f"{task.info['seed']} {seed}")
            if calls is None:
                return 0.0, figures
            faster = speed_up(calls)
            return worth(faster, self.goal), {**figures, "right": 1.0, "times_faster": faster}

        return OneStep(verdict)

    def examples(self, task: Task) -> tuple[Turn, Sequence[Turn]]:
        """See Env."""
        wrong = [
            "def matmul(A, B):\n    return [[0] * len(B[0]) for _ in A]",
            f"{_GOOD}\nright = matmul\ndef matmul(A, B):\n    return right(A, B) if len(A) < {self.most // 4} else A",
        ]
        return answered(_GOOD, "python"), [*(answered(code, "python") for code in wrong), *unusable(_GOOD, "python")]

    def _calls(self, plain: Program, program: Program, seed: str) -> list[Timed] | None:
        """Every timed call; None as soon as one result isn't the product."""
        rng = np.random.default_rng(random.Random(seed).getrandbits(128))
        calls, plain_meter, meter = [], Meter(plain), Meter(program)
        for number, (rows, inner, columns) in enumerate(sizes(rng, self.rounds, self.most)):
            a_MK, b_KN = (
                rng.integers(-_LARGEST, _LARGEST, size, endpoint=True) for size in ((rows, inner), (inner, columns))
            )
            given = a_MK.tolist(), b_KN.tolist()
            usual = plain.call("matmul", *given)
            if usual.failure is not None:
                raise RewardError(f"env.matmul: the plain loops failed: {usual.failure}, {usual.detail}")
            outcome = program.call("matmul", *given)
            c_MN = whole_matrix(outcome.value, rows, columns, inner * _LARGEST**2)
            if outcome.failure is not None or c_MN is None or not is_product(a_MK, b_KN, c_MN, rng, 0.0):
                return None
            timed = Timed(plain_meter.charge_s(usual), meter.charge_s(outcome))
            if number:
                calls.append(timed)
        return calls


def whole_matrix(value: Plain, rows: int, columns: int, largest: int) -> np.ndarray | None:
    """A list of lists of whole numbers as (rows, columns) int64; None for anything else, or a larger number."""
    if type(value) is not list or len(value) != rows:
        return None
    for row in value:
        if type(row) is not list or len(row) != columns:
            return None
        if not all(type(number) is int and -largest <= number <= largest for number in row):
            return None
    return np.array(value, np.int64)
