"""2048: the model writes `strategy(board)`, and the reward is how well that plays, over several secret games.

The game is played here, in the parent; the program gets plain rows and answers with a letter, so there is no board in
its reach but copies, and no random state at all. The score's logarithm is scaled between that of random play (0) and
that of an expectimax search (1), as `benchmarks/game2048.py` measured them: BASELINES. The score and not the largest
tile, because it tells players apart better: from random play to the rule "left, up, right, down" its logarithm rises by
1.35 times its spread from game to game on the usual board, the tile's by 0.94 times.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from ossia.errors import RecipeError
from ossia.rl.env import OneStep, Split, Task, Turn
from ossia.rl.envs.code import answered, code_of, seeded, unusable
from ossia.rl.envs.options import check_range
from ossia.rl.jail import Jail, Jails, Limits

Row = tuple[int, ...]
Board = tuple[Row, ...]

MOVES = "WASD"
MOST_MOVES = 1000  # of one game
# log2(1 + score) after at most MOST_MOVES moves, by the side of the board: (random play, expectimax).
# Mean of 1,000 and of 40 games: python -m benchmarks.game2048, benchmarks/results/game2048.json
BASELINES = {3: (7.25, 11.41), 4: (9.97, 14.18)}
_CALL_S = 0.2
_MEMORY_BYTES = 128 << 20

_PROMPT = """\
Write a Python function `strategy(board)` that plays the game 2048 on a board of {size} by {size}.

`board` is a list of {size} rows of {size} whole numbers, 0 where a cell is empty. The function returns the next move \
as a text: "W" (up), "A" (left), "S" (down) or "D" (right). After each move a new tile, 2 or sometimes 4, appears in \
an empty cell. It is called once for every move of a game; a game ends when no move is left, after {most} moves, or at \
once when the function returns anything else, a move that changes nothing on the board, raises an error or takes too \
long ({seconds:g} s of CPU for a whole game). The higher the score at the end, the better; several games are played.

The standard library can be imported; files and the network can't be reached. Answer with one block of Python code, \
```python ... ```, that defines the function."""

_GOOD = """
def slide(row):
    tiles = [x for x in row if x]
    out, gained, i = [], 0, 0
    while i < len(tiles):
        if i + 1 < len(tiles) and tiles[i] == tiles[i + 1]:
            out.append(2 * tiles[i]); gained += 2 * tiles[i]; i += 2
        else:
            out.append(tiles[i]); i += 1
    return out + [0] * (len(row) - len(out)), gained

def moved(board, move):
    if move in "WS":
        board = [list(column) for column in zip(*board)]
    rows = [slide(row[::-1] if move in "SD" else row) for row in board]
    after = [row[::-1] if move in "SD" else row for row, _ in rows]
    if move in "WS":
        after = [list(row) for row in zip(*after)]
    return after, sum(gained for _, gained in rows)

def value(board):
    n = len(board)
    rows = [row if r % 2 == 0 else row[::-1] for r, row in enumerate(board)]
    snake = [x for row in rows for x in row]
    return sum(x * 0.5 ** i for i, x in enumerate(snake)) + 4 * snake.count(0)

def strategy(board):
    best, choice = None, "W"
    for move in "WADS":
        after, gained = moved(board, move)
        if after != board:
            worth = value(after) + gained
            if best is None or worth > best:
                best, choice = worth, move
    return choice
"""


@lru_cache(maxsize=1 << 16)
def slid(row: Row) -> tuple[Row, int]:
    """A row after its tiles slid to the left, each merged at most once, and what the merges score."""
    tiles, gained = [tile for tile in row if tile], 0
    for place in range(len(tiles) - 1):
        if tiles[place] and tiles[place] == tiles[place + 1]:
            tiles[place], tiles[place + 1] = 2 * tiles[place], 0
            gained += tiles[place]
    kept = [tile for tile in tiles if tile]
    return (*kept, *(0,) * (len(row) - len(kept))), gained


def moved(board: Board, move: str) -> tuple[Board, int]:
    """The board after a move (W, A, S or D) and before a tile appears, and what it scores."""
    lines = board if move in "AD" else tuple(zip(*board, strict=True))
    if move in "SD":
        lines = tuple(line[::-1] for line in lines)
    found = [slid(line) for line in lines]
    after = tuple(line[::-1] if move in "SD" else line for line, _ in found)
    return after if move in "AD" else tuple(zip(*after, strict=True)), sum(gained for _, gained in found)


def with_tile(board: Board, rng: random.Random) -> Board:
    """The board with a new tile in an empty cell: 2, or with a chance of one in ten 4."""
    empty = [(r, c) for r, row in enumerate(board) for c, tile in enumerate(row) if not tile]
    row, column = rng.choice(empty)
    tile = 4 if rng.random() < 0.1 else 2
    return tuple(
        (*line[:column], tile, *line[column + 1 :]) if number == row else line for number, line in enumerate(board)
    )


