"""The process that jails are forked from: a fresh interpreter that runs this file and nothing else of ours.

It holds no task, no answer, no secret and no environment, and imports the standard library alone, besides what it is
told to preload. Each program gets a fork of it that first gives up its rights (`lock_in`) and only then reads its code.

```text
jail --control: spawn + the program's end of its channel--> zygote --fork--> child: limits, landlock, seccomp, "ready"
     <-------------pid + a pidfd for it--------------------                  child <--channel: [n, op, ...]--> jail
```
A child is reaped only when the jail says so; until then its number can't be another process's. No `ossia` import here:
`ossia/errors.py` and all that it might grow would be in reach of the program.
"""

from __future__ import annotations

import ast
import builtins
import contextlib
import ctypes
import fcntl
import gc
import importlib
import io
import json
import mmap
import os
import random
import resource
import select
import signal
import socket
import struct
import sys
from types import TracebackType
from typing import Any, NoReturn

CHANNEL = 3
MOST_FDS = 256
ABOVE = 128  # descriptors that mustn't be in the way of the child's own, from 3 on
HEADER = struct.Struct("!I")
PLACE = "<program>"
MOST_DETAIL = 2000  # characters
LIMITS = {
    "memory": resource.RLIMIT_AS,
    "cpu": resource.RLIMIT_CPU,
    "file": resource.RLIMIT_FSIZE,
    "core": resource.RLIMIT_CORE,
    "fds": resource.RLIMIT_NOFILE,
}
PR_SET_PDEATHSIG, PR_SET_SECCOMP, PR_SET_NO_NEW_PRIVS, PR_CAPBSET_DROP = 1, 22, 38, 24
SECCOMP_MODE_FILTER = 2
LANDLOCK_CREATE, LANDLOCK_ADD, LANDLOCK_RESTRICT = 444, 445, 446  # one number on every machine
READ_FILE, READ_DIR = 1 << 2, 1 << 3


class Caught:
    """What code inside of a `with` raised, whatever that was: a program's error is a result here, never a fault."""

    error: BaseException | None = None

    def __enter__(self) -> Caught:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool:
        self.error = error
        return True


# ---- the zygote ----


def main() -> None:
    """Prepare as the first message says, then fork a child for each order until the jail is gone."""
    control = socket.socket(fileno=int(sys.argv[1]))
    config = json.loads(control.recv(1 << 20))
    prepared, base_bytes = Caught(), 0
    with prepared:
        prepare(config)
        base_bytes = address_space_bytes()
        ruleset = landlock_ruleset(config["readable"]) if config["readable"] is not None else None
        as_nobody = leave_root(config["nobody"], config["readable"])
    if prepared.error is not None:
        control.send(json.dumps({"error": describe(prepared.error)}).encode())
        return
    gc.collect()
    gc.freeze()  # the collector would otherwise write into every page that the children share
    control.send(json.dumps({"error": None, "nobody": as_nobody, "base_bytes": base_bytes}).encode())
    locks = Locks(bytes.fromhex(config["filter"]), ruleset)
    released: set[int] = set()
    poll = select.poll()
    poll.register(control, select.POLLIN)
    while True:
        released = {pid for pid in released if os.waitpid(pid, os.WNOHANG)[0] == 0}
        if not poll.poll(20 if released else None):
            continue
        data, fds, _, _ = socket.recv_fds(control, 1 << 16, 16)
        if not data:
            return  # the children die with this process
        order = json.loads(data)
        if order["op"] == "spawn":
            spawn(control, order, fds, locks)
        elif order["op"] == "release":
            released.add(order["pid"])
        else:
            _, status, used = os.wait4(order["pid"], 0)
            control.send(json.dumps([status, used.ru_utime + used.ru_stime]).encode())


def prepare(config: dict[str, Any]) -> None:
    """Import what children are to find imported."""
    resource.setrlimit(resource.RLIMIT_NOFILE, (MOST_FDS, MOST_FDS))
    sys.path.extend(config["path"])
    for name in config["preload"]:
        importlib.import_module(name)
    if "numpy" in sys.modules:
        importlib.import_module("numpy.random")  # numpy itself puts it off
    Locks(b"", None)  # what ctypes does once, it does here
    if config["warm"]:
        exec(compile(config["warm"], "<warm>", "exec"), {"__name__": "warm"})
    os.chdir("/")


def leave_root(nobody: int, readable: list[str] | None) -> bool:
    """Become `nobody` where this is root; what that user couldn't read is read by a root without its powers instead.

    Returns whether the process is another user than root. A container that knows no such user leaves it as it is.
    """
    if os.getuid() != 0:
        return True
    if readable is not None and not readable_by_others(os.__file__):
        for capability in range(64):
            libc().prctl(PR_CAPBSET_DROP, capability, 0, 0, 0)
        header, none = struct.pack("<Ii", 0x20080522, 0), bytes(24)
        if libc().capset(header, none) != 0:
            raise OSError(ctypes.get_errno(), "capset")
        return False
    try:
        os.setgroups([])
        os.setresgid(nobody, nobody, nobody)
        os.setresuid(nobody, nobody, nobody)
    except OSError:
        return False
    return True


