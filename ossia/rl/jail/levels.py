"""What each level is made of, and whether this machine gives it: found by trying to break out, not by any version."""

from __future__ import annotations

import math
import os
import sys
import sysconfig
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ossia.errors import JailError
from ossia.rl.jail import bpf
from ossia.rl.jail.outcome import LEVELS, Level, Limits
from ossia.rl.jail.program import Program
from ossia.rl.jail.worker import Worker

_NOBODY = 65534
_FDS = 16
_LIBRARIES = ("/lib", "/lib64", "/usr/lib", "/usr/lib64", "/usr/local/lib", "/etc/ld.so.cache")
# What ordinary programs import: it has to be there already, since a program of level compute can open no file.
_COMMON = """
abc array base64 binascii bisect builtins calendar cmath codecs collections.abc colorsys copy csv dataclasses datetime
decimal difflib encodings.ascii encodings.latin_1 encodings.utf_16 enum fractions functools hashlib heapq inspect
itertools keyword logging math numbers operator pprint queue random re statistics string struct textwrap threading time
timeit traceback types typing unicodedata uuid zlib
"""
_PROBE = Limits(cpu_s=5.0, wall_s=20.0)
# Each must fail; a process that vanishes by one has succeeded at it.
_CANARIES = """
import ctypes, os, socket
def read_a_file(folder): return open(folder + "/secret").read()
def write_a_file(folder): open(folder + "/written", "w").close()
def start_a_process(folder):
    if os.fork() == 0: os._exit(0)
def become_another_program(folder): os.execv("/bin/sh", ["sh", "-c", ""])
def open_a_socket(folder): socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
def reach_the_parent(folder): os.kill(os.getppid(), 0)
def trace_itself(folder):
    if ctypes.CDLL(None).ptrace(0, 0, 0, 0) != 0: raise OSError
def works(folder): return sum(range(100))
def reads_the_library(folder): return len(open(os.__file__).read()) > 0
"""
ESCAPES = (
    "read_a_file",
    "write_a_file",
    "start_a_process",
    "become_another_program",
    "open_a_socket",
    "reach_the_parent",
    "trace_itself",
)


def zygote_config(level: Level, preload: Sequence[str] = (), warm: str = "") -> dict[str, Any]:
    """What a zygote of a level is told first. `level` is one that this machine knows of (`require_known`)."""
    names = {"compute": bpf.COMPUTE, "read": bpf.READ, "tools": bpf.READ}
    installed = [path for path in dict.fromkeys(sys.path) if path and Path(path).is_dir()]
    return {
        "filter": bpf.allow_only(names[level], bpf.machine()).hex() if level in names else "",
        "readable": _readable() if level in ("read", "tools") else None,
        "nobody": _NOBODY,
        "path": installed if preload or warm or level != "compute" else [],
        "preload": [*_COMMON.split(), *preload],
        "warm": warm,
    }


def _readable() -> list[str]:
    """What programs may read: nothing of a user's own, no test, no answer."""
    paths = sysconfig.get_paths()
    found = [paths[name] for name in ("stdlib", "platstdlib", "purelib", "platlib")]
    return [path for path in dict.fromkeys((*found, *_LIBRARIES)) if Path(path).exists()]


def spawn_order(worker: Worker, limits: Limits, seed: int) -> dict[str, Any]:
    """What a zygote is told of a program to fork."""
    most = {
        "memory": worker.base_bytes + limits.memory_bytes,
        "cpu": math.ceil(limits.total_s),
        "file": 0,
        "core": 0,
        "fds": _FDS,
    }
    return {"seed": seed, "shared": [], "limits": most}


def probe_level(level: Level) -> str:
    """Why this machine can't give a level; "" if it can. Nothing is left behind."""
    try:
        require_known(level)
        worker = Worker(zygote_config(level))
    except JailError as error:
        return str(error)
    try:
        return _why_not(level, worker)
    finally:
        worker.close()


def require_known(level: Level) -> None:
    """Raise JailError where nothing is known about this kind of machine."""
    if level not in LEVELS:
        raise JailError(f"jail: no level `{level}`; allowed: {', '.join(LEVELS)}")
    if sys.platform != "linux" or bpf.machine() not in bpf.supported():
        found = f"{sys.platform} on {bpf.machine()}"
        raise JailError(
            f"jail: this machine is {found}; programs are jailed on Linux on {' or '.join(bpf.supported())}"
        )


def require(level: Level, worker: Worker) -> None:
    """Raise JailError, naming the levels that this machine does give, unless no escape from this one succeeds."""
    if reason := _why_not(level, worker):
        others = [other for other in LEVELS if other not in (level, "weak") and not probe_level(other)]
        gives = (
            f"it gives: {', '.join(others)}" if others else "it gives none but weak, which keeps nobody from your files"
        )
        raise JailError(f"jail: this machine can't give level {level}: {reason}\n  {gives}")


def _why_not(level: Level, worker: Worker) -> str:
    if level == "weak":
        return ""
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o777)
        Path(folder, "secret").write_text("secret", encoding="ascii")
        for name in ("works", *(("reads_the_library",) if level != "compute" else ()), *ESCAPES):
            with Program(worker.spawn(spawn_order(worker, _PROBE, 0), []), level, _PROBE, _CANARIES) as program:
                if program.failure is not None:
                    return f"the canary can't be loaded: {program.failure.detail}"
                outcome = program.call(name, folder)
            if name not in ESCAPES and outcome.failure is not None:
                return f"an honest program fails: {outcome.detail}"
            if name in ESCAPES and outcome.failure != "raised":
                return f"a program could {name.replace('_', ' ')}"
    return ""
