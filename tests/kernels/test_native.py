"""Compiling on first use: one library for many processes, and a reason where there can be none."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from ossia.kernels.cpu.native import COMPILERS, Kernels, Unavailable, load_kernels


def script(path: Path, body: str) -> str:
    """An executable that stands for a compiler."""
    path.write_text(f"#!/bin/sh\n{body}\n", encoding="utf-8")
    path.chmod(0o755)
    return str(path)


def quick_compiler(tmp_path: Path, log: Path) -> str:
    """The machine's own without optimisation, which notes every call."""
    if isinstance(found := load_kernels(), Unavailable):
        pytest.skip(found.reason)
    own = " || ".join(f'{name} "$@" -O0' for name in COMPILERS)
    return script(tmp_path / "quick", f"echo called >> {log}\n{own}")


def test_processes_that_start_together_get_one_library_and_the_next_compiles_nothing(tmp_path: Path) -> None:
    log, folder = tmp_path / "log", tmp_path / "cache"
    compiler = quick_compiler(tmp_path, log)
    code = (
        "import sys; from pathlib import Path; from ossia.kernels.cpu.native import Kernels, load_kernels\n"
        "assert isinstance(load_kernels(Path(sys.argv[1]), (sys.argv[2],)), Kernels)"
    )
    together = [subprocess.Popen([sys.executable, "-c", code, str(folder), compiler]) for _ in range(2)]
    assert [one.wait() for one in together] == [0, 0]
    (library,) = folder.iterdir()
    assert library.suffix == ".so"
    called = log.read_text()
    subprocess.run([sys.executable, "-c", code, str(folder), compiler], check=True)
    assert log.read_text() == called
    assert [path.name for path in folder.iterdir()] == [library.name]


def test_a_library_belongs_to_its_compiler(tmp_path: Path) -> None:
    """Another compiler, or the same one changed, makes a library of its own."""
    found = load_kernels()
    if isinstance(found, Unavailable):
        pytest.skip(found.reason)
    other = script(tmp_path / "other", "exit 1")
    assert isinstance(load_kernels(found.path.parent, (other,)), Unavailable)
    assert isinstance(load_kernels(found.path.parent), Kernels)


def test_without_a_compiler_the_reason_says_what_to_install(tmp_path: Path) -> None:
    found = load_kernels(tmp_path, ("no-such-compiler",))
    assert isinstance(found, Unavailable)
    assert "no C compiler (cc, gcc, clang)" not in found.reason
    assert "no C compiler (no-such-compiler); install one" in found.reason


def test_a_compiler_that_fails_is_named_with_what_it_said(tmp_path: Path) -> None:
    compiler = script(tmp_path / "broken", "echo 'decode.c:1: error: not in the mood' >&2; exit 1")
    found = load_kernels(tmp_path / "cache", (compiler,))
    assert isinstance(found, Unavailable)
    assert compiler in found.reason
    assert "error: not in the mood" in found.reason
    assert list((tmp_path / "cache").iterdir()) == []


def test_a_cache_that_cannot_be_written_names_the_variable_for_another(tmp_path: Path) -> None:
    taken = tmp_path / "file"
    taken.touch()
    found = load_kernels(taken / "cache", COMPILERS)
    assert isinstance(found, Unavailable)
    if "no C compiler" not in found.reason:
        assert str(taken / "cache") in found.reason
        assert "XDG_CACHE_HOME" in found.reason
