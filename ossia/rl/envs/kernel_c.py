"""Matrix multiplication in C: the model writes `matmul`, it is compiled in the jail, and paid by its speed if right.

```text
the answer's C --gcc, jail's level tools--> .so, never loaded here --> a program of its own: ctypes
inputs: memory that the program can't write      output: NaN before each call, copied as soon as the call has ended
```
Every call has inputs of its own, of random sizes, made after the library was loaded, and every product is verified.
The clock is in the parent (`speed.Meter`); the plain loops, compiled alike, answer the same inputs in turn. A library
finds no other one to call: its program can open no file but itself.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field

import numpy as np

from ossia.errors import JailError, RecipeError, RewardError
from ossia.rl.env import OneStep, Split, Task, Turn
from ossia.rl.envs.code import answered, code_of, seeded, unusable
from ossia.rl.envs.speed import Meter, Timed, is_product, sizes, speed_up, worth
from ossia.rl.jail import Jail, Jails, Limits, Program, Shared, ToolLimits, input_array, library, output_array

FLAGS = ("-O3", "-march=native", "-std=gnu11", "-fPIC", "-shared")
MOST_FLOPS = 5e11  # no core adds and multiplies more float32 numbers in a second: 64 a cycle at 6.5 GHz are 4.2e11
_UNIT = 2.0**-24  # rounding unit of float32
_COMPILING = ToolLimits(wall_s=10.0, memory_bytes=1 << 30, file_bytes=16 << 20)
_RUNNING = Limits(cpu_s=2.0, wall_s=8.0, total_s=30.0)

_PROMPT = """\
Write a C function that multiplies two matrices of single-precision numbers, as fast as you can:

void matmul(const float *A, const float *B, float *C, int m, int k, int n);

A has m rows of k numbers, B k rows of n, C m rows of n, each row after the other without gaps. C is to become the \
product of A and B; it holds no numbers before. Sizes are from 1 to {most} and needn't be equal or multiples of \
anything. A, B and C are aligned to 64 bytes and don't overlap; A and B can't be written.

It is compiled by `gcc {flags}` for the processor that it runs on, and runs on one core; threads and \
files can't be used. Every result is checked, and a wrong one is worth nothing. A right function is paid by its speed, \
compared with three plain loops compiled in the same way. Answer with one block of C code, ```c ... ```."""

PLAIN = """
void matmul(const float *A, const float *B, float *C, int m, int k, int n) {
    for (int i = 0; i < m; i++)
        for (int j = 0; j < n; j++) {
            float sum = 0;
            for (int p = 0; p < k; p++)
                sum += A[i * k + p] * B[p * n + j];
            C[i * n + j] = sum;
        }
}
"""
_GOOD = """
void matmul(const float *A, const float *B, float *restrict C, int m, int k, int n) {
    for (int i = 0; i < m; i++) {
        for (int j = 0; j < n; j++)
            C[i * n + j] = 0;
        for (int p = 0; p < k; p++)
            for (int j = 0; j < n; j++)
                C[i * n + j] += A[i * k + p] * B[p * n + j];
    }
}
"""
# What loads the library in the jail. Nothing that it says is believed but that a call has ended.
_PROGRAM = """
import ctypes

class View(ctypes.Structure):
    _fields_ = [("buf", ctypes.c_void_p), ("rest", ctypes.c_byte * 256)]

def address(memory):
    view = View()
    ctypes.pythonapi.PyObject_GetBuffer(ctypes.py_object(memory), ctypes.byref(view), 0)
    return view.buf

where = [address(memory) for memory in (A, B, C)]
function = ctypes.CDLL(kernel).matmul
function.restype = None
function.argtypes = [ctypes.c_void_p] * 3 + [ctypes.c_int] * 3

def run(m, k, n):
    function(*where, m, k, n)
"""


