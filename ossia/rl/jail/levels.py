"""What each level is made of, and whether this machine gives it: found by trying to break out, not by any version."""

from __future__ import annotations

import math
import os
import re
import socket
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import MappingProxyType
from typing import Any

from ossia.errors import JailError
from ossia.rl.jail import bpf
from ossia.rl.jail.outcome import LEVELS, LOCKED, NOBODY, Level, Limits
from ossia.rl.jail.program import Program
from ossia.rl.jail.shared import Shared
from ossia.rl.jail.tool import ToolLimits, run_tool
from ossia.rl.jail.worker import Worker

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
def signal_the_parent(folder): os.kill(os.getppid(), 0)
def read_the_parents_environment(folder): return open(f"/proc/{os.getppid()}/environ", "rb").read()
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
    "signal_the_parent",
    "read_the_parents_environment",
    "trace_itself",
)

# A limit low enough for a canary to try to pass it; `tail` holds in memory what it is to print.
_TOOL_PROBE = ToolLimits(wall_s=20.0, memory_bytes=64 << 20, file_bytes=1 << 20, processes=16)
_TOOL_CANARIES = r"""
try() { what=$1; shift; if ( "$@" ) >/dev/null 2>&1; then echo "$what"; fi; }
more_processes() { i=0; while [ $i -lt 20 ]; do sleep 9 & i=$((i+1)); done; }
try "read a file" cat FOLDER/secret
try "write a file" sh -c 'echo > FOLDER/written'
try "change the system" sh -c 'touch /usr/written || touch /written || touch /dev/written'
if command -v bash >/dev/null; then try "open a socket" bash -c 'exec 5<>/dev/tcp/127.0.0.1/PORT'
elif command -v perl >/dev/null; then try "open a socket" perl -MSocket -e 'exit !socket(S, PF_INET, SOCK_STREAM, 0)'
else echo "open a socket, for all one knows: there is neither bash nor perl to try with"; fi
try "end another process" kill -9 VICTIM
try "read the environment of another process" cat /proc/VICTIM/environ
try "mount" mount -t tmpfs none /work
try "become root in a namespace of its own" unshare -U true
try "fill the disk" sh -c 'head -c 2m /dev/zero > big'
rm -f big
try "start more processes than it may" more_processes
echo works > honest
"""
_TOOL_HOARDS = {  # each is to be ended, or to get less than it wants
    "one process": "[ $(head -c 96m /dev/zero | tail -c 96m | wc -c) -lt 90000000 ] || echo got it",
    "several processes": "for i in 1 2 3; do head -c 40m /dev/zero | tail -c 40m | sleep 2 & done; wait; echo got it",
}


def zygote_config(
    level: Level, preload: Sequence[str] = (), warm: str = "", *, reads_nothing: bool = False
) -> dict[str, Any]:
    """What a zygote of a level is told first. `level` is one that this machine knows of (`require_known`)."""
    readable = [] if reads_nothing else _readable()
    names = {"compute": bpf.COMPUTE, "read": bpf.READ, "tools": bpf.READ}
    installed = [path for path in dict.fromkeys(sys.path) if path and Path(path).is_dir()]
    return {
        "filter": bpf.allow_only(names[level], bpf.machine()).hex() if level in names else "",
        "readable": readable if level in ("read", "tools") else None,
        "nobody": NOBODY,
        "path": installed if preload or warm or level != "compute" else [],
        "preload": [*_COMMON.split(), *preload],
        "warm": warm,
    }


def _readable() -> list[str]:
    """What programs may read: nothing of a user's own, no test, no answer."""
    paths = sysconfig.get_paths()
    found = [paths[name] for name in ("stdlib", "platstdlib", "purelib", "platlib")]
    return [path for path in dict.fromkeys((*found, *_LIBRARIES)) if Path(path).exists()]


def spawn_order(
    worker: Worker, limits: Limits, seed: int, shared: Mapping[str, Shared] = MappingProxyType({})
) -> dict[str, Any]:
    """What a zygote is told of a program to fork; the descriptors of `shared` go along, in its order."""
    given = [(name, one.kind, one.size) for name, one in shared.items()]
    arrays_bytes = sum(size for _, kind, size in given if kind != "library")
    most = {
        "memory": worker.base_bytes + limits.memory_bytes + arrays_bytes,
        "cpu": math.ceil(limits.total_s),
        "file": 0,
        "core": 0,
        "fds": _FDS,
    }
    return {"seed": seed, "shared": given, "limits": most}


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
        others = [other for other in LOCKED if other != level and not probe_level(other)]
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
        return _why_no_programs(level, worker, folder) or (_why_no_tools(folder) if level == "tools" else "")


def _why_no_programs(level: Level, worker: Worker, folder: str) -> str:
    for name in ("works", *(("reads_the_library",) if worker.reads else ()), *ESCAPES):
        with Program(worker.spawn(spawn_order(worker, _PROBE, 0), []), level, _PROBE, _CANARIES) as program:
            if program.failure is not None:
                return f"the canary can't be loaded: {program.failure.detail}"
            outcome = program.call(name, folder)
        if name not in ESCAPES and outcome.failure is not None:
            return f"an honest program fails: {outcome.detail}"
        if name in ESCAPES and outcome.failure != "raised":
            return f"a program could {name.replace('_', ' ')}"
    return ""


def _why_no_tools(folder: str) -> str:
    who: dict[str, Any] = {"user": NOBODY, "group": NOBODY, "extra_groups": []} if os.geteuid() == 0 else {}
    with ExitStack() as held:
        listening = held.enter_context(socket.create_server(("127.0.0.1", 0)))
        try:
            victim = held.enter_context(subprocess.Popen(["sleep", "60"], cwd="/", env={}, **who))
            held.callback(victim.kill)
            words = {"FOLDER": folder, "PORT": str(listening.getsockname()[1]), "VICTIM": str(victim.pid)}
            script = re.sub("|".join(words), lambda found: words[found[0]], _TOOL_CANARIES)
            tried = run_tool("tools", ["sh", "-c", script], {}, ["honest"], _TOOL_PROBE)
            hoards = {who: run_tool("tools", ["sh", "-c", it], {}, [], _TOOL_PROBE) for who, it in _TOOL_HOARDS.items()}
        except (OSError, JailError) as error:
            return str(error).removeprefix("jail: level tools: ")
        if tried.output:
            return f"a tool could {tried.output.splitlines()[0]}"
        if victim.poll() is not None or Path(folder, "written").exists():
            return "a tool could reach out of its folder"
    if tried.files.get("honest") != b"works\n":
        return f"an honest tool fails: exit code {tried.exit_code}, {tried.failure}"
    held_more = [who for who, hoard in hoards.items() if hoard.failure != "memory" and "got it" in hoard.output]
    return f"{held_more[0]} could hold more memory than a tool may" if held_more else ""
