"""The shipped environments, and how they are named."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from contextlib import closing
from dataclasses import fields
from itertools import islice
from pathlib import Path

import pytest

from ossia.errors import RecipeError, RewardError
from ossia.harmony import Message
from ossia.rl.env import Env, OneStep, Split, Task, Turn, final, validate
from ossia.rl.envs import ENVS, make_env
from ossia.rl.envs.squares import Squares
from ossia.rl.jail import Jails, probe_level

EXACT = ("sort", "reverse", "add", "count", "tool_python")  # one right text, worth 1
NEEDS_TOOLS = pytest.mark.skipif(bool(probe_level("tools")), reason="this machine can't give the jail's level tools")
CODE = ("game2048", "matmul", pytest.param("kernel_c", marks=NEEDS_TOOLS))  # a program, worth how well it does


@pytest.fixture(scope="module")
def jails() -> Iterator[Jails]:
    with Jails() as made:
        yield made


def reward_of(env: Env, task: Task, turn: Turn) -> float:
    with closing(env.open(task, 0)) as episode:
        return episode.step(turn).reward


@pytest.mark.parametrize("name", EXACT)
def test_the_right_answer_earns_everything_and_corrupted_ones_less(name: str, jails: Jails) -> None:
    env = make_env(name, {}, jails)
    for task in islice(env.tasks("train", 0), 50):
        right, wrong = env.examples(task)
        assert reward_of(env, task, right) == 1.0
        assert max(reward_of(env, task, turn) for turn in wrong) == 0.0


@pytest.mark.parametrize("name", CODE)
def test_the_right_program_earns_something_and_corrupted_ones_nothing(name: str, jails: Jails) -> None:
    env = make_env(name, {}, jails)
    task = next(env.tasks("train", 0))
    right, wrong = env.examples(task)
    assert 0.0 < reward_of(env, task, right) <= 1.0
    assert [reward_of(env, task, turn) for turn in wrong] == [0.0] * len(wrong)


@pytest.mark.parametrize("name", [*EXACT, *CODE])
def test_tasks_are_the_seeds_and_held_out_ones_are_never_trained(name: str, jails: Jails) -> None:
    env = make_env(name, {}, jails)

    def problems(split: Split, seed: int) -> list[str]:
        return [task.name for task in islice(env.tasks(split, seed), 300)]

    assert problems("train", 1) == problems("train", 1) != problems("train", 2)
    assert not set(problems("train", 1)) & set(problems("eval", 1))


def test_a_held_out_set_of_digits_is_not_trained_in_another_order() -> None:
    env = make_env("sort", {}, Jails())
    trained, held_out = (
        {task.info["answer"] for task in islice(env.tasks(split, 0), 2000)} for split in ("train", "eval")
    )
    assert len(trained) > 100
    assert not trained & held_out


@pytest.mark.parametrize("name", [*EXACT, *CODE])
def test_only_one_final_message_that_ends_the_turn_is_an_answer(name: str, jails: Jails) -> None:
    env = make_env(name, {}, jails)
    task = next(env.tasks("train", 0))
    right = env.examples(task)[0].messages[-1].content
    said = Message("assistant", right, channel="final")
    call = Message("assistant", "{}", channel="commentary", recipient="functions.f")
    for turn in (
        Turn((said, said), "<|return|>"),
        Turn((said, call), "<|call|>"),
        Turn((call, said), "<|return|>"),
        Turn((Message("assistant", right, channel="analysis"),), "<|return|>"),
        Turn((said,), None),
        Turn((said,), "<|return|>", ("a special token inside a message",)),
    ):
        assert reward_of(env, task, turn) == 0.0
    assert reward_of(env, task, final(right, thinking="So.")) > 0.0


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("srot", {}, "no environment `srot`; did you mean `sort`?"),
        ("sort", {"m": 3}, "unknown option `m`"),
        ("sort", {"n": "6"}, "`n` is '6'; expected: int"),
        ("sort", {"n": 10}, "`n` is 10; allowed: 2 to 9"),
        ("math", {"answer": "solution"}, "`options.data` is missing"),
        ("nowhere.py:make", {}, "nowhere.py is no file"),
        ("math:no_such_thing", {}, "math has no `no_such_thing`"),
        ("no_such_module:make", {}, "no_such_module can't be imported"),
    ],
)
def test_a_wrong_name_or_option_is_told_with_what_is_allowed(
    name: str, options: dict, words: str, jails: Jails
) -> None:
    with pytest.raises(RecipeError, match=words.replace("?", r"\?")):
        make_env(name, options, jails)


def test_an_environment_of_ones_own_is_named_by_its_file(tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text("from ossia.rl.envs.procedural import Sort\n\n\ndef make(n):\n    return Sort(n)\n")
    assert make_env(f"{file}:make", {"n": 3}, Jails()) == make_env("sort", {"n": 3}, Jails())
    with pytest.raises(RecipeError, match="can't be made with"):
        make_env(f"{file}:make", {"k": 3}, Jails())


def test_an_environment_of_ones_own_that_runs_code_is_given_the_jails(tmp_path: Path, jails: Jails) -> None:
    file = tmp_path / "mine.py"
    file.write_text(
        "from ossia.rl.envs.squares import Squares\ndef make(n, jails):\n    return Squares(jails, calls=n)\n"
    )
    env = make_env(f"{file}:make", {"n": 3}, jails)
    assert isinstance(env, Squares)
    assert (env.calls, env.jails) == (3, jails)


class Generous:
    """Pays for any answer."""

    def tasks(self, split: Split, seed: int) -> Iterator[Task]:
        yield Task({"messages": [{"role": "user", "content": "2 + 2"}]}, {}, "sum")

    def open(self, task: Task, seed: int) -> OneStep:
        return OneStep(lambda turn: (float(turn.answer() is not None), {}))

    def examples(self, task: Task) -> tuple[Turn, list[Turn]]:
        return final("4"), [final("5")]


def test_an_environment_that_pays_for_a_corrupted_answer_is_found_out(jails: Jails) -> None:
    assert validate(make_env("sort", {}, jails), "sort", seed=0, most=5) == 5
    with pytest.raises(RewardError, match="task 'sum': a corrupted answer earns 1, the right one 1\n  found: '5'"):
        validate(Generous(), "generous", seed=0, most=3)


@pytest.mark.parametrize("name", ENVS)
def test_every_environment_and_option_stands_on_the_page_with_its_default(name: str) -> None:
    page = (Path(__file__).parents[2] / "docs" / "environments.md").read_text(encoding="utf-8")
    sections = [section for section in page.split("\n## ") if re.search(rf"\b{name}\b", section.splitlines()[0])]
    (section,) = sections
    assert f"`{name}`" in page
    maker = ENVS[name]
    if name == "reasoning_gym":
        options = {option: one.default for option, one in inspect.signature(maker).parameters.items()}
        del options["jails"], options["config"]
    else:
        options = {one.name: one.default for one in fields(maker) if one.init and one.name != "jails"}
    for option, default in options.items():
        short = isinstance(default, (int, float)) and not isinstance(default, bool)
        assert (f"`{option}` ({default})" if short else f"`{option}") in section, option
