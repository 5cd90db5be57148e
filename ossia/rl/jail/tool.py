"""Compilers and shells, which start other programs: bubblewrap, resource limits, and a filter of system calls.

```text
bwrap: own processes, users, network; /usr read-only; one folder in memory, /work, of a fixed size
  sh: limits, then "R" -> the tool -> for each wanted file its size and bytes; these by a descriptor of its own
```
Nothing that comes back is believed: the output is text, files are bytes, and neither the exit code nor the length of
anything is more than a tool's own word. As root, all of it runs as nobody.
"""

from __future__ import annotations

import contextlib
import math
import mmap
import os
import re
import select
import shlex
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias

from ossia.errors import JailError
from ossia.rl.jail import bpf
from ossia.rl.jail.outcome import NOBODY, Level

ToolFailure: TypeAlias = Literal["timeout", "memory"]

WORK = "/work"
_ENVIRONMENT = {"PATH": "/usr/local/bin:/usr/bin:/bin", "HOME": WORK, "TMPDIR": WORK, "LANG": "C.UTF-8"}
_SYSTEM = ("/bin", "/sbin", "/lib", "/lib32", "/lib64")  # links into /usr, or folders of their own
_SETTINGS = ("/etc/alternatives", "/etc/ld.so.cache")
_DEVICES = ("/dev/null", "/dev/zero", "/dev/full", "/dev/random", "/dev/urandom")
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.+-]*(/[A-Za-z0-9_][A-Za-z0-9_.+-]*)*")
_PIECE_BYTES = 1 << 16
_END_S = 1.0
_LOOK_S = 0.05  # between looks at the memory in use: it can't grow by more than about 100 MB meanwhile
_FDS = 64
_BLOCK_BYTES = 512  # of `ulimit -f`, by POSIX
_SMALL_TMPFS = str(1 << 16)
_SAID = 2000  # characters of an error of bubblewrap's
_INSTALL = "next: install bubblewrap (apt-get install bubblewrap), or use a level that needs none: compute, read"
_USERNS = (
    "next: allow user namespaces to ordinary users (sysctl kernel.apparmor_restrict_unprivileged_userns=0, or"
    " user.max_user_namespaces above 0; in a container, its seccomp profile), or use level compute or read"
)


@dataclass(frozen=True, slots=True)
class ToolLimits:
    """What a tool may use.

    wall_s             seconds by the parent's clock; of CPU, the same for each of its processes
    memory_bytes       of address space for each of its processes; all together may hold as much resident
    file_bytes         of all files in its folder together, and of those that come back
    processes          at once
    output_characters  of stdout and stderr together that are kept
    """

    wall_s: float = 10.0
    memory_bytes: int = 1 << 30
    file_bytes: int = 64 << 20
    processes: int = 32
    output_characters: int = 20_000

    def __post_init__(self) -> None:
        fields = (self.wall_s, self.memory_bytes, self.file_bytes, self.processes, self.output_characters)
        if not all(0 < value < 2**40 for value in fields):
            raise ValueError(f"{self}: every limit is a finite number above 0")


DEFAULT_TOOL_LIMITS = ToolLimits()


@dataclass(frozen=True, slots=True)
class ToolOutcome:
    """What came of a tool.

    exit_code  as a shell has it: above 128 a signal's number + 128; None where this side ended it
    output     what it printed, stdout and stderr as they came; a last line says how much more there was
    files      the wanted ones that it left
    failure    None, or what ended it: timeout, memory
    wall_s     seconds from start to end, by the parent's clock
    level      the jail's level
    """

    exit_code: int | None
    output: str
    files: Mapping[str, bytes]
    failure: ToolFailure | None
    wall_s: float
    level: Level


