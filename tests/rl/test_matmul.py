"""Matrix products in Python: what right, fast, slow and wrong programs earn, and what tricks earn."""

from __future__ import annotations

import time
from collections.abc import Iterator
from itertools import islice

import numpy as np
import pytest

from ossia.rl.env import Step
from ossia.rl.envs.code import answered
from ossia.rl.envs.matmul import PLAIN, Matmul, whole_matrix
from ossia.rl.envs.speed import Meter, Timed, is_product, sizes, speed_up, worth
from ossia.rl.jail import Jails

FAST = """
from operator import mul
def matmul(A, B):
    columns = list(zip(*B))
    return [[sum(map(mul, row, column)) for column in columns] for row in A]
"""
# each row of B as one large number: a whole row of the product costs one multiplication a row of B
FASTER = """
from operator import mul
def matmul(A, B):
    n, packed = len(B[0]), []
    for row in B:
        number = 0
        for x in reversed(row):
            number = (number << 40) + x
        packed.append(number)
    bias = sum(1 << 40 * i + 39 for i in range(n))
    out = []
    for row in A:
        data = (sum(map(mul, row, packed)) + bias).to_bytes(5 * n + 8, "little")
        out.append([int.from_bytes(data[i : i + 5], "little") - (1 << 39) for i in range(0, 5 * n, 5)])
    return out
"""


@pytest.fixture(scope="module")
def env() -> Iterator[Matmul]:
    with Jails() as made:
        yield Matmul(made)


def step(env: Matmul, code: str, number: int = 0) -> Step:
    task = next(islice(env.tasks("train", 0), number, None))
    return env.open(task, 0).step(answered(code, "python"))


def test_a_right_program_is_paid_by_its_speed(env: Matmul) -> None:
    plain, fast, faster = (step(env, code) for code in (PLAIN, FAST, FASTER))
    assert [found.metrics["right"] for found in (plain, fast, faster)] == [1.0] * 3
    assert 0.1 < plain.reward < 0.4
    assert plain.reward < fast.reward < faster.reward <= 1.0
    assert plain.metrics["times_faster"] == pytest.approx(1.0, abs=0.25)


CHEATS = {
    "it does nothing": "def matmul(A, B): return None",
    "zeros": "def matmul(A, B): return [[0] * len(B[0]) for _ in A]",
    "an input": "def matmul(A, B): return A",
    "half of the rows": FAST + "f = matmul\ndef matmul(A, B):\n  n = len(A) // 2\n"
    "  return f(A[:n], B) + [[0] * len(B[0])] * (len(A) - n)",
    "right for small sizes alone": FAST + "f = matmul\ndef matmul(A, B): return f(A, B) if len(A) < 64 else A",
    "right for the widths it was tried on alone": FAST
    + "f = matmul\ndef matmul(A, B): return f(A, B) if len(B[0]) < 64 else A",
    "right on the first calls alone": FAST + "f, n = matmul, [0]\ndef matmul(A, B):\n  n[0] += 1\n"
    "  return f(A, B) if n[0] < 5 else [[0] * len(B[0]) for _ in A]",
    "answers kept by the inputs' identity": FAST + "f, kept = matmul, {}\ndef matmul(A, B):\n"
    "  return kept.setdefault(id(A) * 0, f(A, B))",
    "one number is off": FAST + "f = matmul\ndef matmul(A, B):\n  C = f(A, B)\n  C[-1][-1] += 1\n  return C",
    "numpy": "import numpy\ndef matmul(A, B): return (numpy.array(A) @ numpy.array(B)).tolist()",
    "numpy by a hidden name": "def matmul(A, B):\n  n = __import__('num' + 'py')\n  return n.dot(A, B).tolist()",
    "numpy from what is loaded": "import sys\ndef matmul(A, B): return sys.modules['numpy'].dot(A, B).tolist()",
    "fractions of numbers": FAST + "f = matmul\ndef matmul(A, B): return [[float(x) for x in row] for row in f(A, B)]",
    "a list that computes when it is compared": """
class Lazy(list):
    def __eq__(self, other): return True
    def __len__(self): return 1
def matmul(A, B): return Lazy()
""",
    "a number that equals every number": """
class Any(int):
    __eq__ = lambda self, other: True
    __le__ = __ge__ = __lt__ = __gt__ = __eq__
def matmul(A, B): return [[Any(0)] * len(B[0]) for _ in A]
""",
    "an iterator": "def matmul(A, B): return (row for row in A)",
    "its inputs are zeroed": "def matmul(A, B):\n  for M in (A, B):\n    for row in M: row[:] = [0] * len(row)\n"
    "  return [[0] * len(B[0]) for _ in A]",
    "the answer is searched in its callers": """
import sys
def matmul(A, B):
    frame = sys._getframe()
    while frame:
        for name, value in frame.f_locals.items():
            if name in ("c", "C", "c_MN", "expected", "reference"): return value
        frame = frame.f_back
""",
    "a reply of its own making": """
import json, os, struct
def matmul(A, B):
    body = json.dumps([2, "ok", [[0]], ""]).encode()
    os.write(3, struct.pack("!I", len(body)) + body)
""",
    "a report that is printed": "print('speedup: 1000')\nimport os\nos._exit(0)",
    "it raises": "def matmul(A, B): raise StopIteration",
    "it hangs": "def matmul(A, B):\n  while True: pass",
    "numbers beyond any product": "def matmul(A, B): return [[10**300] * len(B[0]) for _ in A]",
}


