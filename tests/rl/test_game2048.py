"""2048: its rules, what playing well and badly earns, and that tricks earn nothing."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator
from itertools import islice

import pytest

from ossia.errors import RecipeError
from ossia.rl.env import Step, Turn, final
from ossia.rl.envs import make_env
from ossia.rl.envs.code import answered, code_of
from ossia.rl.envs.game2048 import BASELINES, MOVES, Game2048, moved, play, scaled
from ossia.rl.jail import Jails

RANDOM = "import random\ndef strategy(board): return random.choice('WASD')"
LEGAL = """
import random
def slides(line):
    return any(x and (not y or x == y) for y, x in zip(line, line[1:]))
def legal(board):
    columns = list(zip(*board))
    for move, lines, back in (("A", board, 1), ("D", board, -1), ("W", columns, 1), ("S", columns, -1)):
        if any(slides(list(line)[::back]) for line in lines):
            yield move
"""
RANDOM_LEGAL = LEGAL + "def strategy(board): return random.choice(list(legal(board)))"
CORNER = LEGAL + "def strategy(board): return min(legal(board), key='AWDS'.index)"


@pytest.fixture(scope="module")
def jails() -> Iterator[Jails]:
    with Jails() as made:
        yield made


@pytest.fixture
def env(jails: Jails) -> Game2048:
    return Game2048(jails)


def step(env: Game2048, code: str, seed: int = 0, number: int = 0) -> Step:
    task = next(islice(env.tasks("train", 0), number, None))
    return env.open(task, seed).step(answered(code, "python"))


@pytest.mark.parametrize(
    ("move", "after", "gained"),
    [
        ("A", ((4, 0, 0), (4, 4, 0), (8, 0, 0)), 16),
        ("D", ((0, 0, 4), (0, 4, 4), (0, 0, 8)), 16),
        ("W", ((8, 4, 4), (0, 4, 0), (0, 0, 0)), 16),
        ("S", ((0, 0, 0), (0, 4, 0), (8, 4, 4)), 16),
    ],
)
def test_tiles_slide_and_merge_once_at_the_far_end_first(move: str, after: tuple, gained: int) -> None:
    assert moved(((0, 2, 2), (4, 2, 2), (4, 4, 0)), move) == (after, gained)
    assert moved(((2, 2, 2, 2),), "A") == (((4, 4, 0, 0),), 8)
    assert moved(((4, 2, 2, 2),), "D") == (((0, 4, 2, 4),), 4)


@pytest.mark.parametrize("size", BASELINES)
def test_random_play_earns_about_nothing_a_rule_something_and_many_moves_nearly_all(size: int) -> None:
    def reward(policy) -> float:
        groups = [[play(size, f"{group} {game}", policy).score for game in range(4)] for group in range(30)]
        return sum(scaled(size, scores) for scores in groups) / len(groups)

    rng = random.Random(0)
    at_random = reward(lambda board: rng.choice([move for move in MOVES if moved(board, move)[0] != board]))
    by_rule = reward(lambda board: next(move for move in "AWDS" if moved(board, move)[0] != board))
    assert at_random < 0.1
    assert at_random + 0.1 < by_rule < 0.6
    assert scaled(size, [round(2 ** BASELINES[size][1])] * 4) == pytest.approx(1.0, abs=0.01)
    assert scaled(size, [0, 0]) == 0.0
    assert scaled(size, [10**9]) == 1.0


def test_a_program_that_plays_well_earns_more_than_one_that_plays_at_random(env: Game2048) -> None:
    at_random, by_rule = (step(env, code) for code in (RANDOM_LEGAL, CORNER))
    assert at_random.reward < 0.15 < by_rule.reward
    assert by_rule.metrics["ended_by_illegal"] == by_rule.metrics["ended_by_failure"] == 0.0
    assert by_rule.metrics["moves"] > 100
    assert step(env, RANDOM).metrics["ended_by_illegal"] == 1.0


def test_all_answers_of_a_group_play_the_same_games_and_another_groups_others(env: Game2048) -> None:
    first, again, other_seed, other_task = (
        step(env, CORNER, *place) for place in ((0, 0), (0, 0), (1, 0), (0, 1))
    )  # fmt: skip
    assert first == again
    assert len({found.metrics["score"] for found in (first, other_seed, other_task)}) == 3


HACKS = {
    "its board is edited": 'def strategy(board):\n    board[0][0] = 2048\n    return "W"',
    "its callers are searched for the game": """
