"""What environments that talk in text have in common: what is seen is the user's message, the answer is the action."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from ossia.errors import RewardError
from ossia.harmony.messages import Message
from ossia.rl.env import Episode, Split, Step, Task, Turn, final

_HELD_OUT = 10  # one seed of so many


@dataclass(frozen=True, slots=True)
class Reply:
    """What a world says to an action."""

    text: str
    reward: float
    terminated: bool
    truncated: bool = False
    metrics: Mapping[str, float] | None = None


class World(Protocol):
    """One episode of a foreign environment."""

    def reset(self, seed: int) -> str:
        """Begin; what there is to see."""

    def step(self, text: str) -> Reply | None:
        """Act; None where the text is no action."""

    def close(self) -> None:
        """Let go of it."""


@dataclass(frozen=True, slots=True)
class Talk:
    """An environment whose tasks are the seeds of a world; seeds of both splits differ.

    world        makes one
    instruction  what the developer message says; "": none
    """

    world: Callable[[], World]
    instruction: str = ""

    def tasks(self, split: Split, seed: int) -> Iterator[Task]:
        """Endless. Each world is begun once for its prompt."""
        seeds = random.Random(f"{split} {seed}")
        while True:
            number = seeds.getrandbits(31)
            if (number % _HELD_OUT == 0) != (split == "eval"):
                continue
            world = self.world()
            try:
                text = world.reset(number)
            finally:
                world.close()
            row: dict[str, Any] = {"messages": [{"role": "user", "content": text}]}
            if self.instruction:
                row["developer"] = self.instruction
            yield Task(row, {"seed": number, "text": text}, f"seed {number}")

    def open(self, task: Task, seed: int) -> Episode:
        """See Env."""
        return _Talk(self.world, task)

    def examples(self, task: Task) -> tuple[Turn, Sequence[Turn]]:
        """Nobody but the world knows a right answer: nothing to try."""
        return final(""), ()


class _Talk:
    """An episode; its world is begun at the first turn, so that no more of them are open than are being judged."""

    def __init__(self, world: Callable[[], World], task: Task) -> None:
        self._make, self._task = world, task
        self._world: World | None = None

    def step(self, turn: Turn) -> Step:
        """The answer as an action; an answer that is none ends the episode and earns nothing."""
        if self._world is None:
            self._world = self._make()
            if (text := self._world.reset(self._task.info["seed"])) != self._task.info["text"]:
                raise RewardError(
                    f"task {self._task.name!r}: the environment begins otherwise than before with the same seed\n"
                    f"  found: {text[:100]!r}, before: {self._task.info['text'][:100]!r}\n"
                    "  next: have its reset follow its seed"
                )
        answer = turn.answer()
        reply = self._world.step(answer) if answer is not None else None
        if reply is None:
            self.close()
            return Step(metrics={"well_formed": 0.0})
        if reply.terminated or reply.truncated:
            self.close()
        said = () if reply.terminated or reply.truncated else (Message("user", reply.text),)
        metrics = {**(reply.metrics or {}), "well_formed": 1.0}
        return Step(said, reply.reward, reply.terminated, reply.truncated, metrics)

    def close(self) -> None:
        """See Episode."""
        if self._world is not None:
            self._world.close()
            self._world = None


def numbers_of(info: Mapping[str, Any]) -> dict[str, float]:
    """What of an environment's remarks are figures."""
    return {str(name): float(value) for name, value in info.items() if isinstance(value, int | float)}
