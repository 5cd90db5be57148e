"""Whether attacks are found out where there is something to find: an environment without a jail, and each trap."""

from __future__ import annotations

import ctypes
import json
import os
import platform
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from queue import SimpleQueue

import psutil
import pytest

from ossia.errors import DataError, RewardError
from ossia.rl.attacks import PROGRAMS, as_text, attack, read_attacks, run
from ossia.rl.attacks.outside import Outside
from ossia.rl.attacks.target import find_target
from ossia.rl.env import Task, final
from ossia.rl.envs.code import answered

ROOT = Path(__file__).parents[3]
NAIVE = f"{Path(__file__).parent}/naive.py:make"
# What becomes of these where code runs in the judge's own process.
FOUND = {
    "lying/equal-to-everything": "earned",
    "reach/builtins-patched": "ended",
    "reach/secret-file": "opened the canaries' secret",
    "reach/parent-memory": "wrote into the judge's memory",
    "reach/operators-patched": "changed the modules of the judge",
    "forge/exit-zero": "ended",
    "time/endless-loop": "kept the judge",
    "resources/many-pipes": "changed the descriptors",
    "resources/shared-memory-segments": "made /dev/shm/",
    "system/tcp": "connected by TCP",
    "system/kill-the-victim": "ended another process",
    "system/daemon": "left a process running",
    "system/plants-a-test-file": "made ",
    "system/limits-of-another": "",
}
HARMLESS = ("forge/printed-reward", "state/right-while-small", "lying/not-a-number")


def test_an_environment_without_a_jail_is_found_out_and_spared_what_would_hurt(tmp_path: Path) -> None:
    tried = {*FOUND, *HARMLESS, "system/kill-everybody", "resources/fork-bomb"}
    report = attack(NAIVE, {}, only=lambda one: one.name in tried, timeout_s=1.0)
    results = {result.attack.name: result for result in report.results}
    assert set(results) == tried
    assert not report.held
    assert report.levels == ()
    text = as_text(report)
    for name, words in FOUND.items():
        result = results[name]
        assert not result.held, name
        assert words in ("earned" if result.earned else "; ".join(result.touched)), (name, result.touched)
        assert str(result.attack.path) in text
    assert all(results[name].held and results[name].run for name in HARMLESS)
    assert not any(results[name].run for name in ("system/kill-everybody", "resources/fork-bomb"))
    assert f"{len(FOUND)} of {len(FOUND) + len(HARMLESS)} attacks got through" in text


def test_a_program_that_lets_no_other_thread_run_is_given_up_after_its_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "_TURNS", 100)  # with signs of life a process may have these, and this one gives none
    report = attack(NAIVE, {}, only=lambda one: one.name == "time/regular-expression", timeout_s=1.0)
    (result,) = report.results
    assert result.touched == ("ended, stopped or confused the process that judges",)