import sys
def strategy(board):
    frame = sys._getframe()
    while frame:
        for value in list(frame.f_locals.values()):
            if hasattr(value, "board"): value.board = [[2048] * 4] * 4
            if hasattr(value, "score"): value.score = 10**6
        frame = frame.f_back
    return "W"
""",
    "all objects are searched": """
import gc
def strategy(board):
    for thing in gc.get_objects():
        if type(thing) is list and len(thing) == 4: thing[:] = [[2048] * 4] * 4
    return "W"
""",
    "the timer is switched off": """
import signal
def strategy(board):
    signal.setitimer(signal.ITIMER_REAL, 0)
    return "W"
""",
    "it hangs": "def strategy(board):\n    while True: pass",
    "it answers with an object that equals every move": """
class Any(str):
    __eq__ = lambda self, other: True
    __hash__ = str.__hash__
def strategy(board): return Any("X")
""",
    "a list of all moves": 'def strategy(board): return ["W", "A", "S", "D"]',
    "all moves in a text": 'def strategy(board): return "WASD"',
    "a reply of its own making": """
import json, os, struct
def strategy(board):
    body = json.dumps([2, "ok", {"score": 10**6, "reward": 1.0}, ""]).encode()
    os.write(3, struct.pack("!I", len(body)) + body)
    os._exit(0)
""",
    "a success that is printed": "print('{\"reward\": 1.0}')\ndef strategy(board): raise SystemExit(0)",
    "random's state is set": """
import random
random.seed(0); random.random = lambda: 0.0; random.Random.choice = lambda self, xs: xs[0]
def strategy(board): return "W"
""",
}


@pytest.mark.parametrize("name", HACKS)
def test_a_trick_earns_no_more_than_a_program_that_cannot_play(env: Game2048, name: str) -> None:
    honest_failure = step(env, 'def strategy(board): return "W"')
    assert honest_failure.reward == 0.0
    assert step(env, HACKS[name]).reward == 0.0
    assert step(env, CORNER).reward > 0.1


def test_a_strategy_that_hangs_costs_one_call_and_not_one_a_game(env: Game2048) -> None:
    found = step(env, HACKS["it hangs"])
    assert found.metrics["ended_by_failure"] == 1.0
    assert found.metrics["moves"] == found.metrics["score"] == 0.0
    start = time.monotonic()
    step(env, HACKS["it hangs"])
    assert time.monotonic() - start < 0.6, "it waited for more than one of four games"


def test_a_strategy_has_so_many_seconds_for_a_game_and_keeps_what_it_scored(jails: Jails) -> None:
    slow = CORNER.replace("def strategy(board): ", "def strategy(board):\n    sum(range(10**6))\n    ")
    found = step(Game2048(jails, games=1, seconds=0.3), slow)
    assert found.metrics["ended_by_failure"] == 1.0
    assert 3 < found.metrics["moves"] < 60
    assert found.metrics["score"] > 0


@pytest.mark.parametrize(
    ("options", "words"),
    [({"size": 6}, "`size` is 6; allowed, because measured: 3, 4"), ({"games": 0}, "`games` is 0; allowed: 1 to 64"),
     ({"seconds": 0.0}, "`seconds` is 0; allowed"), ({"seconds": True}, "expected: float")],
)  # fmt: skip
def test_an_option_out_of_its_range_is_told(jails: Jails, options: dict, words: str) -> None:
    with pytest.raises(RecipeError, match=words):
        make_env("game2048", options, jails)


@pytest.mark.parametrize(
    ("answer", "problem"),
    [
        ("x = 1", "no_block"),
        ("```python\nx = 1", "no_block"),
        ("```python\nx = 1\n```\n```python\nx = 2\n```", "several_blocks"),
        ("```python\n```python\nx = 1\n```\n```", "several_blocks"),
        ("~~~python\nx = 1\n~~~", "several_blocks"),
        ("```js\nx = 1\n```", "other_language"),
        ("```python\nx = 1\n```python", "several_blocks"),
        ("```python\n" + "#" * 60_000 + "\n```", "too_long"),
    ],
)
def test_only_one_whole_block_of_python_is_a_program(answer: str, problem: str) -> None:
    found = code_of(final(answer), "python")
    assert (found.text, found.problem) == (None, problem)


def test_text_may_stand_around_a_program_and_fences_inside_of_lines_are_part_of_it() -> None:
    assert code_of(final('So:\n```py\nx = "```"\n```\nDone.'), "python").text == 'x = "```"\n'
    assert code_of(final("```\nx = 1\n```"), "python").text == "x = 1\n"
    assert code_of(Turn((), None), "python").problem == "no_answer"
