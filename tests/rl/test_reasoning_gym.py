"""Tasks of reasoning-gym: full marks for the answer, and nothing for what its own scorers pay for besides."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import pytest

from ossia.errors import RecipeError
from ossia.rl.env import Env, Task, final, validate
from ossia.rl.envs import make_env
from ossia.rl.envs.gym.checks import CHECKS, FORMULAS, countdown, expanded, is_formula, is_one_answer, puzzle24
from ossia.rl.jail import Jails

pytest.importorskip("reasoning_gym", reason="pip install 'ossia[rl-envs]'")
pytestmark = pytest.mark.filterwarnings("ignore")
JAILED = ("chain_sum", "gsm_symbolic", "complex_arithmetic", "simple_integration")
# Runs an answer through every scorer of the package, in this process, and prints which of them executed it.
EXECUTES = """
import os, sys, reasoning_gym
from reasoning_gym.factory import DATASETS
flag = sys.argv[1]
program = f"__import__('os').open({flag!r}, 65)"
for name in sorted(set(DATASETS) - {"composite"}):
    dataset = reasoning_gym.create_dataset(name, seed=1, size=10)
    for answer in (program, f"[{program}]", f"[[{program}]]"):
        try:
            dataset.score_answer(answer, dataset[0])
        except BaseException:
            pass
    if os.path.exists(flag):
        os.unlink(flag)
        print(name, file=sys.stderr)