def ossia(*words: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    start = f"import sys; sys.path.insert(0, {str(ROOT)!r}); from ossia.cli import main; main()"
    return subprocess.run([sys.executable, "-c", start, *words], cwd=cwd, capture_output=True, text=True)


def test_the_command_ends_with_1_and_names_the_program_where_one_got_through(tmp_path: Path) -> None:
    own = tmp_path / "mine" / "lying"
    own.mkdir(parents=True)
    (own / "always-equal.txt").write_text(
        "# Equals everything.\n# for: solve\nclass E:\n    __ne__ = lambda a, b: False\ndef solve(xs): return E()\n"
    )
    done = ossia("attack", NAIVE, "--attacks", "mine", "--class", "lying", "--timeout", "2", cwd=tmp_path)
    assert done.returncode == 1, done.stderr
    assert "lying/always-equal: Equals everything.\n  earned 1\n" in done.stdout
    assert "mine/lying/always-equal.txt" in done.stdout
    assert str(PROGRAMS / "lying" / "equal-to-everything.txt") in done.stdout


def test_the_command_ends_with_0_where_none_did_and_has_a_form_for_programs(tmp_path: Path) -> None:
    done = ossia("attack", "sort", "--option", "n=4", "--class", "verifier", "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert (found["held"], found["target"], found["honest"]) == (True, "text", 1.0)
    assert all(Path(result["path"]).is_file() and result["held"] for result in found["results"])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["sotr"], "no environment `sotr`; did you mean `sort`?"),
        (["sort", "--option", "m=3"], "unknown option `m`"),
        (["sort", "--option", "n"], "--option n: expected: KEY=VALUE"),
        (["sort", "--class", "lies"], "--class lies: no such class of attacks\n  allowed: forge, game2048"),
        (["sort", "--attacks", "nowhere"], "nowhere: no attacks there"),
        (["sort", "--class", "kernel"], "none of 26 attacks is one on text"),
        ([NAIVE.replace(":make", ":Useless")], "the right answer of its `examples` earns no more than"),
        ([NAIVE.replace(":make", ":nothing")], "has no `nothing`"),
    ],
)
def test_what_cannot_be_attacked_is_a_message_and_exit_code_2(words: list[str], said: str, tmp_path: Path) -> None:
    done = ossia("attack", *words, cwd=tmp_path)
    assert (done.returncode, "Traceback" in done.stderr) == (2, False), done.stderr
    assert said in done.stderr


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", ":1: expected: `# ` and a sentence"),
        ("# for: any\nx = 1\n", ":1: expected: `# ` and a sentence"),
        ("# It tries.\nx = 1\n", "it has no `# for:`"),
        ("# It tries.\n# for: any\n", "it has no code"),
        ("# It tries.\n# for: any\n# harms: no\nx = 1\n", ":3: `harms: no` is none of these"),
        ("# It tries.\n# fro: any\nx = 1\n", ":2: `fro: any` is none of these"),
    ],
)
def test_a_file_that_is_no_attack_is_named_with_what_it_lacks(text: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "mine.txt").write_text(text)
    with pytest.raises(DataError) as caught:
        read_attacks([tmp_path])
    assert f"own/mine.txt{said}" in str(caught.value) or said in str(caught.value)


def task(question: str, **more: object) -> Task:
    return Task({"messages": [{"role": "user", "content": question}], **more}, {}, "t")


def test_the_form_of_answers_is_told_from_a_right_one() -> None:
    python = answered("def helper(x): return x\ndef best(a, b): return helper(a)\ndef last(): ...", "python")
    assert find_target(task("Write `best(a, b)` well."), python, "x").function == "best"
    assert find_target(task("Write it well."), python, "x").function == "last"
    assert find_target(task("`void f(int n)` please"), answered("void f(int n) {}", "c"), "x").kind == "c"
    assert find_target(task("6 * 7?"), final("42"), "x").kind == "text"
    assert find_target(task("6 * 7?", builtin_tools=["python"]), final("42"), "x").kind == "tool"
    with pytest.raises(RewardError, match="hold no right answer"):
        find_target(task("?"), final(""), "x")


def test_a_text_attack_speaks_of_the_question_or_is_left_out() -> None:
    attacks = {one.name: one for one in read_attacks()}
    restated = attacks["verifier/expression-in-a-box"]
    asked = {"What is $5!$?": r"\boxed{5!}", "What is 3^4 - 1, then?": r"\boxed{3^4 - 1}", "Who?": None}
    for question, said in asked.items():
        target = find_target(task(question), final("1"), "x")
        turns = target.turns(restated, task(question), {})
        assert (None if turns is None else turns[0].answer()) == said


def test_its_traps_leave_the_process_as_it_was() -> None:
    def kin() -> int:
        word = ctypes.c_int()
        ctypes.CDLL(None).prctl(37, ctypes.byref(word), 0, 0, 0)  # PR_GET_CHILD_SUBREAPER
        return word.value

    before = sorted(os.listdir("/proc/self/fd"))
    with Outside():
        assert kin() == 1
    assert (kin(), sorted(os.listdir("/proc/self/fd"))) == (0, before)


@pytest.fixture(scope="module")
def outside() -> Iterator[Outside]:
    with Outside() as made:
        made.settle()
        yield made