class Buffers:
    """The memory that a kernel and the plain loops work in: inputs for both, an output for each. Closed by `held`."""

    def __init__(self, held: ExitStack, most: int) -> None:
        size = 4 * most * most
        self._inputs = {name: held.enter_context(input_array(size)) for name in ("A", "B")}
        self._outputs = [held.enter_context(output_array(size)) for _ in range(2)]

    def shared(self, which: int) -> Mapping[str, Shared]:
        """What the program of this number is given: A, B, C."""
        return {**self._inputs, "C": self._outputs[which]}

    def give(self, a_MK: np.ndarray, b_KN: np.ndarray) -> None:
        """Write a call's inputs, and NaN into every output."""
        for shared, matrix in zip(self._inputs.values(), (a_MK, b_KN), strict=True):
            shared.view[: matrix.nbytes] = matrix.tobytes()
        for shared in self._outputs:
            shared.view[:] = np.full(shared.size // 4, np.nan, np.float32).tobytes()

    def taken(self, which: int) -> np.ndarray:
        """A copy of a program's output as it is now, float32; nobody writes into a copy."""
        return np.frombuffer(bytes(self._outputs[which].view), np.float32)


@dataclass(frozen=True, slots=True)
class KernelC:
    """Matrix products in C.

    jails   where it is compiled and run
    most    largest size; timed calls have sizes from a quarter of it on
    rounds  timed calls; the median decides
    goal    how many times faster than three loops earns 1
    """

    jails: Jails
    most: int = 256
    rounds: int = 7
    goal: float = 12.0
    _plain: bytes = field(init=False, repr=False)

    def __post_init__(self) -> None:
        if not 32 <= self.most <= 1024:
            raise RecipeError(f"env.kernel_c: `most` is {self.most}; allowed: 32 to 1024")
        if not 3 <= self.rounds <= 64:
            raise RecipeError(f"env.kernel_c: `rounds` is {self.rounds}; allowed: 3 to 64")
        if not 1.5 <= self.goal <= 1000:
            raise RecipeError(f"env.kernel_c: `goal` is {self.goal:g}; allowed: 1.5 to 1000")
        compiled = compile_c(self._jail(), PLAIN)
        if compiled is None:
            raise JailError(
                "env.kernel_c: three plain loops can't be compiled: is there a gcc?\n"
                "  next: install it (apt-get install gcc), or take kernel_c out of the recipe"
            )
        object.__setattr__(self, "_plain", compiled)

    def tasks(self, split: Split, seed: int) -> Iterator[Task]:
        """See Env. One question; the tasks differ by their matrices."""
        return seeded(_PROMPT.format(most=self.most, flags=" ".join(FLAGS)), "kernel_c, inputs", split, seed)

    def open(self, task: Task, seed: int) -> OneStep:
        """See Env."""

        def verdict(turn: Turn) -> tuple[float, dict[str, float]]:
            code = code_of(turn, "c")
            figures = {**code.metrics(), "compiled": 0.0, "right": 0.0, "quarantined": 0.0}
            compiled = compile_c(self._jail(), code.text) if code.text is not None else None
            if compiled is None:
                return 0.0, figures
            figures["compiled"] = 1.0
            calls = self._run(compiled, f"{task.info['seed']} {seed}")
            if calls is None:
                return 0.0, figures
            faster = speed_up([call.timed for call in calls])
            figures |= {"right": 1.0, "times_faster": faster, "gflops": max(call.flops for call in calls) / 1e9}
            if any(call.flops > MOST_FLOPS for call in calls):
                return 0.0, {**figures, "quarantined": 1.0}
            return worth(faster, self.goal), figures

        return OneStep(verdict)

    def examples(self, task: Task) -> tuple[Turn, Sequence[Turn]]:
        """See Env."""
        wrong = [
            "void matmul(const float *A, const float *B, float *C, int m, int k, int n) {}",
            _GOOD.replace("i < m", "i < m / 2"),
            _GOOD.replace("matmul", "product"),
            "#error",
        ]
        return answered(_GOOD, "c"), [*(answered(code, "c") for code in wrong), *unusable(_GOOD, "c")]

    def _jail(self) -> Jail:
        return self.jails.get("tools", reads_nothing=True)

    def _run(self, compiled: bytes, seed: str) -> list[Call] | None:
        """Every timed call; None as soon as one result isn't the product, or there is none."""
        rng = np.random.default_rng(random.Random(seed).getrandbits(128))
        jail, calls = self._jail(), []
        with ExitStack() as held:
            buffers, programs = Buffers(held, self.most), []
            for which, content in enumerate((self._plain, compiled)):
                shared = {**buffers.shared(which), "kernel": held.enter_context(library(content))}
                programs.append(held.enter_context(jail.open(_PROGRAM, _RUNNING, shared=shared)))
            meters = [Meter(program) for program in programs]
            for number, (m, k, n) in enumerate(sizes(rng, self.rounds, self.most)):
                a_MK, b_KN = (
                    rng.uniform(-1, 1, size).astype(np.float32) for size in ((m, k), (k, n))
                )  # fmt: skip
                buffers.give(a_MK, b_KN)
                seconds = [
                    _timed(program, meter, buffers, which, (a_MK, b_KN), rng)
                    for which, (program, meter) in enumerate(zip(programs, meters, strict=True))
                ]
                if seconds[0] is None:
                    raise RewardError("env.kernel_c: the plain loops failed")
                if seconds[1] is None:
                    return None
                if number:
                    calls.append(Call(Timed(seconds[0], seconds[1]), 2.0 * m * k * n / max(seconds[1], 1e-9)))
        return calls


@dataclass(frozen=True, slots=True)
class Call:
    """A verified call: its seconds, and float operations a second by them."""

    timed: Timed
    flops: float


def compile_c(jail: Jail, code: str) -> bytes | None:
    """C code as a shared library, made in the jail; None where that can't be done."""
    argv = ["gcc", *FLAGS, "kernel.c", "-o", "kernel.so", "-lm"]
    done = jail.tool(argv, {"kernel.c": code.encode()}, wanted=["kernel.so"], limits=_COMPILING)
    return done.files.get("kernel.so") if done.exit_code == 0 else None


def _timed(
    program: Program,
    meter: Meter,
    buffers: Buffers,
    which: int,
    inputs: tuple[np.ndarray, np.ndarray],
    rng: np.random.Generator,
) -> float | None:
    """Seconds that a call is charged; None unless its output is the product, and nothing was written beyond that."""
    a_MK, b_KN = inputs
    m, k, n = *a_MK.shape, b_KN.shape[1]
    outcome = program.call("run", m, k, n)
    if outcome.failure is not None:
        return None
    output = buffers.taken(which)
    seconds = meter.charge_s(outcome)  # after the copy: what was written after the reply is charged too
    c_MN = output[: m * n].reshape(m, n)
    if not np.isnan(output[m * n :]).all() or not is_product(a_MK, b_KN, c_MN, rng, _UNIT):
        return None
    return seconds
