"""Environments for the tests of rollouts and training: they live here so that a recipe can name them by file."""

from __future__ import annotations

import time
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


class Astray:
    """An episode that says something other than messages, or fails at its end."""

    def __init__(self, number: int) -> None:
        self._number = number

    def step(self, turn: Turn) -> Step:
        if self._number == 1:
            return Step(({"role": "user", "content": "more"},), 0.5, terminated=False)  # type: ignore[arg-type]
        return Step(reward=float(len(said(turn)) % 2))

    def close(self) -> None:
        if self._number == 2:
            raise OSError("gone")


class Everywhere(Parity):
    """Fails wherever else an environment can."""

    def open(self, task: Task, seed: int) -> Astray:  # type: ignore[override]
        number = int(task.name.split()[-1]) % 4
        if number == 0 and task.name.startswith("train"):
            raise RuntimeError("no room")
        return Astray(number)

    def examples(self, task: Task) -> tuple[Turn, Sequence[Turn]]:
        return final("odd"), ()


class Slow(Parity):
    """Judges the samples of every third task for longer than anyone waits."""

    def open(self, task: Task, seed: int) -> OneStep:
        late = int(task.name.split()[-1]) % 3 == 1

        def verdict(turn: Turn) -> tuple[float, dict[str, float]]:
            time.sleep(20.0 if late else 0.0)
            return float(len(said(turn)) % 2), {}

        return OneStep(verdict)


class Never(Parity):
    """Fails at every sample."""

    def open(self, task: Task, seed: int) -> OneStep:
        def verdict(turn: Turn) -> tuple[float, dict[str, float]]:
            raise NameError("zipp")

        return OneStep(verdict)


class Untried(Parity):
    """Its examples fail."""

    def examples(self, task: Task) -> tuple[Turn, Sequence[Turn]]:
        raise KeyError("gold")


class Unlisted(Parity):
    """Its tasks fail, after a few."""

    def tasks(self, split: Split, seed: int) -> Iterator[Task]:
        for number, task in enumerate(super().tasks(split, seed)):
            if number == 4:
                raise OSError("no file")
            yield task


class Nothing:
    """No environment."""