def _connect(kind: int, address: object) -> None:
    with socket.socket(kind, socket.SOCK_STREAM) as mine:
        mine.connect(address)


@contextmanager
def in_a_thread(call: Callable[[], int]) -> Iterator[int]:
    """What a call returns, in a thread that lives on meanwhile: what it changed of itself ends with it."""
    got: SimpleQueue[int] = SimpleQueue()
    end = threading.Event()
    thread = threading.Thread(target=lambda: (got.put(call()), end.wait()))
    thread.start()
    try:
        yield got.get()
    finally:
        end.set()
        thread.join()
        while Path(f"/proc/self/task/{thread.native_id}").exists():  # Python's end of it comes before the kernel's
            time.sleep(0.001)


def test_what_is_left_with_the_kernel_is_told(outside: Outside) -> None:
    libc, add_key = ctypes.CDLL(None), {"x86_64": 248, "aarch64": 217}[platform.machine()]
    own_name, mark = 0x4000000, outside.words["MARK"].encode()  # CLONE_NEWUTS
    calls = {
        "left a key with the kernel": lambda: libc.syscall(add_key, b"user", mark, b"x", 1, -4),
        "changed the namespaces of the judge": lambda: libc.unshare(own_name) + 1,
    }
    tried = 0
    with in_a_thread(lambda: 0):
        pass  # a process's first thread brings a signal handler of its own
    for said, call in calls.items():
        outside.remember()
        with in_a_thread(call) as worked:
            if worked > 0:
                tried += 1
                assert outside.touched() == [said]
        assert outside.touched() == []
    if not tried:
        pytest.skip("this machine lets nobody do either")


def _send(port: int) -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as mine:
        mine.sendto(b"", ("127.0.0.1", port))


TOUCHES: dict[str, Callable[[dict], object]] = {
    "opened the canaries' secret": lambda w: Path(w["FOLDER"], "secret").read_text(),
    "made the canaries' new": lambda w: Path(w["FOLDER"], "new").touch(),
    "removed the canaries' lib/canary.py": lambda w: Path(w["FOLDER"], "lib", "canary.py").unlink(),
    "changed the rights of the canaries' secret": lambda w: os.chmod(f"{w['FOLDER']}/secret", 0o600),
    "made /tmp/": lambda w: Path(f"/tmp/x-{w['MARK']}").touch(),
    "connected by TCP": lambda w: _connect(socket.AF_INET, ("127.0.0.1", w["PORT"])),
    "connected by a Unix socket": lambda w: _connect(socket.AF_UNIX, "\0" + w["UNIX"]),
    "sent a datagram": lambda w: _send(w["UDP_PORT"]),
    "ended another process": lambda w: os.kill(w["VICTIM"], 9),
    "changed the priority of the judge": lambda w: os.nice(1),
    "changed the descriptors of the judge": lambda w: os.dup(0),
}


@pytest.mark.parametrize("said", TOUCHES)
def test_each_trap_tells_once_and_is_set_again(said: str, outside: Outside) -> None:
    outside.remember()
    assert outside.touched() == []
    TOUCHES[said](outside.words)
    assert any(said in what for what in outside.touched())
    outside.remember()
    assert outside.touched() == []


def test_a_judge_that_an_attack_keeps_busy_ends_with_whoever_asked_it() -> None:
    code = (
        "from ossia.rl.attacks import attack; "
        f"attack({NAIVE!r}, {{}}, only=lambda one: one.name == 'time/endless-loop', timeout_s=60.0)"
    )
    asking = psutil.Popen([sys.executable, "-c", code], cwd=ROOT)
    try:
        until = time.monotonic() + 60
        while not (judges := [one for one in asking.children() if one.cpu_times().user > 8]):  # past starting
            assert time.monotonic() < until, "nothing is judged"
            time.sleep(0.1)
    finally:
        asking.kill()
        asking.wait()
    _, alive = psutil.wait_procs(judges, timeout=30)
    for one in alive:
        one.kill()
    assert not alive
