"""Compilers and shells in their jail: what they make, what they may not do, and what is left of them: nothing."""

from __future__ import annotations

import os
import time
from pathlib import Path

import numpy
import pytest

from ossia.rl.jail import Jail, JailError, ToolLimits, input_array, library, output_array

DOT = b"""
double dot(const double *a, int n, double *out) { double s = 0; for (int i = 0; i < n; i++) s += a[i] * a[i];
  return *out = s; }
"""
DRIVER = """
import ctypes, numpy
kernel = ctypes.CDLL(lib)
kernel.dot.restype = ctypes.c_double
def run():
    address = lambda memory: ctypes.c_void_p(numpy.frombuffer(memory, "u1").ctypes.data)
    return kernel.dot(address(given), 10, address(filled))
def write_input(): given[0] = 1
def unprotect_input():
    return ctypes.CDLL(None).mprotect(ctypes.c_void_p(numpy.frombuffer(given, "u1").ctypes.data), 4096, 3)
"""


def shell(jail: Jail, script: str, *wanted: str, limits: ToolLimits | None = None) -> tuple[int | None, str]:
    done = jail.tool(["sh", "-c", script], wanted=wanted, limits=limits or ToolLimits())
    return done.exit_code, done.output


def running(mark: str) -> list[str]:
    """The processes of this machine with these words in their command line."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            words = (folder / "cmdline").read_bytes()
        except OSError:
            continue
        if mark.encode() in words.replace(b"\0", b" "):
            found.append(folder.name)
    return found


def test_a_compiled_library_comes_back_as_bytes_and_runs_in_a_program_over_arrays_of_both_sides(tools: Jail) -> None:
    made = tools.tool(["cc", "-O1", "-shared", "-fPIC", "-o", "k.so", "k.c"], {"k.c": DOT}, wanted=["k.so", "none"])
    assert (made.exit_code, made.output, made.failure, made.level) == (0, "", None, "tools")
    assert list(made.files) == ["k.so"]
    assert made.files["k.so"].startswith(b"\x7fELF")
    with library(made.files["k.so"]) as lib, input_array(80) as given, output_array(8) as filled:
        shared = {"lib": lib, "given": given, "filled": filled}
        with Jail("read") as jail, jail.open(DRIVER, shared=shared) as program:
            assert program.failure is None
            for factor in (1, 2):
                with given.view.cast("d") as view:
                    for index in range(10):
                        view[index] = factor * index
                assert program.call("run").value == factor**2 * 285
                with filled.view.cast("d") as view:
                    assert view[0] == factor**2 * 285
            assert "read-only" in program.call("write_input").detail
            assert program.call("unprotect_input").value == -1


def test_a_compile_error_is_told_by_exit_code_and_output(tools: Jail) -> None:
    made = tools.tool(["cc", "-c", "k.c"], {"k.c": b"int f( {"}, wanted=["k.o"])
    assert made.exit_code == 1
    assert "k.c:1" in made.output
    assert made.files == {}


def test_files_go_in_and_come_back_by_name_folders_too_and_absent_or_strange_ones_are_left_out(tools: Jail) -> None:
    script = "cat in/a in/b > out; mkdir d; : > empty; ln -s /etc/ld.so.cache link; ./in/run.sh"
    files = {"in/a": b"1\0", "in/b": b"-1\n", "in/run.sh": b"#!/bin/sh\necho ran"}
    made = tools.tool(["sh", "-c", script], files, wanted=["absent", "out", "d", "empty", "in/a"])
    assert (made.exit_code, made.output) == (0, "ran\n")
    assert made.files == {"out": b"1\0-1\n", "empty": b"", "in/a": b"1\0"}


@pytest.mark.parametrize("name", ["/etc/passwd", "../x", "a/../b", "", ".", "-x", "a b", "$(id)", "a\n", "a//b"])
def test_a_file_that_is_not_named_plainly_is_refused(tools: Jail, name: str) -> None:
    with pytest.raises(ValueError, match="letters"):
        tools.tool(["true"], {name: b""})
    with pytest.raises(ValueError, match="letters"):
        tools.tool(["true"], wanted=[name])


def test_a_tool_has_no_network_no_process_of_others_no_files_but_the_system_s_and_no_words_of_ours(
    tools: Jail, tmp_path: Path
) -> None:
    os.chmod(tmp_path, 0o777)
    (tmp_path / "secret").write_text("x")
    for script in (
        f"cat {tmp_path}/secret",
        f"cat /proc/{os.getpid()}/environ",
        "exec 5<>/dev/tcp/127.0.0.1/80",
        "touch /usr/bin/x",
        "touch /x",
        "touch /dev/x",
        "unshare -U true",
        "unshare -r mount -t tmpfs none /usr",
        "ls /home || ls /root",
    ):
        assert tools.tool(["bash", "-c", f"{script} 2>/dev/null"]).exit_code != 0, script
    code, words = shell(tools, "env; ls -a /tmp; pwd; id -u")
    assert code == 0
    assert "OMP" not in words
    assert words.split("\n")[-4:-1] == ["..", "/work", str(65534 if os.getuid() == 0 else os.getuid())]


def test_what_a_tool_leaves_running_ends_with_it(tools: Jail) -> None:
    for script in ("(setsid sleep 41.5 &) ; exit 0", "sleep 41.5 & exec sleep 41.5"):
        done = tools.tool(["sh", "-c", script], limits=ToolLimits(wall_s=0.4))
        assert done.failure == (None if "exit" in script else "timeout")
        assert running("sleep 41.5") == []


def test_a_tool_that_hangs_or_floods_is_ended_in_time(tools: Jail) -> None:
    for script in ("while :; do :; done", "trap '' TERM INT HUP; sleep 60 & wait; sleep 60", "yes"):
        begin = time.monotonic()
        done = tools.tool(["sh", "-c", script], limits=ToolLimits(wall_s=0.4, output_characters=100))
        assert (done.failure, done.exit_code) == ("timeout", None)
        assert time.monotonic() - begin < 3
        assert len(done.output) < 200
    assert "more bytes]" in done.output


def test_processes_memory_and_files_have_their_limits_for_all_together(tools: Jail) -> None:
    low = ToolLimits(memory_bytes=80 << 20, file_bytes=4 << 20, processes=16)
    code, words = shell(tools, "i=0; while [ $i -lt 20 ]; do sleep 1 & i=$((i+1)); done; echo all", limits=low)
    assert (code, "all" in words) == (2, False)
    hoard = "[ $(head -c 100m /dev/zero | tail -c 100m | wc -c) = 0 ] || echo got it"
    assert "got it" not in shell(tools, hoard, limits=low)[1]
    hoard = "for i in 1 2 3; do head -c 50m /dev/zero | tail -c 50m | sleep 2 & done; wait"
    assert tools.tool(["sh", "-c", hoard], limits=low).failure == "memory"
    filled = "for f in a b c d e; do head -c 1m /dev/zero > $f; done; echo x > f && echo yes"
    words = shell(tools, filled, limits=low)[1]
    assert ("No space" in words, "yes" in words) == (True, False)


def test_a_tool_cannot_forge_files_beyond_the_limit_nor_break_the_reader(tools: Jail) -> None:
    small = ToolLimits(file_bytes=1 << 20)
    forged = "kill -9 $PPID; sleep 5; echo never"
    done = tools.tool(["sh", "-c", forged], wanted=["a"], limits=small)
    assert (done.files, done.failure, done.output) == ({}, None, "")
    assert done.exit_code == 137
    done = tools.tool(["sh", "-c", "head -c 700k /dev/zero > a; cp a b"], wanted=["a", "b"], limits=small)
    assert list(done.files) == ["a"]


def test_other_levels_run_no_tool_and_a_closed_jail_neither() -> None:
    with Jail() as jail, pytest.raises(JailError, match=r"Jail\('tools'\)"):
        jail.tool(["true"])
    weak = Jail("weak", allow_weak=True)
    weak.close()
    with pytest.raises(JailError, match="closed"):
        weak.tool(["true"])


def test_a_machine_without_bubblewrap_is_told_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nonexistent")
    with pytest.raises(JailError, match=r"(?s)no bubblewrap.*apt-get install bubblewrap.*it gives: compute"):
        Jail("tools")


def test_the_level_weak_keeps_limits_alone() -> None:
    with Jail("weak", allow_weak=True) as jail:
        done = jail.tool(["sh", "-c", "cat a > b; pwd"], {"a": b"x"}, wanted=["b"])
        assert (done.exit_code, done.files, done.level) == (0, {"b": b"x"}, "weak")
        assert not Path(done.output.strip()).exists()
        done = jail.tool(["sh", "-c", "sleep 42.5 & yes"], limits=ToolLimits(wall_s=0.3))
        assert done.failure == "timeout"
        deadline = time.monotonic() + 5
        while running("sleep 42.5") and time.monotonic() < deadline:
            time.sleep(0.02)
        assert running("sleep 42.5") == []
        code, _ = shell(jail, "head -c 3m /dev/zero > a", limits=ToolLimits(file_bytes=1 << 20))
        assert code != 0


def test_where_nothing_can_be_read_a_program_loads_what_it_is_given_and_no_other_library(tools: Jail) -> None:
    compiled = tools.tool(["gcc", "-shared", "-fPIC", "-x", "c", "dot", "-o", "so"], {"dot": DOT}, wanted=["so"])
    code = "import ctypes, os\ndef load(path): return ctypes.CDLL(lib if path is None else path)._name\n"
    others = [os.__file__, numpy.linalg._umath_linalg.__file__, "/etc/hostname"]
    with (
        Jail("read", reads_nothing=True) as jail,
        library(compiled.files["so"]) as lib,
        jail.open(code + "def read(path): return open(path).read()", shared={"lib": lib}) as program,
    ):
        assert program.call("load", None).failure is None
        assert [program.call("read", path).failure for path in others] == ["raised"] * 3
        assert "Permission denied" in program.call("load", others[1]).detail
