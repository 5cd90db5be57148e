"""Memory that a program starts with beside its code: a compiled library to load, arrays to read and to fill.

Sealed, so that neither side can be surprised: nobody changes a library or the size of anything, and a program can't
write into its inputs by any mapping. Source: Linux, memfd_create(2) and fcntl(2), "File Sealing".
"""

from __future__ import annotations

import fcntl
import mmap
import os
from types import TracebackType
from typing import Literal, Self, TypeAlias

Kind: TypeAlias = Literal["library", "input", "output"]
MOST_SHARED = 8  # of one program

_NO_NEW_WRITERS = 0x0010  # F_SEAL_FUTURE_WRITE, Linux >= 5.1, which Python's fcntl doesn't name yet
_FIXED_SIZE = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW


class Shared:
    """One piece of it, for as many programs as it is given to; a context manager. `Jail.open(..., shared={name: it})`.

    kind   library: in the program, the name is a path that `ctypes.CDLL` takes (levels read and tools).
           input: the name is a memoryview to read; output: one to write, whose content no program is to be believed
    view   this side's own view, writable; empty for a library
    """

    def __init__(self, kind: Kind, size: int, content: bytes = b"") -> None:
        self.kind: Kind = kind
        self.size = size
        self.fd = os.memfd_create(kind, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        self._mapped: mmap.mmap | None = None
        os.ftruncate(self.fd, size)
        if kind == "library":
            os.pwrite(self.fd, content, 0)
            seals = fcntl.F_SEAL_WRITE
        else:
            self._mapped = mmap.mmap(self.fd, size)
            seals = _NO_NEW_WRITERS if kind == "input" else 0
        fcntl.fcntl(self.fd, fcntl.F_ADD_SEALS, seals | _FIXED_SIZE | fcntl.F_SEAL_SEAL)

    @property
    def view(self) -> memoryview:
        return memoryview(b"") if self._mapped is None else memoryview(self._mapped)

    def close(self) -> None:
        """Let go of it; programs keep theirs. Raises BufferError while something made of `view` is still held."""
        if self._mapped is not None:
            self._mapped.close()
        os.close(self.fd)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def library(content: bytes) -> Shared:
    """A compiled library, such as a tool's output: `ctypes.CDLL(name)` in a program loads it, this process never."""
    return Shared("library", len(content), content)


def input_array(size_bytes: int) -> Shared:
    """Zeros that this side fills by `view` at any time, and a program reads."""
    return Shared("input", size_bytes)


def output_array(size_bytes: int) -> Shared:
    """Zeros that a program fills. Fill it with what can't be an answer (NaN) before each call."""
    return Shared("output", size_bytes)
