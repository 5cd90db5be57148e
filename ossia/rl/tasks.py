"""The tasks of every step, from a recipe's environments, in an order that the seed decides.

An environment gives its tasks from a seed, so a run's position is how many were taken of each; going on skips so many.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

from ossia.config import HarmonyConfig, Recipe
from ossia.data.sources import open_rows
from ossia.errors import DataError, HarmonyError, RecipeError
from ossia.harmony.chat import conversation_from_messages
from ossia.harmony.messages import System
from ossia.harmony.render import Renderer
from ossia.rl.env import Caught, Env, Split, Task, validate
from ossia.rl.envs import load_object, make_env
from ossia.rl.functions import RewardFunctions
from ossia.rl.jail import Jails
from ossia.rl.rollout import Asked


@dataclass(frozen=True, slots=True)
class NamedEnv:
    """An environment under its name in the recipe, and how often its tasks are taken against the others'."""

    name: str
    env: Env
    weight: float


def open_envs(recipe: Recipe, jails: Jails) -> list[NamedEnv]:
    """The recipe's environments, each tried once, or its reward functions as one.

    Raises RecipeError, DataError, JailError, RewardError
    """
    if recipe.reward is None:
        envs = [NamedEnv(one.id, make_env(one.id, one.options, jails), one.weight) for one in recipe.env or ()]
        for named in envs:
            validate(named.env, named.name, seed=recipe.train.seed, most=1)
        return envs
    rows = [open_rows(source.path, source.split) for source in recipe.data or ()]
    names = [reference.rpartition(":")[2] for reference in recipe.reward]
    if twice := [name for number, name in enumerate(names) if name in names[:number]]:
        raise RecipeError(
            f"reward: two functions are called `{twice[0]}`; each is a part of its own\n  next: rename one"
        )
    functions = {name: load_object(reference) for name, reference in zip(names, recipe.reward, strict=True)}
    return [NamedEnv("reward", RewardFunctions(rows, functions), 1.0)]


class TaskStream:
    """Tasks of all environments, mixed by weight, endlessly: an environment whose tasks end begins again."""

    def __init__(
        self,
        envs: Sequence[NamedEnv],
        split: Split,
        seed: int,
        renderer: Renderer,
        harmony: HarmonyConfig,
        most_ids: int,
    ) -> None:
        """most_ids  ids that a prompt may have, so that an answer still fits"""
        self._envs, self._split, self._seed = list(envs), split, seed
        self._renderer, self._harmony, self._most_ids = renderer, harmony, most_ids
        self._taken = [0] * len(envs)
        self._num_taken = 0
        self._tasks: list[Iterator[Task]] = [one.env.tasks(split, seed) for one in envs]

    def take(self, count: int) -> list[Asked]:
        """The next so many tasks, rendered. Raises DataError for one that can't be, or is too long."""
        return [self._next(number) for number in range(count)]

    def state(self) -> dict[str, Any]:
        """How far it got, as JSON."""
        return {"taken": list(self._taken), "num_taken": self._num_taken}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Go on from there."""
        self._taken, self._num_taken = list(state["taken"]), state["num_taken"]
        self._tasks = []
        for one, taken in zip(self._envs, self._taken, strict=True):
            self._tasks.append(islice(one.env.tasks(self._split, self._seed), taken, None))

    def _next(self, number: int) -> Asked:
        # of one task's own, so that no position depends on how the ones before were used
        rng = random.Random(f"{self._split} {self._seed} {self._num_taken}")
        which = rng.choices(range(len(self._envs)), [one.weight for one in self._envs])[0]
        named, task = self._envs[which], None
        with (caught := Caught(theirs_alone=True)):
            task = next(self._tasks[which], None)
            if task is None:
                self._tasks[which] = named.env.tasks(self._split, self._seed)
                self._taken[which] = 0
                task = next(self._tasks[which], None)
        if caught.why is not None:
            raise DataError(f"env {named.name}: its tasks fail: {caught.why}\n  next: mend the environment")
        if task is None:
            held_out = self._split == "eval"
            raise DataError(
                f"env {named.name}: no {'held-out ' if held_out else ''}tasks; of few rows, none or all may be held out"
                f"\n  next: give it more{', or set rl.eval_tasks to 0' if held_out else ''}"
            )
        self._taken[which] += 1
        self._num_taken += 1
        return Asked(task, named.env, named.name, number, rng.getrandbits(62), self._render(task, named.name))

    def _render(self, task: Task, env: str) -> tuple[int, ...]:
        row, harmony = task.row, self._harmony
        system = System(
            harmony.identity,
            harmony.knowledge_cutoff,
            harmony.current_date,
            row.get("reasoning_effort") or harmony.reasoning_effort,
            tuple(row.get("builtin_tools") or ()),
        )
        try:
            conversation = conversation_from_messages(
                row["messages"], tools=row.get("tools"), developer=row.get("developer"), system=system
            )
            ids = tuple(self._renderer.completion(conversation))
        except HarmonyError as error:
            raise DataError(f"env {env}: task {task.name!r}: {error}") from error
        if len(ids) > self._most_ids:
            raise DataError(
                f"env {env}: task {task.name!r}: a prompt of {len(ids):,} tokens; with `rl.max_new` to be sampled, "
                f"{self._most_ids:,} fit\n  next: raise max_length, or lower rl.max_new"
            )
        return ids