"""


@pytest.fixture(scope="module")
def jails() -> Iterator[Jails]:
    with Jails() as made:
        yield made


def gym(jails: Jails, task: str, **options: object) -> Env:
    return make_env("reasoning_gym", {"task": task, **options}, jails)


def reward(env: Env, task: Task, text: str) -> float:
    return env.open(task, 0).step(final(text)).reward


@pytest.mark.parametrize("task", [*CHECKS, *JAILED])
def test_the_answer_earns_1_and_corrupted_ones_less(jails: Jails, task: str) -> None:
    env = gym(jails, task)
    assert validate(env, task, seed=0, most=5) == 5
    first = next(env.tasks("train", 0))
    right, _ = env.examples(first)
    assert env.open(first, 0).step(right).reward == 1.0


def test_the_scorers_that_execute_an_answer_are_those_we_keep_it_from(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", EXECUTES, str(tmp_path / "flag")], capture_output=True, text=True
    )
    executing = {line for line in done.stderr.split() if line.isidentifier()}
    assert len(executing) == 9, done.stderr[-2000:]
    assert executing <= {*CHECKS, *FORMULAS}


@pytest.mark.parametrize("task", ["countdown", "n_queens", *JAILED])
def test_an_answer_that_is_a_program_earns_nothing(jails: Jails, task: str) -> None:
    env = gym(jails, task)
    forged = "[__import__('os').write(3, b'1.0'), __import__('os')._exit(0)]"
    for problem in islice(env.tasks("train", 1), 2):
        assert reward(env, problem, forged) == reward(env, problem, f"0 if {forged} else 1") == 0.0
        right, _ = env.examples(problem)
        assert env.open(problem, 0).step(right).reward == 1.0


@pytest.mark.parametrize(
    ("task", "answers"),
    [
        ("game_of_life_halting", ["yes", "nonsense", "[]"]),
        ("complex_arithmetic", ["nan", "nan+nanj", "NaN"]),
        ("coin_flip", ["0", "0.0"]),
        ("gsm_symbolic", ["{} or 5", "{}, 5", "The answer is {} or so"]),
        ("spell_backward", ["{} or nus", "{}xyz"]),
        ("time_intervals", ["{}, 00:00", "{} or 1 day"]),
    ],
)
def test_what_the_packages_own_scorer_pays_for_earns_nothing(jails: Jails, task: str, answers: list[str]) -> None:
    env = gym(jails, task)
    for problem in islice(env.tasks("train", 3), 3):
        for answer in answers:
            assert reward(env, problem, answer.format(problem.info["entry"]["answer"])) == 0.0


def test_partial_scores_are_paid_only_where_they_are_asked_for(jails: Jails) -> None:
    partial = gym(jails, "sentence_reordering", partial=True)
    problem = next(partial.tasks("train", 0))
    words = problem.info["entry"]["answer"].split()
    half = " ".join([words[0], *reversed(words[1:])])
    assert 0.0 < reward(partial, problem, half) < 1.0
    assert reward(gym(jails, "sentence_reordering"), problem, half) == 0.0


def test_tasks_are_the_seeds_and_held_out_questions_are_never_trained(jails: Jails) -> None:
    env = gym(jails, "count_bits", max_n=500)  # few questions, so that both splits would meet
    trained, held_out = ([task.name for task in islice(env.tasks(split, 0), 300)] for split in ("train", "eval"))
    assert trained == [task.name for task in islice(env.tasks("train", 0), 300)]
    assert trained != [task.name for task in islice(env.tasks("train", 1), 300)]
    assert not set(trained) & set(held_out)


def test_integrals_are_read_only_as_formulas(jails: Jails) -> None:
    entry = {"metadata": {"variable": "x"}}
    for right in ("x**2/2 + C", "-3*sin(2*x) + exp(-x)*log(x)", "0.5*x", "(x + 1)**3/3"):
        assert is_formula(right, entry)
    for wrong in (
        "Integral(x, x)",
        "x.diff(x)",
        "y**2",
        "x if x else C",
        "lambda: x",
        "x[0]",
        "'x'",
        "__import__",
        "x_1",
    ):
        assert not is_formula(wrong, entry)
    env = gym(jails, "simple_integration")
    problem = next(env.tasks("train", 0))
    bomb = "9**9**9**9*x"
    assert reward(env, problem, bomb) == 0.0
    assert reward(env, problem, problem.info["entry"]["answer"]) == 1.0


def test_countdown_takes_the_numbers_once_each_and_works_them_out_exactly() -> None:
    entry = {"metadata": {"numbers": [2, 3, 4], "target": 14}}
    assert countdown("2 + 3*4", entry)
    assert countdown("(3 * 4) + 2", entry)
    for wrong in ("14", "2+3*4+0", "2+3*4*1", "2*7", "23-4-5", "2+3**4", "3*4+2 # x", "", "(", "2+3*4 or 1", "[14]"):
        assert not countdown(wrong, entry)
    assert not puzzle24("6*4*1*1", {"metadata": {"numbers": [6, 4, 2, 1]}})
    assert puzzle24("6*4*(2-1)", {"metadata": {"numbers": [6, 4, 2, 1]}})


def test_a_product_has_to_be_multiplied_out_and_collected() -> None:
    entry = {"answer": "x**2 + 3*x*y - 2"}
    for right in ("x**2 + 3*x*y - 2", "-2+3*y*x+x^2", "x*x + 3*x*y - 2"):
        assert expanded(right, entry)
    for wrong in (
        "(x)**2+3*x*y-2",
        "x**2+x*y+2*x*y-2",
        "x**2+x*y+3*x*y-2",
        "x**2+3*x*y",
        "x**2+3*x*y-2 or 1",
        "x**2++3*x*y-2",
        "",
    ):
        assert not expanded(wrong, entry)


def test_one_answer_is_told_by_the_references_shape() -> None:
    assert is_one_answer("17", "42")
    assert is_one_answer("anything at all", None)
    for answer, gold in (
        ("42 or 43", "42"),
        ("It is 42", "42"),
        ("nan", "1.5"),
        ("a b", "a"),
        ("nan", "a b c d"),
        ("(1, 2),(3", "(1, 2)"),
    ):
        assert not is_one_answer(answer, gold)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({}, "`task` is '', which it hasn't"),
        ({"task": "spell_backwards"}, "did you mean `spell_backward`"),
        ({"task": "chain_sum", "min_term": 3}, "unknown option `min_term` of task chain_sum; did you mean `min_terms`"),
        ({"task": "chain_sum", "min_terms": 9, "max_terms": 2}, "task chain_sum can't be made with"),
        ({"task": "chain_sum", "partial": "yes"}, "`partial` is 'yes'; expected: bool"),
    ],
)
def test_a_wrong_task_or_option_is_told(jails: Jails, options: dict, words: str) -> None:
    with pytest.raises(RecipeError, match=words):
        make_env("reasoning_gym", options, jails)
