"""The system calls that a level may make, as a program for the kernel's seccomp filter.

Own code because it is a table and thirty lines: libseccomp's binding needs a library that a plain installation lacks.
Everything that isn't listed answers EPERM, which ordinary code meets as a PermissionError. What makes processes is in
no list, so a limit of one process is the limit of the whole program.
"""

from __future__ import annotations

import errno
import platform
import struct
from collections.abc import Iterable
from types import MappingProxyType

# name: number on x86-64 and on aarch64, None where the machine has no such call
_NUMBERS = MappingProxyType(
    {
        "read": (0, 63),
        "write": (1, 64),
        "close": (3, 57),
        "fstat": (5, 80),
        "lseek": (8, 62),
        "mmap": (9, 222),
        "mprotect": (10, 226),
        "munmap": (11, 215),
        "brk": (12, 214),
        "mremap": (25, 216),
        "madvise": (28, 233),
        "rt_sigaction": (13, 134),
        "rt_sigprocmask": (14, 135),
        "rt_sigreturn": (15, 139),
        "sigaltstack": (131, 132),
        "select": (23, None),
        "pselect6": (270, 72),
        "nanosleep": (35, 101),
        "clock_nanosleep": (230, 115),
        "restart_syscall": (219, 128),
        "clock_gettime": (228, 113),
        "clock_getres": (229, 114),
        "gettimeofday": (96, 169),
        "time": (201, None),
        "times": (100, 153),
        "getrusage": (98, 165),
        "getrandom": (318, 278),
        "futex": (202, 98),
        "exit": (60, 93),
        "exit_group": (231, 94),
        "getpid": (39, 172),
        "gettid": (186, 178),
        "getuid": (102, 174),
        "geteuid": (107, 175),
        "getgid": (104, 176),
        "getegid": (108, 177),
        "sched_yield": (24, 124),
        "uname": (63, 160),
        "sched_getaffinity": (204, 123),
        # of the level `read`
        "open": (2, None),
        "openat": (257, 56),
        "stat": (4, None),
        "lstat": (6, None),
        "newfstatat": (262, 79),
        "statx": (332, 291),
        "access": (21, None),
        "faccessat": (269, 48),
        "faccessat2": (439, 439),
        "getdents64": (217, 61),
        "readlink": (89, None),
        "readlinkat": (267, 78),
        "pread64": (17, 67),
        "readv": (19, 65),
        "getcwd": (79, 17),
        "fcntl": (72, 25),
        # of no level
        "clone3": (435, 435),
        "io_uring_setup": (425, 425),
        "io_uring_enter": (426, 426),
        "io_uring_register": (427, 427),
        "bpf": (321, 280),
        "perf_event_open": (298, 241),
        "keyctl": (250, 219),
        "add_key": (248, 217),
        "request_key": (249, 218),
        "userfaultfd": (323, 282),
        "ptrace": (101, 117),
        "process_vm_readv": (310, 270),
        "process_vm_writev": (311, 271),
        "kcmp": (312, 272),
        "pidfd_getfd": (438, 438),
        "mount": (165, 40),
        "umount2": (166, 39),
        "pivot_root": (155, 41),
        "move_mount": (429, 429),
        "open_tree": (428, 428),
        "fsopen": (430, 430),
        "fsmount": (432, 432),
        "mount_setattr": (442, 442),
        "unshare": (272, 97),
        "setns": (308, 268),
        "kexec_load": (246, 104),
        "init_module": (175, 105),
        "finit_module": (313, 273),
        "delete_module": (176, 106),
        "open_by_handle_at": (304, 265),
        "socket": (41, 198),
        "socketpair": (53, 199),
        "vmsplice": (278, 75),
        "memfd_create": (319, 279),  # these keep memory that counts as no process's
        "memfd_secret": (447, 447),
        "shmget": (29, 194),
        "msgget": (68, 186),
        "mq_open": (240, 180),
    }
)
_NAMES = tuple(_NUMBERS)
COMPUTE = _NAMES[: _NAMES.index("open")]
READ = _NAMES[: _NAMES.index("clone3")]
NEVER = _NAMES[_NAMES.index("clone3") + 1 :]  # what a compiler has no use for, in a level that starts processes

