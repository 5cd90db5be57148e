"""Where code that a model wrote, and every scorer of others, runs: `Jail`.

Three rules carry it. A program is one process without fork, exec, open or socket, forked from a zygote in about a
millisecond. The verdict on it is the parent's, from plain values, on inputs made after it was loaded; no answer, clock
or random state of a verdict is ever in there. And what a machine gives is found by trying to break out.
"""

from ossia.errors import JailError
from ossia.rl.jail.frames import Plain
from ossia.rl.jail.jail import Jail, Jails
from ossia.rl.jail.levels import probe_level
from ossia.rl.jail.outcome import LOCKED, Level, Limits, Outcome
from ossia.rl.jail.program import Program, Session
from ossia.rl.jail.shared import Shared, input_array, library, output_array
from ossia.rl.jail.tool import ToolLimits, ToolOutcome

__all__ = [
    "LOCKED",
    "Jail",
    "JailError",
    "Jails",
    "Level",
    "Limits",
    "Outcome",
    "Plain",
    "Program",
    "Session",
    "Shared",
    "ToolLimits",
    "ToolOutcome",
    "input_array",
    "library",
    "output_array",
    "probe_level",
]