def run_tool(
    level: Level, argv: Sequence[str], files: Mapping[str, bytes], wanted: Sequence[str], limits: ToolLimits
) -> ToolOutcome:
    """See `Jail.tool`. Raises JailError where the jail itself couldn't be made, ValueError for a name out of bounds."""
    for name in (*files, *wanted):
        if not _NAME.fullmatch(name):
            raise ValueError(
                f"{name!r}: a file of a tool's is named by letters, digits, _ . + - and /, from its folder"
            )
    if not argv or any("\0" in word for word in argv):
        raise ValueError(f"{list(argv)}: a tool is at least one word, and none has a zero byte")
    with ExitStack() as held:
        results = held.enter_context(os.fdopen(os.memfd_create("results", os.MFD_CLOEXEC), "rb"))
        script = _script(argv, wanted, limits)
        start = time.perf_counter()
        if level == "weak":
            process = held.enter_context(_unconfined(script, files, results.fileno()))
        else:
            process = held.enter_context(_confined(script, files, results.fileno(), limits))
        output, failure = _watch(process, limits, start)
        wall_s = time.perf_counter() - start
        results.seek(0)  # the tool shares its place in the file
        data = results.read(limits.file_bytes + _PIECE_BYTES)
        if failure is None and not data.startswith(b"R"):
            raise JailError(_no_start(output))
        left = _wanted(data[1:], wanted) if failure is None else {}
        return ToolOutcome(None if failure else process.returncode, output, left, failure, wall_s, level)


def _no_start(output: str) -> str:
    said = output.strip()[-_SAID:] or "it ended without a word"
    next_step = _USERNS if "ns failed" in said or "uid map" in said or "namespace" in said else _INSTALL
    return f"jail: level tools: no tool can be started: {said}\n  {next_step}"


