"""Environments for the tests of rollouts and training: they live here so that a recipe can name them by file."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import count

from ossia.harmony import Message
from ossia.rl.env import OneStep, Split, Step, Task, Turn, final


def said(turn: Turn) -> str:
    return "".join(message.content for message in turn.messages)


class Parity:
    """Pays for what an untrained model says by the parity of its length: half of the samples earn something."""

    def tasks(self, split: Split, seed: int) -> Iterator[Task]:
        for number in count():
            row = {"messages": [{"role": "user", "content": f"{split} {seed} {number}"}]}
            yield Task(row, {}, f"{split} {seed} {number}")

    def open(self, task: Task, seed: int) -> OneStep:
        return OneStep(lambda turn: (float(len(said(turn)) % 2), {"length": float(len(said(turn)))}))

    def examples(self, task: Task) -> tuple[Turn, Sequence[Turn]]:
        return final("odd"), ()


class Same(Parity):
    """Pays everybody the same."""

    def open(self, task: Task, seed: int) -> OneStep:
        return OneStep(lambda turn: (0.3, {}))


class Failing(Parity):
    """Fails at every other sample."""

    def open(self, task: Task, seed: int) -> OneStep:
        def verdict(turn: Turn) -> tuple[float, dict[str, float]]:
            if len(said(turn)) % 2:
                raise ValueError("odd")
            return float(len(said(turn)) % 4), {}

        return OneStep(verdict)


class Talk:
    """Answers every turn with a tool's result, `turns` times; each turn earns 0.25."""

    def __init__(self, turns: int) -> None:
        self._left = turns

    def step(self, turn: Turn) -> Step:
        self._left -= 1
        text, name = f"result {self._left}", "functions.f"
        result = Message("tool", text, channel="commentary", recipient="assistant", name=name)
        return Step((result,), 0.25, terminated=not self._left)

    def close(self) -> None:
        pass


class Talking(Parity):
    """Episodes of three turns."""

    def open(self, task: Task, seed: int) -> Talk:  # type: ignore[override]
        return Talk(3)