def readable_by_others(file: str) -> bool:
    """Whether any user may read this file."""
    folders = [os.path.dirname(os.path.realpath(file))]
    while folders[-1] != "/":
        folders.append(os.path.dirname(folders[-1]))
    return all(os.stat(folder).st_mode & 0o001 for folder in folders) and bool(os.stat(file).st_mode & 0o004)


def spawn(control: socket.socket, order: dict[str, Any], fds: list[int], locks: Locks) -> None:
    """Fork the child of an order; answer with its number and a pidfd."""
    parent = os.getpid()
    pid = os.fork()
    if pid == 0:
        locked = Caught()
        with locked:
            namespace = lock_in(order, fds, locks, parent)
        if locked.error is not None:
            os.write(fds[0], describe(locked.error).encode())
            os._exit(1)
        with Caught():
            serve(namespace)
        os._exit(1)
    handle = os.pidfd_open(pid)
    socket.send_fds(control, [str(pid).encode()], [handle])
    for fd in (*fds, handle):
        os.close(fd)


def address_space_bytes() -> int:
    """What this process has mapped: a child's limit is counted from here."""
    with open("/proc/self/statm", encoding="ascii") as file:
        return int(file.read().split()[0]) * resource.getpagesize()


def libc() -> ctypes.CDLL:
    """The C library of this process."""
    return ctypes.CDLL(None, use_errno=True)


# ---- the child ----


class Locks:
    """What a child locks itself in with: the filter, and a Landlock ruleset or None."""

    def __init__(self, program: bytes, ruleset: int | None) -> None:
        self._libc = libc()
        self._ruleset = ruleset
        self._buffer = ctypes.create_string_buffer(program, len(program))
        self._filter = struct.pack("HxxxxxxQ", len(program) // 8, ctypes.addressof(self._buffer))

    def close(self, keep_fds: int) -> None:
        """Forbid this process all that isn't listed, for good. Raises OSError where the kernel refuses."""
        self._prctl(PR_SET_NO_NEW_PRIVS, 1)
        if self._ruleset is not None and self._libc.syscall(LANDLOCK_RESTRICT, self._ruleset, 0) != 0:
            raise OSError(ctypes.get_errno(), "landlock_restrict_self")
        os.closerange(keep_fds, MOST_FDS)
        if len(self._buffer):
            self._prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, self._filter)

    def die_with(self, parent: int) -> None:
        """Have the system kill this process when its parent ends."""
        self._prctl(PR_SET_PDEATHSIG, int(signal.SIGKILL))
        if os.getppid() != parent:
            os._exit(1)

    def _prctl(self, option: int, value: int, pointer: bytes | None = None) -> None:
        unused = ctypes.c_ulong(0)
        if self._libc.prctl(option, ctypes.c_ulong(value), pointer, unused, unused) != 0:
            raise OSError(ctypes.get_errno(), f"prctl {option}")


def landlock_ruleset(readable: list[str]) -> int:
    """A ruleset that forbids all that this kernel's Landlock knows of, but for reading at or below these paths."""
    version = libc().syscall(LANDLOCK_CREATE, None, 0, 1)
    if version < 1:
        raise OSError(ctypes.get_errno(), "landlock_create_ruleset")
    files = (1 << (13 + (version >= 2) + (version >= 3) + (version >= 5))) - 1
    attributes = struct.pack("<QQQ", files, 3, 3)[: 8 if version < 4 else 16 if version < 6 else 24]
    low = libc().syscall(LANDLOCK_CREATE, attributes, len(attributes), 0)
    if low < 0:
        raise OSError(ctypes.get_errno(), "landlock_create_ruleset")
    ruleset = fcntl.fcntl(low, fcntl.F_DUPFD_CLOEXEC, ABOVE)
    os.close(low)
    for path in readable:
        fd = os.open(path, os.O_PATH | os.O_CLOEXEC)
        allowed = READ_FILE | READ_DIR if os.path.isdir(path) else READ_FILE
        if libc().syscall(LANDLOCK_ADD, ruleset, 1, struct.pack("<Qi", allowed, fd), 0) != 0:
            raise OSError(ctypes.get_errno(), f"landlock_add_rule {path}")
        os.close(fd)
    return ruleset


