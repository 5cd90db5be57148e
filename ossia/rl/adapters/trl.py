"""Our environments in TRL: rows for its `train_dataset`, and the reward function for them.

```text
tasks = list(islice(env.tasks("train", 0), 1000))
GRPOTrainer(..., train_dataset=Dataset.from_list(rows_of(tasks)), reward_funcs=as_reward_func(env, tasks))
```
The other direction, functions of TRL's in a recipe, is `reward:` (`ossia/rl/functions.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from ossia.errors import RewardError
from ossia.harmony.vocab import Vocabulary
from ossia.rl.env import Env, Task, Turn, final
from ossia.rl.rollout import parse_turn

RewardFunc = Callable[..., list[float]]


def rows_of(tasks: Sequence[Task]) -> list[dict[str, Any]]:
    """A row for each task, `prompt` and `task`: its messages, the developer's first, and its place among the tasks."""
    rows = []
    for number, task in enumerate(tasks):
        developer = task.row.get("developer")
        before = [{"role": "developer", "content": developer}] if developer else []
        rows.append({"prompt": [*before, *task.row["messages"]], "task": number})
    return rows


def as_reward_func(env: Env, tasks: Sequence[Task], vocab: Vocabulary | None = None) -> RewardFunc:
    """What TRL calls with the completions of some rows: each is judged in an episode of its own.

    tasks    those that `rows_of` made the rows of
    vocab    of gpt-oss: a completion is then read from the ids that were sampled, as in a run of ours, and only an
             answer in the final channel counts; without it, a completion's text is the answer
    Returns  `f(completions, task, completion_ids=None, **columns) -> rewards`, named after the environment's class
    Raises   RewardError (the function) for an environment of several turns, which TRL wants in another form
    """

    def reward(
        completions: Sequence[Any], task: Sequence[int], completion_ids: Sequence[Sequence[int]] | None = None, **_: Any
    ) -> list[float]:
        if vocab is None:
            turns = [final(one if isinstance(one, str) else one[-1]["content"]) for one in completions]
        else:
            assert completion_ids is not None, "TRL gives the ids of its completions"
            turns = [parse_turn(vocab, ids) for ids in completion_ids]
        return [_judged(env, tasks[number], turn) for number, turn in zip(task, turns, strict=True)]

    reward.__name__ = type(env).__name__
    return reward


def _judged(env: Env, task: Task, turn: Turn) -> float:
    episode = env.open(task, 0)
    try:
        step = episode.step(turn)
    finally:
        episode.close()
    if not (step.terminated or step.truncated):
        raise RewardError(f"task {task.name!r} takes several turns; a reward function of TRL's judges one")
    return step.reward
