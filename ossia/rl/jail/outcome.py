"""What the parts of the jail tell each other and its users: limits, levels, outcomes."""

from __future__ import annotations

from dataclasses import dataclass
from types import TracebackType
from typing import Literal, Self, TypeAlias

from ossia.rl.jail.frames import Plain

Level: TypeAlias = Literal["compute", "read", "tools", "weak"]
Failure: TypeAlias = Literal["raised", "value", "timeout", "memory", "crash", "protocol", "closed"]
LOCKED: tuple[Level, ...] = ("compute", "read", "tools")
LEVELS: tuple[Level, ...] = (*LOCKED, "weak")
NOBODY = 65534  # the user that programs of root's run as


class Closing:
    """A context manager that closes itself."""

    def close(self) -> None:
        """Let go of what is held."""
        raise AssertionError

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


@dataclass(frozen=True, slots=True)
class Limits:
    """What a program may use. Loading it counts as a call.

    cpu_s            seconds of CPU of one call
    wall_s           seconds of one call by the parent's clock
    total_s          seconds of CPU of the whole program, and of all its calls by the parent's clock
    memory_bytes     of address space, beyond what the jail itself has mapped
    max_reply_bytes  of one reply's JSON
    """

    cpu_s: float = 1.0
    wall_s: float = 2.0
    total_s: float = 30.0
    memory_bytes: int = 256 << 20
    max_reply_bytes: int = 1 << 20

    def __post_init__(self) -> None:
        fields = (self.cpu_s, self.wall_s, self.total_s, self.memory_bytes, self.max_reply_bytes)
        if not all(0 < value < 2**40 for value in fields):
            raise ValueError(f"{self}: every limit is a finite number above 0")


DEFAULT_LIMITS = Limits()


@dataclass(frozen=True, slots=True)
class Outcome:
    """What came of loading a program, of a call, or of a tool.

    value    what was returned; None beside a failure (of a session's run: what was printed all the same)
    failure  None, or: raised, the code raised an error; value, it returned what isn't plain; timeout; memory; crash,
             its process ended; protocol, what came back is no reply; closed, called after its process had ended
    detail   the failure in words. A program decides what it says: never a reason to believe it
    wall_s   seconds from sending to receiving, by the parent's clock
    cpu_s    seconds of CPU that the program's process took meanwhile, by the kernel's count
    level    the jail's level
    """

    value: Plain
    failure: Failure | None
    detail: str
    wall_s: float
    cpu_s: float
    level: Level