_ARCHITECTURES = MappingProxyType({"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)})  # column, AUDIT_ARCH_*
_X32_BIT = 0x40000000  # the second table of an x86-64 kernel: other numbers for the same calls
_LOAD, _JUMP_IF_EQUAL, _JUMP_IF_AT_LEAST, _RETURN = 0x20, 0x15, 0x35, 0x06
_JUMP_IF_ANY_BIT = 0x45
_NUMBER_OFFSET, _ARCH_OFFSET, _FIRST_ARGUMENT_OFFSET = 0, 4, 16  # in struct seccomp_data
_CLONE = (56, 220)
_NEW_NAMESPACES = 0x7E020000  # the CLONE_NEW* among clone's flags
_KILL, _ALLOW, _ERRNO = 0x80000000, 0x7FFF0000, 0x00050000


def machine() -> str:
    """What this machine calls its processor's kind: `x86_64`, `aarch64`, ..."""
    return platform.machine()


def supported() -> tuple[str, ...]:
    """The kinds of processor whose system calls are known here."""
    return tuple(_ARCHITECTURES)


def allow_only(names: Iterable[str], kind: str) -> bytes:
    """A filter that lets these calls pass; all others fail with EPERM, and clone3 with ENOSYS.

    names    keys of the table above; one that the machine doesn't have is left out
    kind     one of `supported()`
    Returns  `struct sock_filter[]`: 8 bytes an instruction
    Source   Linux, Documentation/userspace-api/seccomp_filter.rst
    """
    return _program(names, kind, listed=_ALLOW, otherwise=_ERRNO | errno.EPERM)


def deny(names: Iterable[str], kind: str) -> bytes:
    """A filter that lets these calls fail with EPERM and all others pass; arguments as those of `allow_only`.

    A clone that would make namespaces fails too: in one of its own, a process is root.
    """
    number = _CLONE[_ARCHITECTURES[kind][0]]
    no_namespaces = [
        (_JUMP_IF_EQUAL, 0, 3, number),
        (_LOAD, 0, 0, _FIRST_ARGUMENT_OFFSET),
        (_JUMP_IF_ANY_BIT, 0, 1, _NEW_NAMESPACES),
        (_RETURN, 0, 0, _ERRNO | errno.EPERM),
    ]
    return _program(names, kind, listed=_ERRNO | errno.EPERM, otherwise=_ALLOW, last=no_namespaces)


def _program(
    names: Iterable[str], kind: str, *, listed: int, otherwise: int, last: Iterable[tuple[int, int, int, int]] = ()
) -> bytes:
    column, architecture = _ARCHITECTURES[kind]
    steps = [
        (_LOAD, 0, 0, _ARCH_OFFSET),
        (_JUMP_IF_EQUAL, 1, 0, architecture),
        (_RETURN, 0, 0, _KILL),
        (_LOAD, 0, 0, _NUMBER_OFFSET),
    ]
    if kind == "x86_64":
        steps += [(_JUMP_IF_AT_LEAST, 0, 1, _X32_BIT), (_RETURN, 0, 0, _KILL)]
    answers = {"clone3": _ERRNO | errno.ENOSYS} | dict.fromkeys(names, listed)
    for name, answer in answers.items():
        number = _NUMBERS[name][column]
        if number is not None:
            steps += [(_JUMP_IF_EQUAL, 0, 1, number), (_RETURN, 0, 0, answer)]
    steps += [*last, (_RETURN, 0, 0, otherwise)]
    return b"".join(struct.pack("<HBBI", *step) for step in steps)
