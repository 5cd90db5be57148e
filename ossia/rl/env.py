"""What a policy is rewarded by: an environment hands out tasks, an episode of one answers turns with a reward.

```text
Env.tasks(split, seed) -> Task --rendered, sampled, parsed--> Turn --Episode.step--> Step(messages, reward, terminated)
                                        ^------- not terminated: the step's messages are appended -------|
```
The verdict is computed here, in the parent, from plain values; whatever a model wrote runs in `rl/jail` alone. An
episode's `step` runs on a thread beside generation, one at a time for each episode, several episodes at once. No torch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from traceback import extract_tb
from types import TracebackType
from typing import Any, Literal, Protocol, runtime_checkable

import ossia
from ossia.errors import OssiaError, RewardError
from ossia.harmony.messages import Message

Split = Literal["train", "eval"]
_NOT_THEIRS = (str(Path(ossia.__file__).parent), "<")  # whose lines say nothing to who wrote an environment


@dataclass(frozen=True, slots=True)
class Task:
    """One problem.

    row   the prompt as a data row has it: {"messages": [...]} in OpenAI's form, and optionally "tools", "developer",
          "reasoning_effort"; the last message is the user's
    info  what the verdict needs: the answer, a seed, a size. The model never sees it, nor does the jail
    name  what logs and samples call it; the same problem has the same name
    """

    row: Mapping[str, Any]
    info: Mapping[str, Any]
    name: str


@dataclass(frozen=True, slots=True)
class Turn:
    """What the model said in one generation, parsed.

    messages  in their order: analysis, preambles, calls, final
    stop      the token that ended it: "<|return|>", "<|call|>"; None where it was cut off by its length
    problems  departures from the Harmony format, in words
    ids       as they were sampled, the stop included
    """

    messages: tuple[Message, ...]
    stop: str | None
    problems: tuple[str, ...] = ()
    ids: tuple[int, ...] = ()

    def answer(self) -> str | None:
        """The text of the one final message of a well-formed turn that ended in <|return|>; otherwise None.

        One answer only: a second final message, text after it, a call beside it or a malformed header is no answer.
        """
        if self.problems or self.stop != "<|return|>" or not self.messages:
            return None
        *before, last = self.messages
        if last.channel != "final" or last.recipient is not None:
            return None
        thinking = all(m.channel in ("analysis", "commentary") and m.recipient is None for m in before)
        return last.content if thinking else None

    def calls(self) -> tuple[Message, ...]:
        """The messages that are addressed to a tool."""
        return tuple(message for message in self.messages if message.recipient is not None)


@dataclass(frozen=True, slots=True)
class Step:
    """What a turn led to.

    messages    to append before the next generation: tool results. Never trained
    reward      of this step, finite; an episode's is the sum of its steps'
    terminated  the episode is over
    truncated   over by a limit (turns, time) and not by its own end
    metrics     parts of the reward and other figures to log, finite
    """

    messages: tuple[Message, ...] = ()
    reward: float = 0.0
    terminated: bool = True
    truncated: bool = False
    metrics: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        # whatever counts as a number (numpy's, a tensor of one) is a plain one from here on
        object.__setattr__(self, "reward", float(self.reward))
        object.__setattr__(self, "metrics", {name: float(value) for name, value in self.metrics.items()})
        wrong = [name for name, value in {"reward": self.reward, **self.metrics}.items() if not math.isfinite(value)]
        if wrong:
            raise ValueError(f"{', '.join(wrong)} of a step: not finite")


class Episode(Protocol):
    """One attempt at a task; used once."""

    def step(self, turn: Turn) -> Step:
        """Answer a turn. Whatever it raises costs this sample alone, and is counted."""

    def close(self) -> None:
        """Let go of what it holds (jails, files). Called once, whatever happened."""


@runtime_checkable
class Env(Protocol):
    """A kind of task."""

    def tasks(self, split: Split, seed: int) -> Iterator[Task]:
        """Tasks in the seed's order, the same ones each time; `train` may be endless, `eval` shares none with it."""

    def open(self, task: Task, seed: int) -> Episode:
        """An attempt at a task; the same task and seed begin alike, so that a group's samples can be compared."""

    def examples(self, task: Task) -> tuple[Turn, Sequence[Turn]]:
        """A turn that earns the full reward, and corrupted ones that must earn less. What `validate` tries."""


@dataclass(frozen=True, slots=True)
class OneStep:
    """An episode that ends with its first turn: `verdict(turn)` gives its reward and metrics."""

    verdict: Callable[[Turn], tuple[float, Mapping[str, float]]]

    def step(self, turn: Turn) -> Step:
        """See Episode."""
        reward, metrics = self.verdict(turn)
        return Step(reward=reward, metrics=metrics)

    def close(self) -> None:
        """See Episode."""


def validate(env: Env, name: str, *, seed: int, most: int) -> int:
    """Try an environment on its own examples: the right turn must earn more than each of the corrupted ones.

    name     what errors call it
    most     tasks to try, of the training ones
    Returns  how many tasks had examples to try
    Raises   RewardError naming the task, and both rewards, where a corrupted turn earns as much as the right one, and
             where the environment's own code raises
    """
    tried = 0
    with (caught := Caught(theirs_alone=True)):
        for task in islice(env.tasks("train", seed), most):
            right, corrupted = env.examples(task)
            if not corrupted:
                continue
            tried += 1
            earned = first_step(env, task, seed, right).reward
            for turn in corrupted:
                if (got := first_step(env, task, seed, turn).reward) >= earned:
                    said = turn.messages[-1].content if turn.messages else ""
                    raise RewardError(
                        f"env {name}: task {task.name!r}: a corrupted answer earns {got:g}, the right one {earned:g}\n"
                        f"  found: {said[:200]!r}\n  next: mend the verdict, or `examples`"
                    )
    if caught.why is not None:
        raise RewardError(f"env {name}: its own tasks and examples fail: {caught.why}\n  next: mend the environment")
    return tried


def first_step(env: Env, task: Task, seed: int, turn: Turn) -> Step:
    """What one turn leads to in an episode of its own, which is then closed. Raises RewardError if that is no Step."""
    episode = env.open(task, seed)
    try:
        step: Step | None = episode.step(turn)
    finally:
        episode.close()
    if not isinstance(step, Step):
        raise RewardError(
            f"task {task.name!r}: the environment's `step` returned {type(step).__name__}; expected: a Step "
            "(ossia.rl.env)"
        )
    return step


def final(text: str, *, thinking: str | None = None) -> Turn:
    """A well-formed turn that thinks (where given) and answers: for `Env.examples` and tests."""
    thought = (Message("assistant", thinking, channel="analysis"),) if thinking is not None else ()
    return Turn((*thought, Message("assistant", text, channel="final")), "<|return|>")


class Caught:
    """Whatever an environment raises is a result of its own, not an error of the run; that it ends its program, too.

    why  what was raised, and in which line of code that isn't ours; None: nothing was
    """

    why: str | None = None

    def __init__(self, *, theirs_alone: bool = False) -> None:
        """theirs_alone  let pass what no code but ours had a part in, and errors that say what to do"""
        self._theirs_alone = theirs_alone

    def __enter__(self) -> Caught:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool:
        if error is None or kind is None or not issubclass(kind, (Exception, SystemExit)):
            return False
        places = [place for place in extract_tb(trace) if not place.filename.startswith(_NOT_THEIRS)]
        if self._theirs_alone and (not places or issubclass(kind, OssiaError)):
            return False
        where = f" ({Path(places[-1].filename).name}:{places[-1].lineno})" if places else ""
        self.why = f"{kind.__name__}: {error}{where}"
        return True
