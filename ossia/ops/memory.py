"""Memory that the process holds and doesn't use."""

from __future__ import annotations

import ctypes

import torch


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
