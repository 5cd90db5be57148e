"""Tasks of reasoning-gym: made here by the package from the seed, scored in the jail, or by a check of our own.

The package's generators are trusted as any installed package; its scorers read what a model wrote, so they run locked
in, each answer in a process of its own, and only full marks count: many pay a little for anything. Source of the
tasks: reasoning-gym 0.1.25, arXiv:2505.24760.
"""

from __future__ import annotations

import base64
import importlib
import json
import pickle
import random
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from importlib.util import find_spec
from types import ModuleType
from typing import Any

from ossia.config.keys import nearest
from ossia.errors import MissingExtraError, RecipeError
from ossia.rl.env import OneStep, Split, Task, Turn, final
from ossia.rl.envs.gym.checks import CHECKS, FORMULAS, is_formula, is_one_answer
from ossia.rl.envs.lazily import SYMPY
from ossia.rl.jail import Jail, Jails, Limits

_FULL = 0.999  # a score from here on is full marks
_HELD_OUT = 10  # one question of so many
_CHUNK = 100  # entries of one seed of the package's
_MOST_ANSWER = 20_000  # characters
_LIMITS = Limits(cpu_s=2.0, wall_s=10.0, total_s=20.0, memory_bytes=512 << 20)
_OURS = ("jails", "task", "instruction", "partial")
# A zygote builds the task's dataset, which may read files, and scores once for what is imported at first use.
_WARM = """
import json, reasoning_gym
dataset = reasoning_gym.create_dataset({task!r}, **json.loads({config!r}), seed=0, size={size})
for index in range(3):
    if dataset[index]["answer"] is not None:
        dataset.score_answer(dataset[index]["answer"], dataset[index])
reasoning_gym.of_this_jail = dataset
"""
_SCORE = """
import base64, pickle, reasoning_gym

def score(answer, entry):
    return float(reasoning_gym.of_this_jail.score_answer(answer, pickle.loads(base64.b64decode(entry))))
"""


@dataclass(frozen=True, slots=True)
class ReasoningGym:
    """One task of the package; `make` checks what it is made of.

    config       what the package's own config of the task is given
    instruction  what the developer message says; "": none
    partial      pay a score below full marks as it is, where the package's scorer decides
    jail         None where a check of our own does
    """

    task: str
    config: Mapping[str, Any]
    instruction: str
    partial: bool
    jail: Jail | None

    def tasks(self, split: Split, seed: int) -> Iterator[Task]:
        """Endless, unless the package has only so many; a tenth of the questions, by their text, is held out.

        Integrals that the package itself can only write as `Integral(...)` are left out: they have no answer.
        """
        gym = importlib.import_module("reasoning_gym")
        seeds, seen_before = random.Random(f"{split} {seed}"), -1
        seen: set[int] = set()
        while len(seen) > seen_before:  # a chunk without a new question is the end of them
            seen_before = len(seen)
            chunk = gym.create_dataset(self.task, **self.config, seed=seeds.getrandbits(31), size=_CHUNK)
            for index in range(_CHUNK):
                entry = chunk[index]
                if self.task in FORMULAS and not is_formula(entry["answer"], entry):
                    continue
                mark = zlib.crc32(entry["question"].encode())
                seen.add(mark)
                if (mark % _HELD_OUT == 0) == (split == "eval"):
                    yield self._task(entry, chunk[(index + 1) % _CHUNK]["answer"])

    def open(self, task: Task, seed: int) -> OneStep:
        """See Env."""

        def verdict(turn: Turn) -> tuple[float, dict[str, float]]:
            text = turn.answer()
            metrics = {"well_formed": float(text is not None)}
            answer = (text or "").strip()
            if not answer or len(answer) > _MOST_ANSWER:
                return 0.0, metrics
            score, failed = self._score(answer, task.info["entry"])
            metrics |= {"score": score, "scorer_failed": float(failed)}
            return (1.0 if score >= _FULL else score if self.partial else 0.0), metrics

        return OneStep(verdict)

    def examples(self, task: Task) -> tuple[Turn, Sequence[Turn]]:
        """See Env. Some tasks of the package have many right answers and name none: there is nothing to try."""
        entry = task.info["entry"]
        answer = entry["answer"]
        if not isinstance(answer, str) or not answer.strip():
            return final(""), ()
        texts = ["", "nan", "0 or 1", "nonsense", entry["question"], f"{answer} {entry['question']}"]
        if (other := task.info["other"]) and other.casefold() != answer.casefold():
            texts += [f"{answer} or {other}", f"{other} or {answer}", f"{answer}\n{other}"]
        cut = Turn(final(answer).messages, None)
        return final(answer), [*(final(text) for text in texts if text.strip() != answer.strip()), cut]

    def _task(self, entry: dict[str, Any], other: str | None) -> Task:
        """`other` is the answer to another entry: for `examples`."""
        row: dict[str, Any] = {"messages": [{"role": "user", "content": entry["question"]}]}
        if self.instruction:
            row["developer"] = self.instruction
        return Task(row, {"entry": entry, "other": other}, entry["question"][:200])

    def _score(self, answer: str, entry: Mapping[str, Any]) -> tuple[float, bool]:
        """What an answer scores, 0 to 1, and whether the scorer failed at it."""
        if self.task in CHECKS:
            return float(CHECKS[self.task](answer, entry)), False
        if not is_one_answer(answer, entry["answer"]) or (self.task in FORMULAS and not is_formula(answer, entry)):
            return 0.0, False
        assert self.jail is not None
        packed = base64.b64encode(pickle.dumps(dict(entry))).decode()  # as JSON, tuples and fractions would change
        with self.jail.open(_SCORE, _LIMITS) as program:
            outcome = program.call("score", answer, packed)
        score = outcome.value
        if outcome.failure is not None or not isinstance(score, float):
            return 0.0, True
        return min(max(score, 0.0), 1.0), False


