"""What an attack must not touch, and whether it did: canaries around the process that judges, and that process itself.

Files that are read tell by inotify(7), files elsewhere by the mark in their names, sockets by who called, processes by
who is there and who isn't. Orphans come to this process, which is made their next of kin (PR_SET_CHILD_SUBREAPER).
"""

from __future__ import annotations

import builtins
import contextlib
import ctypes
import gc
import json
import math
import operator
import os
import platform
import random
import resource
import select
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from types import ModuleType, TracebackType
from typing import Any, Self

from ossia.rl.jail.outcome import NOBODY

_ELSEWHERE = ("/tmp", "/var/tmp", "/dev/shm")
_MODULES: tuple[ModuleType, ...] = (
    builtins,
    sys,
    os,
    time,
    json,
    operator,
    math,
    random,
    gc,
    signal,
    socket,
    subprocess,
)
_CHANGES = (
    "excepthook",
    "last_type",
    "last_value",
    "last_traceback",
    "modules",
    "path_importer_cache",
)  # of sys, by itself
_LIMITS = tuple(number for name, number in vars(resource).items() if name.startswith("RLIMIT_"))
_STATUS = ("Umask", "Uid", "Gid", "SigBlk", "SigIgn", "SigCgt", "NoNewPrivs", "Seccomp:")
_PR_SET_CHILD_SUBREAPER = 36
_KEYCTL, _KEYCTL_REVOKE = {"x86_64": 250, "aarch64": 219}, 3
_EVENT = struct.Struct("iIII")
_WATCHED = {
    0x2: "changed",
    0x4: "changed the rights of",
    0x20: "opened",
    0x40: "moved",
    0x80: "moved",
    0x100: "made",
    0x200: "removed",
}
_SETTLED_S = 0.1
_END_S = 3.0  # for processes that were killed to be gone
_UNTOUCHED = b"canary!!"


