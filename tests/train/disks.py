"""Disks that are full soon."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest


@contextmanager
def small_disk_at(folder: Path, size: str, otherwise: str) -> Iterator[Path]:
    """A real file system of that size, as mount(8) writes it; needs the right to mount one.

    otherwise  what is said where the test skips: which other one covers the same
    """
    folder.mkdir()
    made = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={size}", "none", str(folder)], capture_output=True, check=False
    )
    if made.returncode:
        pytest.skip(f"can't mount a file system here; {otherwise}")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)
