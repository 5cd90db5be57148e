"""The records of a Harmony conversation: what a message is before it becomes tokens.

Plain frozen dataclasses, no torch. Field meanings follow OpenAI's Harmony format guide: a message has an author (role
and, for tools, a name), a recipient, a channel, a content type, and text.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from ossia.errors import HarmonyError

Role = Literal["system", "developer", "user", "assistant", "tool"]
Effort = Literal["low", "medium", "high"]
ROLES = ("system", "developer", "user", "assistant", "tool")
EFFORTS = ("low", "medium", "high")
CHANNELS = ("analysis", "commentary", "final")
LEAST_WEIGHT, MOST_WEIGHT = 1e-9, 1e9  # so that sums of weights over any data set stay inside float32
WEIGHTS = f"a weight is 0 (not trained) or from {LEAST_WEIGHT:g} to {MOST_WEIGHT:g}"
CONSTRAIN_JSON = "<|constrain|>json"  # the content type of a function call's arguments


@dataclass(frozen=True, slots=True)
class Message:
    """One message. `train` overrides what the recipe says of it (None: follow the recipe); `weight` scales its tokens.

    Raises  HarmonyError for an unknown role, a tool without a name, a weight out of range, or
            `train=True` on anything but the assistant, whose messages alone are sampled
    """

    role: Role
    content: str
    channel: str | None = None
    recipient: str | None = None
    name: str | None = None  # a tool's own name, "functions.get_weather"
    content_type: str | None = None  # "<|constrain|>json" on tool calls
    train: bool | None = None
    weight: float = 1.0

    def __post_init__(self) -> None:
        if self.role not in ROLES:
            raise HarmonyError(f"unknown role {self.role!r}; allowed: {', '.join(ROLES)}", "role")
        if self.role == "tool" and not self.name:
            raise HarmonyError("a tool message needs the tool's name, like functions.get_weather", "name")
        if self.train and self.role != "assistant":
            raise HarmonyError(f"only assistant messages can be trained, not those of role {self.role}", "train")
        if not (self.weight == 0 or LEAST_WEIGHT <= self.weight <= MOST_WEIGHT):
            raise HarmonyError(f"is {self.weight}; {WEIGHTS}", "weight")


@dataclass(frozen=True, slots=True)
class Tool:
    """A function the model may call; `parameters` is its JSON Schema (None: takes nothing)."""

    name: str
    description: str
    parameters: dict[str, Any] | None = None


@dataclass(frozen=True, slots=True)
class System:
    """What the Harmony system message says; it is built from these, never written by a data row."""

    identity: str = "You are ChatGPT, a large language model trained by OpenAI."
    knowledge_cutoff: str | None = "2024-06"
    current_date: str | None = None
    reasoning_effort: Effort = "medium"
    builtin_tools: tuple[Literal["browser", "python"], ...] = ()

    def __post_init__(self) -> None:
        if self.reasoning_effort not in EFFORTS:
            allowed = ", ".join(EFFORTS)
            raise HarmonyError(f"is {self.reasoning_effort!r}; allowed: {allowed}", "reasoning_effort")


@dataclass(frozen=True, slots=True)
class Conversation:
    """A system message, developer instructions and tools, and the messages after them (user, assistant, tool).

    A later change of instructions may stand among the messages as a message of role developer, rendered as it is.
    """

    messages: tuple[Message, ...]
    system: System = field(default_factory=System)
    instructions: str | None = None
    tools: tuple[Tool, ...] = ()
