"""Programs in their jail: what they may do, how each way to fail is told, what is left of them afterwards."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from ossia.rl.jail import Jail, JailError, Limits

QUICK = Limits(cpu_s=0.2, wall_s=1.5)  # a busy machine takes its time to give a process 0.2 s


@pytest.fixture(scope="module")
def jail() -> Iterator[Jail]:
    with Jail() as made:
        yield made


def test_a_function_gets_plain_values_and_its_result_comes_back_plain(jail: Jail) -> None:
    given = [None, True, 1, 1.5, "é\n", [1, [2]], {"a": {"b": []}}, 10**900]
    with jail.open("def same(*xs): return list(xs)\ndef pair(): return (1, 2)") as program:
        assert program.failure is None
        back = program.call("same", *given)
        assert back.value == given
        assert [type(item) for item in back.value] == [type(item) for item in given]
        assert (back.failure, back.level) == (None, "compute")
        assert 0 < back.cpu_s < back.wall_s < 1
        assert program.call("pair").value == [1, 2]


@pytest.mark.parametrize("value", [(1, 2), float("nan"), float("inf"), {1: 2}, b"x", "\ud800", 10**1001, object()])
def test_what_is_not_plain_is_refused_before_it_is_sent(jail: Jail, value: object) -> None:
    with jail.open("def f(x): return x") as program:
        with pytest.raises((TypeError, ValueError)):
            program.call("f", value)
        assert program.call("f", 1).value == 1


@pytest.mark.parametrize(
    ("body", "failure", "words"),
    [
        ("return 1 / 0", "raised", "line 2: ZeroDivisionError: division by zero"),
        ("raise SystemExit(0)", "raised", "SystemExit: 0"),
        ("return open('/etc/passwd')", "raised", "PermissionError"),
        ("return float('nan')", "value", "not JSON compliant"),
        ("return {1, 2}", "value", "set is not JSON serializable"),
        ("r = []; r.append(r); return r", "value", "Circular"),
        ("return '\\ud800'", "protocol", "surrogate"),
        ("return 10**1001", "protocol", "1,000 digits"),
        ("return 'x' * (1 << 20)", "protocol", "more than 1,048,576 bytes"),
        ("return bytearray(1 << 29)", "memory", "MemoryError"),
        ("while True: pass", "timeout", "CPU"),
        ("__import__('time').sleep(9)", "timeout", "wall-clock"),
        ("__import__('os')._exit(7)", "crash", "exited with 7"),
        ("__import__('ctypes').string_at(0)", "crash", "SIGSEGV"),
        ("__import__('os').write(3, bytes(4))", "protocol", "repl"),
        ("__import__('os').write(3, b'\\xff' * 4)", "protocol", "bytes"),
        ("__import__('os').close(3)", "crash", "exited"),
    ],
)
def test_each_way_to_fail_is_told_and_the_jail_goes_on(jail: Jail, body: str, failure: str, words: str) -> None:
    limits = Limits(cpu_s=0.2, wall_s=30.0) if words == "CPU" else QUICK  # a busy machine gives it little of its time
    with jail.open(f"def f():\n {body}", limits) as program:
        outcome = program.call("f")
        assert (outcome.value, outcome.failure) == (None, failure), outcome
        assert words in outcome.detail
        again = program.call("f")
        ends = failure in ("timeout", "crash", "protocol")
        assert again.failure == ("closed" if ends else failure)
    with jail.open("def f(): return 1") as program:
        assert program.call("f").value == 1


@pytest.mark.parametrize(
    ("code", "failure"),
    [("def f(:", "raised"), ("1/0", "raised"), ("while True: pass", "timeout"), ("import os; os._exit(0)", "crash")],
)
def test_code_that_cannot_be_loaded_says_why_and_every_call_repeats_it(jail: Jail, code: str, failure: str) -> None:
    with jail.open(code, QUICK) as program:
        assert program.failure is not None
        assert program.failure.failure == failure
        assert program.call("f") == program.failure


def test_a_call_is_stopped_close_to_its_limit_of_cpu_or_of_time(jail: Jail) -> None:
    for body, seconds in (("while True: pass", 0.2), ("__import__('time').sleep(9)", 1.5)):
        with jail.open(f"def f():\n {body}", QUICK) as program:
            assert program.failure is None
            start = time.monotonic()
            assert program.call("f").failure == "timeout"
            assert seconds * 0.9 < time.monotonic() - start < seconds + 2


def test_bytes_that_drip_do_not_extend_a_call(jail: Jail) -> None:
    code = "import os, time\ndef f():\n  os.write(3, b'\\0\\0\\1\\0')\n  while 1: os.write(3, b'['); time.sleep(0.02)"
    with jail.open(code, QUICK) as program:
        start = time.monotonic()
        assert program.call("f").failure == "timeout"
        assert time.monotonic() - start < 4


def test_many_short_calls_together_are_stopped_by_the_total(jail: Jail) -> None:
    with jail.open("import time\ndef f(): time.sleep(0.1)", Limits(total_s=0.35)) as program:
        failures = [program.call("f").failure for _ in range(5)]
    assert "timeout" in failures
    assert failures[:2] == [None, None]


def test_a_reply_sent_before_the_question_is_no_answer(jail: Jail) -> None:
    early = "import os, json, struct\nbody = json.dumps([2, 'ok', 42, '']).encode()\n"
    with jail.open(
        early + "def f():\n  m = struct.pack('!I', len(body)) + body\n  os.write(3, m); return 1"
    ) as program:
        assert program.call("f").failure in (None, "protocol")
        assert program.call("f").failure in ("protocol", "closed")


def test_nothing_of_one_program_reaches_the_next(jail: Jail) -> None:
    with jail.open(
        "import builtins, json\nbuiltins.sum = lambda x: 7\njson.dumps = None\ndef f(): return 1"
    ) as program:
        assert program.call("f").failure is not None
    with jail.open("def f(): return sum([1, 2])") as program:
        assert program.call("f").value == 3


def test_the_same_program_and_seed_draw_the_same_numbers(jail: Jail) -> None:
    code = "import random\ndef f(): return [random.random(), list({'a', 'b', 'c', 'd', 'e'})]"
    drawn = []
    for seed in (1, 1, 2):
        with jail.open(code, seed=seed) as program:
            drawn.append(program.call("f").value)
    assert drawn[0] == drawn[1]
    assert drawn[1][0] != drawn[2][0]


def test_a_session_keeps_its_variables_and_shows_what_a_cell_prints(jail: Jail) -> None:
    with jail.session(QUICK) as session:
        assert session.run("x = 20\nprint('hi')\nx + 1").value == "hi\n21"
        assert session.run("x = x + 1").value == ""
        assert session.run("x").value == "21"
        failed = session.run("print('before')\ny")
        assert (failed.failure, failed.value) == ("raised", "before\n")
        assert "line 2: NameError" in failed.detail
        long = session.run("print('a' * 10**6)").value
        assert len(long) < 21_000
        assert long.endswith("[980,001 more characters]")
        assert session.run("def f(:").detail.startswith("SyntaxError")
        assert not session.ended
        assert session.run("while True: pass").failure == "timeout"
        assert session.ended
        assert session.run("x").failure == "closed"


def test_programs_opened_from_several_threads_do_not_meet() -> None:
    def work(number: int) -> bool:
        with jail.open(f"def f(x): return x + {number}") as program:
            return all(program.call("f", x).value == x + number for x in range(20))

    with Jail(workers=2) as jail, ThreadPoolExecutor(8) as pool:
        assert all(pool.map(work, range(80)))


def test_descriptors_zombies_and_threads_do_not_grow(jail: Jail) -> None:
    def held() -> tuple[int, int]:
        return len(os.listdir("/proc/self/fd")), threading.active_count()

    codes = ("def f(): return 1", "def f(): raise OSError", "import os\ndef f(): os._exit(1)", "def f(:")
    before = held()
    zygote = jail._workers[0]._zygote.pid
    for index in range(500):
        with jail.open(codes[index % len(codes)]) as program:
            program.call("f")
    assert held() == before
    deadline = time.monotonic() + 10
    while _children(zygote) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert _children(zygote) == []
    assert len(os.listdir(f"/proc/{zygote}/fd")) < 10


def _children(pid: int) -> list[str]:
    return Path(f"/proc/{pid}/task/{pid}/children").read_text().split()


def _runs(pid: int) -> bool:
    """Whether the process is there and isn't dead already, waiting for its new parent to ask how it ended."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_a_killed_zygote_takes_its_programs_along_and_is_replaced() -> None:
    with Jail() as jail:
        program = jail.open("def f(): return 1")
        pid = program._process.pid
        os.kill(jail._workers[0]._zygote.pid, signal.SIGKILL)
        jail._workers[0]._zygote.wait()
        assert program.call("f").failure in ("crash", "memory")
        deadline = time.monotonic() + 10
        while _runs(pid) and time.monotonic() < deadline:
            time.sleep(0.01)
        assert not _runs(pid)
        with jail.open("def f(): return 2") as other:
            assert other.call("f").value == 2


def test_a_closed_jail_leaves_no_process_and_opens_nothing() -> None:
    jail = Jail()
    zygote = jail._workers[0]._zygote.pid
    program = jail.open("def f(): return 1")
    jail.close()
    assert not Path(f"/proc/{zygote}").exists()
    assert program.call("f").failure in ("crash", "memory")
    with pytest.raises(JailError, match="closed"):
        jail.open("")


def test_preloaded_modules_are_found_imported_and_a_missing_one_is_named() -> None:
    with Jail(preload=["numpy"]) as jail:
        with jail.open("import numpy\ndef f(): return [numpy.arange(3).tolist(), numpy.random.rand()]") as program:
            first = program.call("f")
        with jail.open("import numpy\ndef f(): return [numpy.arange(3).tolist(), numpy.random.rand()]") as program:
            assert program.call("f").value == first.value
        assert first.value[0] == [0, 1, 2]
    with pytest.raises(JailError, match="no_such_module"):
        Jail(preload=["no_such_module"])