def lock_in(order: dict[str, Any], fds: list[int], locks: Locks, parent: int) -> dict[str, Any]:
    """Give up all rights of this process; returns what the program shall find defined."""
    locks.die_with(parent)
    namespace: dict[str, Any] = {"__name__": "program", "__builtins__": builtins}
    named = list(zip(order["shared"], fds[1:], strict=True))
    for (name, kind, size), fd in named:
        if kind != "library":
            access = mmap.ACCESS_READ if kind == "input" else mmap.ACCESS_WRITE
            namespace[name] = memoryview(mmap.mmap(fd, size, access=access))
    libraries = [(name, fd) for (name, kind, _), fd in named if kind == "library"]
    aside = [fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, ABOVE) for fd in (fds[0], *(fd for _, fd in libraries))]
    for number, fd in enumerate(aside, CHANNEL):
        os.dup2(fd, number)
    os.dup2(1, 2)  # /dev/null; what the zygote itself has to say goes elsewhere
    namespace |= {name: f"/proc/self/fd/{number}" for number, (name, _) in enumerate(libraries, CHANNEL + 1)}
    for kind, most in order["limits"].items():
        resource.setrlimit(LIMITS[kind], (most, most))
    random.seed(order["seed"])
    if "numpy.random" in sys.modules:
        sys.modules["numpy.random"].seed(order["seed"])
    locks.close(CHANNEL + len(aside))
    return namespace


def serve(namespace: dict[str, Any]) -> NoReturn:
    """Say by one byte that this process is locked in, then answer requests until the channel closes."""
    write_all(b"R")
    while (size := HEADER.unpack(read_exactly(HEADER.size))[0]) > 0:
        reply = answer(json.loads(read_exactly(size)), namespace)
        write_all(HEADER.pack(len(reply)) + reply)
    os._exit(0)


def answer(request: list[Any], namespace: dict[str, Any]) -> bytes:
    """Do as asked; the reply is [number of the request, what came of it, value, detail]."""
    number, op, *given = request
    value = None
    did, told = Caught(), Caught()
    with did:
        if op == "load":
            exec(compile(given[0], PLACE, "exec"), namespace)
        elif op == "call":
            value = call(namespace, *given)
        else:
            value = run(namespace, *given)
    if did.error is not None:
        kind = "memory" if isinstance(did.error, MemoryError) else "raised"
        text = did.error.__notes__[-1] if op == "run" else None
        return json.dumps([number, kind, text, describe(did.error)]).encode()
    with told:
        return json.dumps([number, "ok", value, ""], allow_nan=False).encode()
    return json.dumps([number, "value", None, describe(told.error)]).encode()


def call(namespace: dict[str, Any], function: str, arguments: list[Any]) -> Any:
    """A function of the program."""
    if function not in namespace:
        raise NameError(f"the program defines no `{function}`")
    return namespace[function](*arguments)


class Capped(io.TextIOBase):
    """A text that keeps what is written to it up to a number of characters."""

    def __init__(self, most: int) -> None:
        self.parts: list[str] = []
        self.left = most
        self.hidden = 0

    def write(self, text: str) -> int:
        """Keep what there is room for."""
        kept = text[: self.left]
        self.parts.append(kept)
        self.left -= len(kept)
        self.hidden += len(text) - len(kept)
        return len(text)

    def text(self) -> str:
        """All that was kept, and how much wasn't."""
        return "".join(self.parts) + (f"\n[{self.hidden:,} more characters]" if self.hidden else "")


def run(namespace: dict[str, Any], code: str, most: int) -> str:
    """What a cell prints, and then its last expression's repr; an error carries what had been printed as a note."""
    printed, caught = Capped(most), Caught()
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed), caught:
        tree = ast.parse(code, PLACE)
        last = tree.body.pop() if tree.body and isinstance(tree.body[-1], ast.Expr) else None
        exec(compile(tree, PLACE, "exec"), namespace)
        if last is not None:
            value = eval(compile(ast.Expression(last.value), PLACE, "eval"), namespace)
            if value is not None:
                printed.write(repr(value))
    if caught.error is not None:
        caught.error.add_note(printed.text())
        raise caught.error
    return printed.text()


def describe(error: BaseException | None) -> str:
    """An error in a line: where in the program, which, and what it says."""
    line, trace = "", error.__traceback__ if error is not None else None
    while trace is not None:
        if trace.tb_frame.f_code.co_filename == PLACE:
            line = f"line {trace.tb_lineno}: "
        trace = trace.tb_next
    words = "(it can't say)"
    with Caught():
        words = str(error)
    return f"{line}{type(error).__name__}: {words}"[:MOST_DETAIL]


def read_exactly(size: int) -> bytes:
    """The next bytes of the channel; where it is closed, the end of this process."""
    parts = bytearray()
    while len(parts) < size:
        part = os.read(CHANNEL, size - len(parts))
        if not part:
            os._exit(0)
        parts += part
    return bytes(parts)


def write_all(data: bytes) -> None:
    """Send bytes down the channel."""
    view = memoryview(data)
    while view:
        view = view[os.write(CHANNEL, view) :]


if __name__ == "__main__":
    main()
