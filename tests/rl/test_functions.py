"""Reward functions in TRL's form."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from ossia import grpo
from ossia.config import HarmonyConfig, load_recipe, recipe_from_dict
from ossia.data.sources import open_rows
from ossia.data.tokenizer import open_vocabulary
from ossia.errors import DataError, RecipeError
from ossia.harmony import Renderer
from ossia.rl.env import Turn, final
from ossia.rl.functions import RewardFunctions
from ossia.rl.jail import Jails
from ossia.rl.tasks import NamedEnv, TaskStream, open_envs
from tests.conftest import MakeTiny
from tests.rl.test_grpo import Quiet, lines
from tests.shapes import LEAST

FUNCTIONS = """
def says_answer(completions, answer, **columns):
    return [float(text == want) for text, want in zip(completions, answer)]


def length(prompts, completions, **columns):
    return [-0.1 * len(text) for text in completions]


def of_code(completions, kind, **columns):
    return [1.0 if one == "code" else None for one in kind]
"""


def rows_file(folder: Path, rows: list[dict[str, Any]]) -> Path:
    file = folder / "prompts.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def env_of(folder: Path, rows: list[dict[str, Any]], *names: str) -> RewardFunctions:
    space: dict[str, Any] = {}
    exec(FUNCTIONS, space)
    return RewardFunctions([open_rows(str(rows_file(folder, rows)))], {name: space[name] for name in names})


def test_rewards_of_several_functions_add_up_and_each_is_a_part(tmp_path: Path) -> None:
    rows = [{"prompt": f"Say {n}", "answer": str(n)} for n in range(40)]
    env = env_of(tmp_path, rows, "says_answer", "length")
    task = next(env.tasks("train", 0))
    step = env.open(task, 0).step(final(task.info["columns"]["answer"], thinking="long thoughts"))
    digits = len(task.info["columns"]["answer"])
    assert step.metrics == {"says_answer": 1.0, "length": -0.1 * digits}
    assert step.reward == pytest.approx(1.0 - 0.1 * digits)
    assert env.open(task, 0).step(Turn((), None)).reward == 0.0  # no answer is an empty one


def test_a_prompt_of_messages_gets_its_completion_as_a_message(tmp_path: Path) -> None:
    seen: dict[str, Any] = {}

    def look(**columns: Any) -> list[float]:
        seen.update(columns)
        return [1.0]

    messages = [{"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "4"}]
    rows = open_rows(str(rows_file(tmp_path, [{"messages": messages, "level": n} for n in range(20)])))
    env = RewardFunctions([rows], {"look": look})
    env.open(next(env.tasks("train", 0)), 0).step(final("5"))
    assert seen["prompts"] == [messages[:1]]
    assert seen["completions"] == [[{"role": "assistant", "content": "5"}]]
    assert set(seen) == {"prompts", "completions", "completion_ids", "level"}


def test_a_function_may_not_apply_to_a_row(tmp_path: Path) -> None:
    env = env_of(tmp_path, [{"prompt": str(n), "kind": "text", "answer": "x"} for n in range(20)], "of_code", "length")
    assert env.open(next(env.tasks("train", 0)), 0).step(final("ab")).metrics == {"length": -0.2}


def test_a_function_gets_the_sampled_ids_if_it_takes_them_and_may_be_async(tmp_path: Path) -> None:
    async def later(completions: list[str], **columns: Any) -> list[float]:
        return [float(len(completions))]

    def lengths(prompts: Any, completions: Any, completion_ids: list[list[int]], answer: Any) -> list[float]:
        return [float(len(ids)) for ids in completion_ids]

    def strict(prompts: Any, completions: Any, answer: Any) -> list[float]:
        return [0.25]

    rows = open_rows(str(rows_file(tmp_path, [{"prompt": str(n), "answer": "x"} for n in range(20)])))
    env = RewardFunctions([rows], {"later": later, "lengths": lengths, "strict": strict})
    turn = replace(final("ab"), ids=(1, 2, 3))
    step = env.open(next(env.tasks("train", 0)), 0).step(turn)
    assert step.metrics == {"later": 1.0, "lengths": 3.0, "strict": 0.25}


def test_a_function_that_the_rows_can_not_call_is_told_before_anything_is_sampled(tmp_path: Path) -> None:
    rows = open_rows(str(rows_file(tmp_path, [{"prompt": "?", "answer": "x"}])))

    def other(completions: Any, solution: Any, **columns: Any) -> list[float]:
        return [0.0]

    def closed(prompts: Any, completions: Any) -> list[float]:
        return [0.0]

    with pytest.raises(RecipeError, match=r"`other` can't be called .*'solution'\n  given.*: .*completion_ids, answer"):
        RewardFunctions([rows], {"other": other})
    with pytest.raises(RecipeError, match=r"`closed` can.t be called .*answer"):
        RewardFunctions([rows], {"closed": closed})
    with pytest.raises(RecipeError, match="`three` is 3; expected: a function"):
        RewardFunctions([rows], {"three": 3})  # type: ignore[dict-item]


def test_two_functions_of_one_name_are_refused_and_a_broken_file_is_told(tmp_path: Path) -> None:
    rows_file(tmp_path, [{"prompt": "?", "answer": "x"}])
    for name in ("a.py", "b.py"):
        (tmp_path / name).write_text(FUNCTIONS)
    (tmp_path / "broken.py").write_text("import no_such_thing\n")
    base = {"method": "grpo", "model": "m", "adapter": {"rank": 2}, "data": str(tmp_path / "prompts.jsonl")}

    def envs(*references: str) -> None:
        recipe = recipe_from_dict({**base, "reward": list(references), "train": {"steps": 1}})
        open_envs(recipe, Jails())

    with pytest.raises(RecipeError, match="two functions are called `length`"):
        envs(f"{tmp_path}/a.py:length", f"{tmp_path}/b.py:length")
    with pytest.raises(RecipeError, match=r"broken.py can't be loaded: ModuleNotFoundError.*\(broken.py:1\)"):
        envs(f"{tmp_path}/broken.py:f")


def test_every_row_is_trained_or_held_out_and_none_is_both(tmp_path: Path) -> None:
    env = env_of(tmp_path, [{"prompt": f"p{n}", "answer": "x"} for n in range(200)], "length")
    trained, held_out = ([task.name for task in env.tasks(split, 3)] for split in ("train", "eval"))
    assert len({*trained, *held_out}) == len(trained) + len(held_out) == 200
    assert held_out


def test_rows_too_few_to_hold_one_out_are_told_with_the_way_out(tiny: MakeTiny, tmp_path: Path) -> None:
    env = env_of(tmp_path, [{"prompt": "Say 1", "answer": "1"}], "length")
    (split,) = [split for split in ("train", "eval") if not list(env.tasks(split, 0))]
    vocab = open_vocabulary(str(tiny(LEAST)))
    stream = TaskStream([NamedEnv("reward", env, 1.0)], split, 0, Renderer(vocab), HarmonyConfig(), 200)
    with pytest.raises(DataError, match=r"none or all may be held out\n  next: give it more") as told:
        stream.take(1)
    assert ("set rl.eval_tasks to 0" in str(told.value)) is (split == "eval")


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"question": "?"}, "no prompt"),
        ({"prompt": 3}, "neither text nor a list"),
        ({"prompt": [{"role": "system", "content": "s"}]}, "no message of the user's"),
    ],
)
def test_a_row_without_a_prompt_is_told_with_its_line(tmp_path: Path, row: dict[str, Any], words: str) -> None:
    env = env_of(tmp_path, [row], "length")
    with pytest.raises(DataError, match=rf"prompts.jsonl:1: .*{words}"):
        _ = [*env.tasks("train", 0), *env.tasks("eval", 0)]


def test_a_recipe_trains_from_functions_of_a_file(tiny: MakeTiny, tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(FUNCTIONS)
    data = rows_file(tmp_path, [{"prompt": f"Say {n}", "answer": str(n)} for n in range(40)])
    recipe = recipe_from_dict(
        {
            "method": "grpo",
            "model": str(tiny(LEAST)),
            "dtype": "float32",
            "device": "cpu",
            "adapter": {"rank": 2},
            "data": str(data),
            "reward": [f"{tmp_path / 'mine.py'}:says_answer", f"{tmp_path / 'mine.py'}:length"],
            "max_length": 256,
            "rl": {"prompts": 2, "group": 2, "max_new": 8, "eval_tasks": 2},
            "train": {"steps": 2, "tokens_per_step": 512},
            "output": str(tmp_path / "run"),
        }
    )
    grpo.run(recipe, sink=Quiet())
    steps = [event for event in lines(tmp_path / "run" / "events.jsonl") if event["event"] == "step"]
    assert all({"part_says_answer", "part_length"} <= set(step) for step in steps)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"env": "sort"}, "`env` and `reward` are both given"),
        ({"data": None}, "`data` is missing: the prompts that `reward` judges"),
        ({"reward": None}, "needs `env`, or `reward` with `data`"),
        ({"reward": "mine.py"}, "`reward"),
        ({"train": {}}, "`train.steps` is missing"),
        ({"rl": {"kl": 0.1}, "adapter": None}, "`rl.kl` needs an `adapter`"),
        ({"rl": {"max_new": 4096}}, "`rl.max_new` is 4096; it has to be below `max_length`"),
        ({"rl": {"group": 1}}, "`rl.group` is 1"),
        ({"rl": {"async": 1}}, "`rl.async` needs a server in `rl.rollout`"),
        ({"rl": {"async": 1, "rollout": "http://a", "mismatch": "none"}}, "`rl.async` needs a correction"),
        ({"rl": {"async": 2}}, "`rl.async` is 2"),
        ({"rl": {"asynchronous": 1}}, "unknown key `rl.asynchronous`"),
        ({"method": "sft"}, "`reward` is for `method: grpo`"),
    ],
)
def test_a_recipe_that_can_not_be_is_told(changes: dict[str, Any], words: str, tmp_path: Path) -> None:
    given = {"method": "grpo", "model": "m", "data": "a.jsonl", "reward": "mine.py:f", "adapter": {"rank": 2}}
    merged = {**given, "train": {"steps": 3}, **changes}
    file = tmp_path / "r.yaml"
    file.write_text(json.dumps({key: value for key, value in merged.items() if value is not None}))
    with pytest.raises(RecipeError, match=words.replace("`", "`")):
        load_recipe(file)
