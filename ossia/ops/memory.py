"""Memory: how much the process may use, and giving back what it holds and doesn't use."""

from __future__ import annotations

import ctypes
import os
import resource
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from torch import Tensor

_MADV_DONTNEED = 4

# Where Linux has a control group's limit and use: version 2 (its line names no controller), and version 1.
_GROUP_FILES = {
    "": ("sys/fs/cgroup", "memory.max", "memory.current"),
    "memory": ("sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes"),
}


def gpu_memory(device: torch.device) -> tuple[int, int]:
    """A GPU's memory in bytes, all and free; of a process that torch holds to a share of it, that share."""
    import torch

    free, total = torch.cuda.mem_get_info(device)
    held = int(torch.cuda.get_per_process_memory_fraction(device) * total)
    return min(total, held), max(0, min(free, held - torch.cuda.memory_reserved(device)))


def machine_memory(root: Path = Path("/")) -> tuple[int, int]:
    """Memory in bytes, all and free: the machine's, or that of the control group where the process is held to less.

    root  where the system's `proc` and `sys` are
    A system without /proc/meminfo doesn't say what is free: there all of it is counted as free.
    """
    meminfo = root / "proc/meminfo"
    if not meminfo.is_file():
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        return total, total
    lines = (line.split() for line in meminfo.read_text().splitlines())
    kib = {words[0].rstrip(":"): int(words[1]) for words in lines if len(words) > 1}
    total, free = kib["MemTotal"] * 1024, kib["MemAvailable"] * 1024
    for limit, used in _control_groups(root):
        total, free = min(total, limit), min(free, limit - used)
    return total, max(free, 0)


def _control_groups(root: Path) -> Iterator[tuple[int, int]]:
    """Limit and use, in bytes, of every control group that the process is in and that has a limit.

    A group inside another is held to both; in a container only the outermost may be visible.
    """
    listing = root / "proc/self/cgroup"
    for line in listing.read_text().splitlines() if listing.is_file() else ():
        _, controllers, path = line.split(":", 2)
        for controller in _GROUP_FILES.keys() & set(controllers.split(",")):
            folder, limit_file, used_file = _GROUP_FILES[controller]
            top = root / folder
            inner = top / path.lstrip("/")
            for group in (inner, *inner.parents[: len(inner.parts) - len(top.parts)]):
                limit, used = group / limit_file, group / used_file
                if limit.is_file() and used.is_file() and (text := limit.read_text().strip()) != "max":
                    yield int(text), int(used.read_text())


def peak_resident_bytes() -> int:
    """The most bytes that this process had in memory so far, files' pages that it read included."""
    status = Path("/proc/self/status")
    if status.is_file():  # getrusage counts what started the process as well
        lines = dict(line.split(":", 1) for line in status.read_text().splitlines())
        return int(lines["VmHWM"].split()[0]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def resident_bytes() -> int:
    """Bytes that this process has in memory now; where the system doesn't tell, the most so far."""
    statm = Path("/proc/self/statm")
    if not statm.is_file():
        return peak_resident_bytes()
    return int(statm.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def leave_to_the_file(tensor: Tensor) -> None:
    """Give back the pages of a tensor that was read from a file and won't be for now: it stays readable.

    tensor  maps a file and was never written to; whole pages inside of it go, where the system is Linux
    """
    if sys.platform != "linux" or tensor.device.type != "cpu":
        return
    page = os.sysconf("SC_PAGE_SIZE")
    start, end = -(-tensor.data_ptr() // page) * page, (tensor.data_ptr() + tensor.nbytes) // page * page
    if end > start:
        ctypes.CDLL(None).madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), _MADV_DONTNEED)


def return_freed_memory(device: torch.device) -> None:
    """Give pages that hold nothing back to the system: on a CPU, where the C library can (glibc's malloc_trim).

    Freed blocks of many sizes leave holes between those that live on, so without it a process grows from step to step.
    """
    if device.type != "cpu":
        return
    try:
        trim = ctypes.CDLL(None).malloc_trim
    except AttributeError:  # another C library
        return
    trim(0)