@pytest.mark.parametrize("name", CHEATS)
def test_a_wrong_product_earns_nothing_however_fast(env: Matmul, name: str) -> None:
    found = step(env, CHEATS[name])
    assert (found.reward, found.metrics["right"]) == (0.0, 0.0)


SLOW_TRICKS = {
    "the clock is patched": "import time\ntime.perf_counter = time.monotonic = time.process_time = lambda: 0.0\n",
    "the CPU clock is patched": "import os, resource\nos.times = resource.getrusage = lambda *_: (0,) * 16\n",
    "collection is off and all is frozen": "import gc\ngc.disable(); gc.freeze()\n",
}


@pytest.mark.parametrize("name", SLOW_TRICKS)
def test_a_right_program_gains_nothing_by_a_trick(env: Matmul, name: str) -> None:
    assert step(env, SLOW_TRICKS[name] + PLAIN).reward < 0.45


# It never returns, but serves the channel itself: what it sends is right, and then it keeps a core busy.
BURNING = """
import json, os, struct, time
fast = matmul
def exactly(size):
    data = b""
    while len(data) < size: data += os.read(3, size - len(data))
    return data
def matmul(A, B):
    number = 2
    while True:
        body = json.dumps([number, "ok", fast(A, B), ""]).encode()
        data = struct.pack("!I", len(body)) + body
        while data: data = data[os.write(3, data):]
        end = time.process_time() + BURN_S
        while time.process_time() < end: pass
        number, _, _, (A, B) = json.loads(exactly(struct.unpack("!I", exactly(4))[0]))
"""


def test_work_between_calls_to_slow_the_plain_one_is_charged(env: Matmul) -> None:
    with env.jails.get("compute").open(FAST + BURNING.replace("BURN_S", "0.05")) as program:
        meter = Meter(program)
        first = meter.charge_s(program.call("matmul", [[1]], [[1]]))
        time.sleep(0.1)
        outcome = program.call("matmul", [[2]], [[3]])
        assert outcome.value == [[6]]
        assert first < 0.02
        assert outcome.cpu_s < 0.02
        assert meter.charge_s(outcome) > 0.03
    idle, burning = (step(env, FASTER + BURNING.replace("BURN_S", burn)) for burn in ("0", "0.005"))
    assert idle.metrics["right"] == burning.metrics["right"] == 1.0
    assert burning.reward < idle.reward - 0.15


def test_no_second_thread_can_be_started_to_share_the_work(env: Matmul) -> None:
    code = "import threading\nf = matmul\ndef matmul(A, B):\n  threading.Thread(target=print).start()\n  return f(A, B)"
    assert step(env, FAST + code).reward == 0.0


def test_one_wrong_number_in_a_product_is_found_whatever_its_place() -> None:
    rng = np.random.default_rng(0)
    for _ in range(200):
        a, b = rng.integers(-99, 100, (7, 5)), rng.integers(-99, 100, (5, 9))
        c = a @ b
        assert is_product(a, b, c, rng, 0.0)
        c[rng.integers(7), rng.integers(9)] += rng.choice((-1, 1))
        assert not is_product(a, b, c, rng, 0.0)


def test_only_a_list_of_lists_of_whole_numbers_of_the_right_size_is_a_matrix() -> None:
    assert whole_matrix([[1, 2]], 1, 2, 9).tolist() == [[1, 2]]
    for value in (
        [[1]],
        [[1, 2], [3, 4]],
        [[1, 2.0]],
        [[1, True]],
        [[1, 10]],
        [[1, None]],
        [1, 2],
        {"0": [1, 2]},
        None,
    ):
        assert whole_matrix(value, 1, 2, 9) is None


def test_every_dimension_has_its_largest_size_once_and_is_otherwise_drawn() -> None:
    rng = np.random.default_rng(0)
    for _ in range(50):
        small, *timed = sizes(rng, 3, 40)
        assert max(small) <= 5
        assert len(timed) == 3
        assert all(max(column) == 40 and min(column) >= 10 for column in zip(*timed, strict=True))
    assert len({size for _ in range(9) for size in sizes(rng, 9, 40)}) > 60


def test_speed_is_the_median_call_and_worth_its_logarithm() -> None:
    calls = [Timed(2.0, 1.0), Timed(2.0, 1.0), Timed(2.0, 1e-12)]
    assert speed_up(calls) == 2.0
    assert worth(1.0, 4.0) == 0.25
    assert worth(2.0, 4.0) == pytest.approx(0.625)
    assert worth(4.0, 4.0) == worth(1e9, 4.0) == 1.0
    assert worth(0.0, 4.0) == 0.0
