"""Where small files are made that another program's code writes or reads by their path alone."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from ossia.errors import StoppedError


@contextmanager
def scratch_folder() -> Iterator[Path]:
    """A folder among the system's temporary ones, for small files, removed afterwards.

    Raises  StoppedError where it can't be made or written in: of OSErrors nothing else may be left to come out of it
    """
    try:
        with TemporaryDirectory(prefix="ossia-") as folder:
            yield Path(folder)
    except OSError as error:
        raise StoppedError(
            f"{tempfile.tempdir or 'TMPDIR'}: no small files can be written there: {error.strerror or error}\n"
            "  next: make room there, or name another folder in TMPDIR, and run the same command again"
        ) from error