def make(
    *,
    jails: Jails,
    task: str = "",
    instruction: str = "Reply with the answer alone, in the form that the question asks for.",
    partial: bool = False,
    **config: Any,
) -> ReasoningGym:
    """A task of reasoning-gym by its name there; all other options are the package's own for that task.

    Raises MissingExtraError; RecipeError for a task, an option or a value that the package doesn't know; JailError
    """
    if find_spec("reasoning_gym") is None:
        raise MissingExtraError("env.reasoning_gym: needs reasoning-gym: pip install 'ossia[rl-envs]'")
    known = _registry(importlib.import_module("reasoning_gym.factory"))
    if task not in known:
        meant = nearest(task, known)
        guess = f"; did you mean `{meant}`?" if meant else ""
        allowed = ", ".join(sorted(known))
        raise RecipeError(f"env.reasoning_gym: `task` is {task!r}, which it hasn't{guess}\n  allowed: {allowed}")
    for option, value, kind in (("instruction", instruction, str), ("partial", partial, bool)):
        if not isinstance(value, kind):
            raise RecipeError(f"env.reasoning_gym: `{option}` is {value!r}; expected: {kind.__name__}")
    options = [field.name for field in fields(known[task]) if field.name not in ("seed", "size")]
    for option in config:
        if option not in options:
            meant = nearest(option, [*options, *_OURS[1:]])
            guess = f"; did you mean `{meant}`?" if meant else ""
            raise RecipeError(
                f"env.reasoning_gym: unknown option `{option}` of task {task}{guess}\n  allowed: {', '.join(options)}"
            )
    _try(task, config)
    if task in CHECKS:
        return ReasoningGym(task, config, instruction, partial, None)
    warm = _WARM.format(task=task, config=json.dumps(config), size=_CHUNK)
    if task in FORMULAS:
        warm = SYMPY + warm
    return ReasoningGym(task, config, instruction, partial, jails.get("compute", preload=("reasoning_gym",), warm=warm))


def _registry(factory: ModuleType) -> dict[str, type]:
    """Each task's config; `composite` is several tasks at once, which a recipe says by several environments."""
    return {name: config for name, (_, config) in factory.DATASETS.items() if name != "composite"}


def _try(task: str, config: Mapping[str, Any]) -> None:
    """Raise RecipeError where the package can't make the task's first entry."""
    gym = importlib.import_module("reasoning_gym")
    try:
        gym.create_dataset(task, **config, seed=0, size=_CHUNK)[0]
    except (AssertionError, ValueError, TypeError, KeyError, IndexError) as error:
        raise RecipeError(
            f"env.reasoning_gym: task {task} can't be made with {dict(config)}: {type(error).__name__}: {error}"
        ) from error