@dataclass(frozen=True, slots=True)
class Played:
    """A game that is over: its score, largest tile, moves, and why it ended (over, cap, illegal, failed)."""

    score: int
    largest: int
    moves: int
    end: str


def play(size: int, seed: int | str, choose: Callable[[Board], Any], most_moves: int = MOST_MOVES) -> Played:
    """Play one game. `choose` gives a move for a board, None where it has failed; a move that isn't legal ends it."""
    rng = random.Random(seed)
    board: Board = ((0,) * size,) * size
    board = with_tile(with_tile(board, rng), rng)
    score, moves, end = 0, 0, "over"
    while any(moved(board, move)[0] != board for move in MOVES):
        if moves == most_moves:
            end = "cap"
            break
        move = choose(board)
        if type(move) is not str or move not in ("W", "A", "S", "D"):
            end = "failed" if move is None else "illegal"
            break
        after, gained = moved(board, move)
        if after == board:
            end = "illegal"
            break
        board, score, moves = with_tile(after, rng), score + gained, moves + 1
    return Played(score, max(max(row) for row in board), moves, end)


def scaled(size: int, scores: Sequence[int]) -> float:
    """The mean of the scores' logarithms between random play (0) and expectimax (1), kept in [0, 1]."""
    low, high = BASELINES[size]
    mean = sum(math.log2(1 + score) for score in scores) / len(scores)
    return min(1.0, max(0.0, (mean - low) / (high - low)))


@dataclass(frozen=True, slots=True)
class Game2048:
    """Strategies for 2048.

    jails    where they run
    size     of the board's side: one that baselines were measured for
    games    played for each answer; all answers to a task in a step play the same ones
    seconds  of CPU that a strategy may use in one game
    """

    jails: Jails
    size: int = 4
    games: int = 4
    seconds: float = 2.0

    def __post_init__(self) -> None:
        if self.size not in BASELINES:
            allowed = ", ".join(map(str, BASELINES))
            raise RecipeError(f"env.game2048: `size` is {self.size}; allowed, because measured: {allowed}")
        check_range("game2048", "games", self.games, 1, 64)
        check_range("game2048", "seconds", self.seconds, 0.1, 60)
        self.jails.get("compute")

    def tasks(self, split: Split, seed: int) -> Iterator[Task]:
        """See Env. One question; the tasks differ by their games."""
        question = _PROMPT.format(size=self.size, most=MOST_MOVES, seconds=self.seconds)
        return seeded(question, f"2048 {self.size}x{self.size}, games", split, seed)

    def open(self, task: Task, seed: int) -> OneStep:
        """See Env."""
        jail = self.jails.get("compute")

        def verdict(turn: Turn) -> tuple[float, dict[str, float]]:
            code = code_of(turn, "python")
            if code.text is None:
                return 0.0, dict(code.metrics())
            played = []
            for number in range(self.games):
                played.append(self._game(jail, code.text, f"{task.info['seed']} {seed} {number}"))
                if played[-1].moves == 0:  # it can't play: no use in waiting for it again
                    played += [Played(0, 0, 0, "failed")] * (self.games - len(played))
                    break
            return scaled(self.size, [game.score for game in played]), {**code.metrics(), **_figures(played)}

        return OneStep(verdict)

    def examples(self, task: Task) -> tuple[Turn, Sequence[Turn]]:
        """See Env."""
        cheat = 'def strategy(board):\n    board[0][0] = 2048\n    return "W"'
        wrong = [answered(cheat, "python"), answered("def strategy(board):\n    return 7", "python")]
        return answered(_GOOD, "python"), [*wrong, *unusable(_GOOD, "python")]

    def _game(self, jail: Jail, code: str, seed: str) -> Played:
        """One game in a program of its own."""
        limits = Limits(cpu_s=_CALL_S, wall_s=5 * _CALL_S, total_s=self.seconds, memory_bytes=_MEMORY_BYTES)
        with jail.open(code, limits) as program:

            def choose(board: Board) -> Any:
                outcome = program.call("strategy", [list(row) for row in board])
                return None if outcome.failure is not None else outcome.value if outcome.value is not None else ""

            return play(self.size, seed, choose)


def _figures(played: Sequence[Played]) -> dict[str, float]:
    def mean(values: Sequence[float]) -> float:
        return sum(values) / len(values)

    return {
        "score": mean([game.score for game in played]),
        "largest_tile": mean([game.largest for game in played]),
        "moves": mean([game.moves for game in played]),
        "ended_by_illegal": mean([float(game.end == "illegal") for game in played]),
        "ended_by_failure": mean([float(game.end == "failed") for game in played]),
    }
