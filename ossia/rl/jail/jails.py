"""`Jails`: the jails of a run, one for each thing that its environments ask for, opened at once and closed together."""

from __future__ import annotations

from collections.abc import Sequence
from types import TracebackType
from typing import Self

from ossia.errors import JailError
from ossia.rl.jail.jail import Jail
from ossia.rl.jail.outcome import Level


class Jails:
    """Where the environments of a run have what a model wrote run; a context manager.

    workers     zygotes of each jail, one a core that programs may use
    allow_weak  where the machine can't give a level, take `weak` for it: limits alone, your files open to the program
    """

    def __init__(self, *, workers: int = 1, allow_weak: bool = False) -> None:
        self._workers, self._allow_weak = workers, allow_weak
        self._opened: dict[tuple[Level, tuple[str, ...], str], Jail] = {}

    def get(self, level: Level = "compute", *, preload: Sequence[str] = (), warm: str = "") -> Jail:
        """The jail for these wishes, which are those of `Jail`; the same one each time.

        Ask while an environment is being made, so that a run that can't have it ends before any weight is read.
        Raises JailError where the machine can't give the level, or a module can't be imported.
        """
        key = (level, tuple(preload), warm)
        if key not in self._opened:
            self._opened[key] = self._open(*key)
        return self._opened[key]

    @property
    def levels(self) -> tuple[str, ...]:
        """The levels of what was opened, each once: for logs."""
        return tuple(dict.fromkeys(jail.level for jail in self._opened.values()))

    def close(self) -> None:
        """End all programs."""
        for jail in self._opened.values():
            jail.close()
        self._opened.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _open(self, level: Level, preload: tuple[str, ...], warm: str) -> Jail:
        try:
            return Jail(level, workers=self._workers, preload=preload, warm=warm)
        except JailError as error:
            if not self._allow_weak:
                raise JailError(
                    f"{error}\n  next: another machine, or `rl.jail: weak` for programs that you trust"
                ) from error
            return Jail("weak", workers=self._workers, preload=preload, warm=warm, allow_weak=True)
