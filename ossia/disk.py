"""What has to be on the disk before the next thing may happen, and whether it can get there."""

from __future__ import annotations

import errno
import fcntl
import os
from pathlib import Path
from tempfile import TemporaryDirectory


def sync_to_disk(path: Path) -> None:
    """Have the system write a file's contents, or a folder's entries, to the disk before going on. Raises OSError."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sync_folder_to_disk(folder: Path) -> None:
    """`sync_to_disk` of a folder's files, then of its entries: it may take its name then. Raises OSError."""
    for file in folder.iterdir():
        sync_to_disk(file)
    sync_to_disk(folder)


def locked(handle: int) -> bool:
    """Take the lock of an open file, which ends with this process, however it ends; False if another process has it.

    Some shared file systems have no locks; what is written there is merely unguarded. Raises OSError.
    """
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK):
            raise
    return True


def why_no_folder(folder: Path) -> str:
    """Why a folder can't be made or written in, in the system's words; "" if it can be. Nothing is left behind."""
    there = next(place for place in (folder, *folder.absolute().parents) if os.path.exists(place))
    try:
        with TemporaryDirectory(prefix=".ossia-", dir=there):
            return ""
    except OSError as error:
        return error.strerror


def why_no_file(file: Path) -> str:
    """Why a file can't be written or replaced, in words; "" if it can be. Nothing is left behind."""
    if file.is_dir():
        return "it is a folder"
    if not file.parent.is_dir():
        return f"there is no folder {file.parent}"
    if os.path.exists(file) and not file.is_file():
        return "it is no regular file"
    return why_no_folder(file.parent)
