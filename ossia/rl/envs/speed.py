"""What environments share that pay for speed: is a product right, how much faster is it, what is that worth.

Speed multiplies correctness: every timed call is verified, and one wrong product makes all speed worth nothing. Inputs
are made after the code was loaded, of random sizes, and never come again. Letters: M, K, N sizes of a product.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from statistics import median

import numpy as np

from ossia.rl.jail import Outcome, Program

_SMALL = 5
_VECTORS = 32  # a wrong product passes each with a chance of at most one half
_SLACK = 16.0  # of the rounding that a plain float32 product was seen to have, see tests/rl/test_speed.py
UNCHANGED = 0.25  # what a right program earns that is no faster than the plain one


def is_product(a_MK: np.ndarray, b_KN: np.ndarray, c_MN: np.ndarray, rng: np.random.Generator, unit: float) -> bool:
    """Whether c = a @ b by Freivalds' check: c v = a (b v) for secret vectors v of +1 and -1.

    a_MK, b_KN  numbers of at most 1 in size where `unit` is above 0; whole numbers where it is 0
    unit        rounding unit of c's own arithmetic (float32: 2**-24): the tolerance grows with K and the root of N;
                0: exact, of whole numbers whose products stay below 2**53
    Source      Freivalds, "Probabilistic machines can use less running time", IFIP 1977
    """
    if c_MN.shape != (len(a_MK), b_KN.shape[1]) or not np.isfinite(c_MN).all():
        return False
    v_NV = rng.integers(0, 2, (b_KN.shape[1], _VECTORS)).astype(np.float64) * 2 - 1
    a, b, c = (matrix.astype(np.float64) for matrix in (a_MK, b_KN, c_MN))
    # what c claims may be anything: sums of it may overflow, and are then no product
    with np.errstate(over="ignore", invalid="ignore"):
        off = np.abs(c @ v_NV - a @ (b @ v_NV)).max()
    return bool(off <= _SLACK * unit * a.shape[1] * math.sqrt(b.shape[1]))


def sizes(rng: np.random.Generator, rounds: int, most: int) -> Iterator[tuple[int, int, int]]:
    """M, K and N of a small product, which isn't timed, and of `rounds` timed ones.

    Timed sizes are drawn from a quarter of `most` on; each of the three is `most` itself in one round, which nobody
    knows before, so that a program that is right for smaller ones alone is always found out.
    """
    yield tuple(rng.integers(1, _SMALL, 3, endpoint=True).tolist())
    largest = rng.integers(0, rounds, 3)
    for number in range(rounds):
        drawn = rng.integers(most // 4, most, 3, endpoint=True)
        yield tuple(np.where(largest == number, most, drawn).tolist())


class Meter:
    """What a program's calls cost, by the parent's clocks.

    All CPU of its process since its last reply counts, so that what it does between calls, to slow down the one it is
    compared with, is not for free. In a locked jail that is all that it can do anywhere: it has no second thread or
    process. At level weak it may have, and the longer of CPU and time passed is charged. Time passed alone says little
    on a shared machine: with 3 programs on 2 cores one and the same program was measured 0.9 to 1.6 times as fast as
    another by it, and 1.4 to 1.5 times by CPU.
    """

    def __init__(self, program: Program) -> None:
        self._program, self._seen_s = program, program.cpu_s

    def charge_s(self, outcome: Outcome) -> float:
        """Seconds that the call which just ended is charged."""
        before_s, self._seen_s = self._seen_s, self._program.cpu_s
        cpu_s = max(outcome.cpu_s, self._seen_s - before_s)
        return max(outcome.wall_s, cpu_s) if outcome.level == "weak" else cpu_s


@dataclass(frozen=True, slots=True)
class Timed:
    """Seconds of one call on the same input by the plain program and by the model's."""

    plain_s: float
    model_s: float


def speed_up(calls: Sequence[Timed]) -> float:
    """How many times faster: the median over calls, so that one that the machine interrupted decides nothing."""
    return median(call.plain_s / max(call.model_s, 1e-9) for call in calls)


def worth(times_faster: float, goal: float) -> float:
    """The reward of a right program: UNCHANGED if it is as fast as the plain one, 1 from `goal` times as fast on.

    In between, and below down to 0, it follows the logarithm: twice as fast is worth the same at every speed.
    """
    gained = math.log(max(times_faster, 1e-9)) / math.log(goal)
    return min(1.0, max(0.0, UNCHANGED + (1 - UNCHANGED) * gained))