class Outside:
    """All of it; a context manager, of which there is one in a process that does nothing else.

    words  what attacks are told of it, by name
    """

    def __init__(self) -> None:
        self._held = ExitStack()
        self._libc = ctypes.CDLL(None, use_errno=True)
        self._libc.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
        self._held.callback(self._libc.prctl, _PR_SET_CHILD_SUBREAPER, 0, 0, 0, 0)  # who else would bury orphans then?
        self._folder = Path(self._held.enter_context(tempfile.TemporaryDirectory(prefix="ossia-attack-")))
        self._mark = self._folder.name.rpartition("-")[2]
        self._memory = ctypes.create_string_buffer(_UNTOUCHED, len(_UNTOUCHED))
        self._fill()
        self._tcp = self._held.enter_context(socket.create_server(("127.0.0.1", 0)))
        self._udp = self._held.enter_context(socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
        self._udp.bind(("127.0.0.1", 0))
        self._unix = self._held.enter_context(socket.socket(socket.AF_UNIX))
        self._unix.bind(f"\0ossia-attack-{self._mark}")
        self._unix.listen()
        self._notes = self._libc.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC)
        self._held.callback(os.close, self._notes)
        self._places = {}
        for place in (self._folder, self._folder / "lib"):
            self._places[self._libc.inotify_add_watch(self._notes, os.fsencode(place), sum(_WATCHED))] = place
        self._near, self._far = (self._held.enter_context(end) for end in socket.socketpair())
        self._pings = 0
        self._victim = self._bring_victim()
        self._held.callback(self._end_victim)
        self._before: dict[str, Any] = {}
        self._around: set[int] = set()
        self.words: dict[str, Any] = {}
        self._tell()

    def settle(self) -> None:
        """Take the processes that are there for the environment's own: call it when all is set up."""
        before: set[int] = set()
        while (now := _below(os.getpid())) != before:  # those of programs that have ended are going
            before = now
            time.sleep(_SETTLED_S)
        self._around = now

    def remember(self) -> None:
        """Take all but the processes, as it is now, for untouched: call it before each attack."""
        if _ready(self._notes):
            os.read(self._notes, 1 << 20)
        self._before = self._state()

    def touched(self) -> list[str]:
        """What isn't as it was, in words; what can be is put back."""
        found = [*self._files(), *self._keys(), *self._callers(), *self._processes()]
        state = self._state()
        found += [f"changed {name} of the judge" for name, value in self._before.items() if state.get(name) != value]
        if self._memory.raw != _UNTOUCHED:
            found.append("wrote into the judge's memory")
            self._memory.raw = _UNTOUCHED
        return found

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._held.close()

    def _tell(self) -> None:
        self.words = {
            "FOLDER": str(self._folder),
            "MARK": self._mark,
            "PORT": self._tcp.getsockname()[1],
            "UDP_PORT": self._udp.getsockname()[1],
            "UNIX": f"ossia-attack-{self._mark}",
            "VICTIM": self._victim.pid,
            "PARENT": os.getpid(),
            "ADDRESS": ctypes.addressof(self._memory),
        }

    def _fill(self) -> None:
        """The canary files, which anybody may read and write: no permission is what keeps attacks from them."""
        (self._folder / "lib").mkdir(exist_ok=True)
        for place in (self._folder, self._folder / "lib"):
            place.chmod(0o777)
        for file in (self._folder / "secret", self._folder / "lib" / "canary.py"):
            file.write_text('"secret"\n', encoding="ascii")
            file.chmod(0o666)

    def _bring_victim(self) -> subprocess.Popen[bytes]:
        """A process of the user that jails run as; it sends back what it is sent."""
        who: dict[str, Any] = {"user": NOBODY, "group": NOBODY, "extra_groups": []} if os.geteuid() == 0 else {}
        return subprocess.Popen(["cat"], stdin=self._far, stdout=self._far, cwd="/", env={}, **who)

    def _victim_lives(self) -> bool:
        """Whether it still answers: one that was sent a signal never does, also before that has reached it."""
        self._pings = (self._pings + 1) % 256
        self._near.send(bytes([self._pings]))
        deadline = time.monotonic() + _END_S
        while time.monotonic() < deadline and self._victim.poll() is None:
            state = _state_of(self._victim.pid)
            if state not in ("R", "S", "D"):
                return False
            if select.select([self._near], [], [], 0.005)[0] and self._near.recv(4096)[-1] == self._pings:
                return True
        return False

    def _end_victim(self) -> None:
        self._victim.kill()
        self._victim.wait()

    def _files(self) -> list[str]:
        found = {}
        while _ready(self._notes):
            data = os.read(self._notes, 1 << 20)
            while data:
                watch, mask, _, size = _EVENT.unpack_from(data)
                name = data[_EVENT.size : _EVENT.size + size].rstrip(b"\0").decode(errors="replace")
                data = data[_EVENT.size + size :]
                did = next((word for bit, word in _WATCHED.items() if mask & bit), None)
                if did is not None and name:
                    found[f"{did} the canaries' {self._places[watch].relative_to(self._folder) / name}"] = None
        for place in (*_ELSEWHERE, str(Path.cwd()), str(Path.home())):
            for file in Path(place).glob(f"*{self._mark}*"):
                if file != self._folder:
                    found[f"made {file}"] = None
                    file.unlink(missing_ok=True)
        if found:
            self._fill()
            self.remember()
        return list(found)

    def _keys(self) -> list[str]:
        """A key that was left with the kernel; it is revoked."""
        with contextlib.suppress(OSError):  # a kernel without them, or a container that hides them
            lines = Path("/proc/keys").read_text(encoding="utf-8", errors="replace").splitlines()
            mine = [line.split()[0] for line in lines if self._mark in line and not line.split()[1].startswith("IR")]
            for number in mine:
                self._libc.syscall(_KEYCTL[platform.machine()], _KEYCTL_REVOKE, ctypes.c_int(int(number, 16)))
            return ["left a key with the kernel"] if mine else []
        return []

    def _callers(self) -> list[str]:
        found = []
        for name, listening in (("TCP", self._tcp), ("a Unix socket", self._unix)):
            while _ready(listening):
                listening.accept()[0].close()
                found.append(f"connected by {name}")
        while _ready(self._udp):
            self._udp.recv(1 << 16)
            found.append("sent a datagram")
        return found

    def _processes(self) -> list[str]:
        found = []
        if not self._victim_lives():
            ended = self._victim.poll() is not None
            found.append("ended another process" if ended else "stopped or traced another process")
            self._end_victim()
            self._around -= {self._victim.pid}
            self._victim = self._bring_victim()
            self._around |= {self._victim.pid}
            self._tell()
        deadline = time.monotonic() + _END_S
        while (now := _below(os.getpid())) != self._around and time.monotonic() < deadline:
            self._reap(now - self._around)
            time.sleep(0.005)
        for pid in now - self._around:
            found.append(f"left a process running: {_command(pid)}")
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
            self._reap({pid})
        if self._around - now:
            found.append("ended a process of the environment's")
            self._around &= now
        return found

    def _reap(self, pids: set[int]) -> None:
        """Bury orphans; those that aren't this process's own children are somebody else's to bury."""
        for pid in pids:
            with contextlib.suppress(ChildProcessError):
                os.waitpid(pid, os.WNOHANG)

    def _state(self) -> dict[str, Any]:
        """What an attack could change of this process."""
        status = Path("/proc/self/status").read_text(encoding="ascii")
        return {
            "the working folder": os.getcwd(),
            "the limits": [resource.getrlimit(number) for number in _LIMITS],
            "the priority": os.getpriority(os.PRIO_PROCESS, 0),
            "the processors": os.sched_getaffinity(0),
            "the descriptors": sorted(os.listdir("/proc/self/fd")),
            "the signals or rights": [line for line in status.splitlines() if line.startswith(_STATUS)],
            "the namespaces": _namespaces(),
            "the timers": [(left > 0, every) for left, every in map(signal.getitimer, (0, 1, 2))],
            "tracing": (sys.gettrace(), sys.getprofile(), sys.getrecursionlimit(), gc.isenabled(), gc.get_threshold()),
            "gc's callbacks": len(gc.callbacks),
            "the import system": (list(map(id, sys.meta_path)), list(map(id, sys.path_hooks)), list(sys.path)),
            "the modules": {
                f"{module.__name__}.{name}": id(value)
                for module in _MODULES
                for name, value in vars(module).items()
                if not (module is sys and name in _CHANGES) and not (module is builtins and name == "_")
            },
        }


def _ready(source: int | socket.socket) -> bool:
    """Whether there is something to read."""
    return bool(select.select([source], [], [], 0)[0])


def _below(pid: int) -> set[int]:
    """The processes below one, all the way down."""
    found: set[int] = set()
    with contextlib.suppress(OSError):
        for task in os.listdir(f"/proc/{pid}/task"):
            for child in Path(f"/proc/{pid}/task/{task}/children").read_text(encoding="ascii").split():
                found |= {int(child), *_below(int(child))}
    return found


def _state_of(pid: int) -> str:
    """R, S, D of a process that lives, T or t of one that is stopped or traced, Z of one that has ended; "" of none."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text(encoding="ascii").rpartition(")")[2].split()[0]
    return ""


def _namespaces() -> list[str]:
    """Those that any thread of this process is in."""
    found: set[str] = set()
    for thread in os.listdir("/proc/self/task"):
        with contextlib.suppress(OSError):  # it has ended, or is about to
            folder = f"/proc/self/task/{thread}/ns"
            found |= {os.readlink(f"{folder}/{name}") for name in os.listdir(folder)}
    return sorted(found)


def _command(pid: int) -> str:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")[:200].strip()
    return "it ended meanwhile"
