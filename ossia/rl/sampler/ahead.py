"""A batch that is sampled while the one before it is trained."""

from __future__ import annotations

import threading
from collections.abc import Callable
from types import TracebackType
from typing import Generic, TypeVar

_T = TypeVar("_T")


class Ahead(Generic[_T]):
    """A call on a thread of its own, which doesn't keep the process alive."""

    def __init__(self, call: Callable[[], _T]) -> None:
        self._found: list[_T] = []
        self._caught = _Caught()
        self._thread = threading.Thread(target=self._run, args=(call,), name="ahead", daemon=True)
        self._thread.start()

    def wait(self) -> None:
        """Until it has come to an end, whatever that is."""
        self._thread.join()

    def take(self) -> _T:
        """What it returned, once it has. Raises what it raised."""
        self.wait()
        if self._caught.error is not None:
            raise self._caught.error
        return self._found[0]

    def _run(self, call: Callable[[], _T]) -> None:
        with self._caught:
            self._found.append(call())


class _Caught:
    """Keeps an error for the thread that waits for the result."""

    error: BaseException | None = None

    def __enter__(self) -> None: ...

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> bool:
        self.error = error
        return True
