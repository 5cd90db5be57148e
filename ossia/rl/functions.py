"""Reward functions in TRL's form, as they are: `def f(completions, **columns) -> list[float]`, over rows of prompts.

Each is called with one completion at a time, in lists of one, because rewards are judged as answers end; it gets
`prompts`, `completions` and the row's other columns, all by name. A prompt that is a list of messages
gets its completion as one, `[{"role": "assistant", "content": ...}]`; a prompt that is text gets text. The completion
is the answer alone, without thinking, and empty where the turn has none. Source: TRL 1.16, `GRPOTrainer`.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ossia.data.rows import Rows
from ossia.errors import DataError
from ossia.rl.env import OneStep, Split, Task, Turn, final

Function = Callable[..., Sequence[float | None]]
_HELD_OUT = 10  # one row of so many, by the row's own bytes
_PROMPT = ("prompt", "messages")


@dataclass(frozen=True, slots=True)
class RewardFunctions:
    """An environment of one turn: a row's prompt, judged by functions whose rewards add up."""

    sources: Sequence[Rows]
    functions: Mapping[str, Function]

    def tasks(self, split: Split, seed: int) -> Iterator[Task]:
        """The rows in the seed's order; a tenth of them, by their bytes, is held out."""
        places = [
            (rows, index)
            for rows in self.sources
            for index, number in enumerate(rows.hashes(0).tolist())
            if (number % _HELD_OUT == 0) == (split == "eval")
        ]
        random.Random(f"{split} {seed}").shuffle(places)
        for rows, index in places:
            yield _task(rows.row(index), rows.where(index))

    def open(self, task: Task, seed: int) -> OneStep:
        """See Env."""

        def verdict(turn: Turn) -> tuple[float, dict[str, float]]:
            text = turn.answer() or ""
            prompt, columns = task.info["prompt"], task.info["columns"]
            answer = text if isinstance(prompt, str) else [{"role": "assistant", "content": text}]
            lists = {name: [value] for name, value in columns.items()}
            found = {}
            for name, function in self.functions.items():
                rewards = function(prompts=[prompt], completions=[answer], **lists)
                if len(rewards) != 1:
                    raise ValueError(f"{name} returned {len(rewards)} rewards for 1 completion")
                if rewards[0] is not None:  # as in TRL: it doesn't apply to this row
                    found[name] = float(rewards[0])
            if not found:
                raise ValueError("no reward function applies to this row")
            return sum(found.values()), found

        return OneStep(verdict)

    def examples(self, task: Task) -> tuple[Turn, Sequence[Turn]]:
        """Nobody but the functions knows a right answer: nothing to try."""
        return final(""), ()


def _task(row: Mapping[str, Any], where: str) -> Task:
    """A row as a task; its prompt ends with the user's last message."""
    key = next((name for name in _PROMPT if name in row), None)
    if key is None:
        raise DataError(f"{where}: no prompt; a row needs `prompt` (text, or messages) or `messages`")
    prompt = row[key]
    if isinstance(prompt, str):
        messages = [{"role": "user", "content": prompt}]
    else:
        if not isinstance(prompt, list) or not all(isinstance(one, Mapping) for one in prompt):
            raise DataError(f"{where}: `{key}` is neither text nor a list of messages")
        last = max((i for i, one in enumerate(prompt) if one.get("role") in ("user", "tool")), default=-1)
        prompt = messages = prompt[: last + 1]
        if not messages:
            raise DataError(f"{where}: `{key}` has no message of the user's to answer")
    asked = {name: row[name] for name in ("tools", "developer", "reasoning_effort") if row.get(name) is not None}
    columns = {name: value for name, value in row.items() if name not in _PROMPT}
    return Task({"messages": messages, **asked}, {"prompt": prompt, "columns": columns}, where)
