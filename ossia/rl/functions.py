"""Reward functions in TRL's form, as they are: `def f(completions, **columns) -> list[float]`, over rows of prompts.

Each is called with one completion at a time, in lists of one, because rewards are judged as answers end; it gets
`prompts`, `completions` and the row's other columns, all by name, and `completion_ids` (as sampled, thinking too)
where it takes them. A prompt that is a list of messages gets its completion as one,
`[{"role": "assistant", "content": ...}]`; a prompt that is text gets text. The completion is the answer alone, without
thinking, and empty where the turn has none. An `async def` works too. Source: TRL 1.16, `GRPOTrainer`; its
`trainer_state`, `log_extra` and `log_metric` aren't there.
"""

from __future__ import annotations

import asyncio
import inspect
import random
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ossia.data.rows import Rows
from ossia.errors import DataError, RecipeError
from ossia.rl.env import OneStep, Split, Task, Turn, final

Function = Callable[..., Any]
"""Returns a sequence of rewards (None: it doesn't apply to that row), or a coroutine that does."""
_HELD_OUT = 10  # one row of so many, by the row's own bytes
_PROMPT = ("prompt", "messages")


@dataclass(frozen=True, slots=True)
class RewardFunctions:
    """An environment of one turn: a row's prompt, judged by functions whose rewards add up."""

    sources: Sequence[Rows]
    functions: Mapping[str, Function]

    def __post_init__(self) -> None:
        first = next((rows.row(0) for rows in self.sources if len(rows)), None)
        for name, function in self.functions.items():
            _check(name, function, first)

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
                also = {"completion_ids": [list(turn.ids)]} if _takes(function, "completion_ids") else {}
                rewards = function(prompts=[prompt], completions=[answer], **also, **lists)
                if inspect.isawaitable(rewards):
                    rewards = asyncio.run(_result(rewards))
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


def _takes(function: Function, name: str) -> bool:
    found = inspect.signature(function).parameters
    return name in found or any(one.kind is one.VAR_KEYWORD for one in found.values())


async def _result(rewards: Awaitable[Any]) -> Any:
    return await rewards


def _check(name: str, function: Function, row: Mapping[str, Any] | None) -> None:
    """Whether a function can be called with what there is, as the first row has it. Raises RecipeError if not."""
    if not callable(function):
        raise RecipeError(f"reward: `{name}` is {function!r}; expected: a function")
    if row is None:
        return
    columns = [column for column in row if column not in _PROMPT]
    also = ["completion_ids"] if _takes(function, "completion_ids") else []
    try:
        inspect.signature(function).bind(**dict.fromkeys(("prompts", "completions", *also, *columns)))
    except TypeError as error:
        raise RecipeError(
            f"reward: `{name}` can't be called with a row of `data`: {error}\n"
            f"  given, by name: {', '.join(('prompts', 'completions', 'completion_ids', *columns))}\n"
            "  next: name its arguments as the columns, and end them with `**columns` for the rest"
        ) from error


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