def _script(argv: Sequence[str], wanted: Sequence[str], limits: ToolLimits) -> str:
    """What the shell inside does. dash counts processes by -p where bash has -u."""
    cpu_s, memory_kib = math.ceil(limits.wall_s), max(1, limits.memory_bytes // 1024)
    blocks = max(1, limits.file_bytes // _BLOCK_BYTES)
    lines = [
        f"ulimit -c 0 && ulimit -t {cpu_s} && ulimit -f {blocks} && ulimit -n {_FDS} || exit 1",
        f"ulimit -u {limits.processes} 2>/dev/null || ulimit -p {limits.processes} || exit 1",
        f"ulimit -v {memory_kib} || exit 1",
        "exec 3>&1 1>&2",
        "printf R >&3",
        f"{shlex.join(argv)} 3>&- </dev/null",
        "code=$?",
        *(f"if [ -f {name} ]; then wc -c <{name} >&3; cat {name} >&3; else echo -1 >&3; fi" for name in wanted),
        "exit $code",
    ]
    return "\n".join(lines)


def _wanted(data: bytes, names: Sequence[str]) -> dict[str, bytes]:
    """The files that came back; the first that isn't as it should be ends them."""
    found = {}
    for name in names:
        head, line, rest = data.partition(b"\n")
        size = int(head) if line and re.fullmatch(rb"\d{1,12}", head := head.strip()) else None
        if size is None and head != b"-1":
            break
        if size is not None:
            if len(rest) < size:
                break
            found[name] = rest[:size]
        data = rest[size or 0 :]
    return found


@contextmanager
def _confined(
    script: str, files: Mapping[str, bytes], results: int, limits: ToolLimits
) -> Iterator[subprocess.Popen[bytes]]:
    """The shell under bubblewrap; at the end, none of its processes is left."""
    bwrap = shutil.which("bwrap")
    if bwrap is None:
        raise JailError(f"jail: level tools: there is no bubblewrap on this machine\n  {_INSTALL}")
    with ExitStack() as held:
        filtered = _readable_fd(held, bpf.deny(bpf.NEVER, bpf.machine()))
        given = {name: _readable_fd(held, content) for name, content in files.items()}
        argv = [bwrap, "--unshare-all", "--unshare-user", "--die-with-parent", "--new-session"]
        argv += ["--hostname", "jail", "--ro-bind", "/usr", "/usr"]
        for path in _SYSTEM:
            if os.path.islink(path):
                argv += ["--symlink", os.readlink(path), path]
            elif os.path.isdir(path):
                argv += ["--ro-bind", path, path]
        for path in _SETTINGS:
            argv += ["--ro-bind-try", path, path]
        argv += ["--size", _SMALL_TMPFS, "--tmpfs", "/dev"]
        for path in _DEVICES:
            argv += ["--dev-bind", path, path]
        argv += ["--remount-ro", "/dev", "--size", str(limits.file_bytes), "--tmpfs", WORK]
        argv += ["--symlink", "work", "/tmp"]
        for name, fd in given.items():
            argv += ["--perms", "0755", "--file", str(fd), f"{WORK}/{name}"]
        argv += ["--remount-ro", "/", "--chdir", WORK, "--seccomp", str(filtered), "/bin/sh", "-c", script]
        fds = (filtered, *given.values())
        with _started(argv, results, fds, cwd="/", as_nobody=os.geteuid() == 0) as process:
            try:
                yield process
            finally:
                _end_namespace(process)


def _end_namespace(process: subprocess.Popen[bytes]) -> None:
    """End bubblewrap by its namespace's first process, whose end the kernel completes when all others are gone."""
    while process.poll() is None:
        for child in _children(process.pid):
            with contextlib.suppress(ProcessLookupError):
                os.kill(child, signal.SIGKILL)
        try:
            process.wait(_END_S)
        except subprocess.TimeoutExpired:
            process.kill()  # then --die-with-parent ends the others


@contextmanager
def _unconfined(script: str, files: Mapping[str, bytes], results: int) -> Iterator[subprocess.Popen[bytes]]:
    """The shell with its limits alone, in a folder of its own."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        for name, content in files.items():
            file = Path(folder, name)
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(content)
            file.chmod(0o755)
        with _started(["/bin/sh", "-c", script], results, (), cwd=folder, as_nobody=False) as process:
            try:
                yield process
            finally:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()


@contextmanager
def _started(
    argv: Sequence[str], results: int, fds: Sequence[int], *, cwd: str, as_nobody: bool
) -> Iterator[subprocess.Popen[bytes]]:
    """A process that writes results into descriptor 1, all else into a pipe to this side; it has no other but `fds`."""
    who: dict[str, Any] = {"user": NOBODY, "group": NOBODY, "extra_groups": []} if as_nobody else {}
    try:
        process = subprocess.Popen(
            argv,
            stdin=subprocess.DEVNULL,
            stdout=results,
            stderr=subprocess.PIPE,
            pass_fds=fds,
            env=_ENVIRONMENT,
            cwd=cwd,
            start_new_session=True,
            **who,
        )
    except OSError as error:  # a PermissionError where this root may not become nobody
        raise JailError(f"jail: level tools: no tool can be started: {error}\n  {_INSTALL}") from None
    with process:
        yield process


def _readable_fd(held: ExitStack, content: bytes) -> int:
    """A descriptor that content is read from."""
    file = held.enter_context(os.fdopen(os.memfd_create("given", os.MFD_CLOEXEC), "w+b", buffering=0))
    file.write(content)
    file.seek(0)
    return file.fileno()


def _watch(process: subprocess.Popen[bytes], limits: ToolLimits, start: float) -> tuple[str, ToolFailure | None]:
    """Read what a tool prints until it ends, or has to be ended; processes of its own that linger end with it."""
    assert process.stderr is not None
    printed, hidden = bytearray(), 0
    poll = select.poll()
    poll.register(process.stderr, select.POLLIN)
    look, failure = start + _LOOK_S, None
    while failure is None:
        now = time.perf_counter()
        if now >= start + limits.wall_s:
            failure = "timeout"
        elif now >= look:
            look = now + _LOOK_S
            if _resident_bytes(process.pid) > limits.memory_bytes:
                failure = "memory"
            elif process.poll() is not None and not poll.poll(0):
                break  # at level weak, one that left its group may hold the pipe
        elif poll.poll(_LOOK_S * 1000):
            part = os.read(process.stderr.fileno(), _PIECE_BYTES)
            if not part:
                break
            printed += part[: max(0, 4 * limits.output_characters - len(printed))]  # UTF-8: at most 4 bytes each
            hidden += len(part)
    if failure is None:
        try:
            process.wait(max(_LOOK_S, start + limits.wall_s - time.perf_counter()))
        except subprocess.TimeoutExpired:
            failure = "timeout"
    text = printed.decode(errors="replace")[: limits.output_characters]
    more = hidden - len(text.encode())
    return text + (f"\n[{more:,} more bytes]" if more > 0 else ""), failure


def _resident_bytes(pid: int) -> int:
    """What a process and all below it hold in memory; 0 for those that are gone meanwhile."""
    found = 0
    with contextlib.suppress(OSError):  # FileNotFoundError, and ProcessLookupError from a read
        found = int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * mmap.PAGESIZE
    return found + sum(map(_resident_bytes, _children(pid)))


def _children(pid: int) -> list[int]:
    with contextlib.suppress(OSError):
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    return []
