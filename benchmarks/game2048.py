"""Question: what do random play, a simple rule and an expectimax search score in 2048, cut off as the environment does?

Run: python -m benchmarks.game2048      Needs: 1 core, 6 minutes      Answer quoted in: docs/environments.md

The first and the last are the 0 and the 1 of the reward: BASELINES of ossia/rl/envs/game2048.py. Games are played by
that file's own `play`, over seeds that no task has. The search looks at a move, every tile that may follow and a move
after that (deeper where few cells are empty), and values a board by its rows and columns: empty cells, neighbours that
can merge, tiles in falling order, and large tiles that don't stand at the end of a line.
"""

from __future__ import annotations

import argparse
import math
import random
import sys
import time
from collections.abc import Callable
from functools import lru_cache
from itertools import pairwise
from statistics import mean, stdev
from typing import Any

from benchmarks.common import where, write_result
from ossia.rl.envs.game2048 import MOST_MOVES, MOVES, Board, Played, Row, moved, play, scaled

Policy = Callable[[Board], str]
LOST = -1e9


def random_play(rng: random.Random) -> Policy:
    """Any move that is legal."""
    return lambda board: rng.choice([move for move in MOVES if moved(board, move)[0] != board])


def corner(board: Board) -> str:
    """The first legal move of left, up, right, down."""
    return next(move for move in "AWDS" if moved(board, move)[0] != board)


@lru_cache(maxsize=1 << 18)
def line_value(line: Row) -> float:
    """How good a row or column is."""
    logs = [math.log2(tile) if tile else 0.0 for tile in line]
    pairs = list(pairwise(logs))
    merges = sum(1 for a, b in pairs if a == b and a)
    rises = sum(max(0.0, b**4 - a**4) for a, b in pairs)
    falls = sum(max(0.0, a**4 - b**4) for a, b in pairs)
    return 300.0 * line.count(0) + 700.0 * merges - 45.0 * min(rises, falls) - 10.0 * sum(x**3.5 for x in logs)


@lru_cache(maxsize=1 << 18)
def value(board: Board) -> float:
    """How good a board is."""
    return sum(map(line_value, board)) + sum(map(line_value, zip(*board, strict=True)))


def expectimax(board: Board) -> str:
    """The move with the best expected value."""
    empty = sum(row.count(0) for row in board)
    depth = 2 if empty < 4 else 1
    worth = {move: after_move(moved(board, move)[0], depth) for move in MOVES if moved(board, move)[0] != board}
    return max(worth, key=lambda move: worth[move])


@lru_cache(maxsize=1 << 17)
def after_move(board: Board, depth: int) -> float:
    """What a board is worth before its next tile, with so many moves to look ahead."""
    if not depth:
        return value(board)
    total, empty = 0.0, 0
    for r, row in enumerate(board):
        for c, tile in enumerate(row):
            if tile:
                continue
            empty += 1
            for new, chance in ((2, 0.9), (4, 0.1)):
                after = (*board[:r], (*row[:c], new, *row[c + 1 :]), *board[r + 1 :])
                nexts = [moved(after, move)[0] for move in MOVES]
                total += chance * max([after_move(b, depth - 1) for b in nexts if b != after], default=LOST)
    return total / empty


def measure(size: int, name: str, games: int) -> dict[str, Any]:
    """Games of one policy."""
    started, played = time.perf_counter(), []
    for number in range(games):
        policy = {"random": random_play(random.Random(number)), "corner": corner, "expectimax": expectimax}[name]
        played.append(play(size, f"baseline {number}", policy))
    return {"size": size, "policy": name, "games": games, **figures(size, played), "s": time.perf_counter() - started}


def figures(size: int, played: list[Played]) -> dict[str, Any]:
    """What the reward could be made of, with its spread from game to game."""
    logs = {
        "log2_score": [math.log2(1 + game.score) for game in played],
        "log2_tile": [math.log2(game.largest) for game in played],
    }
    found: dict[str, Any] = {}
    for name, values in logs.items():
        found[name] = round(mean(values), 3)
        found[f"{name}_spread"] = round(stdev(values), 3)
    fours = [[game.score for game in played[at : at + 4]] for at in range(0, len(played) - 3, 4)]
    found["reward_of_4_games"] = round(mean(scaled(size, four) for four in fours), 3)
    found["moves"] = round(mean(game.moves for game in played), 1)
    found["at_most_moves"] = sum(game.end == "cap" for game in played) / len(played)
    found["largest"] = max(game.largest for game in played)
    return found


def main() -> None:
    """Measure, write benchmarks/results/game2048.json, print a line for each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--random", type=int, default=1000)
    parser.add_argument("--expectimax", type=int, default=40)
    options = parser.parse_args()
    games = {"random": options.random, "corner": options.random // 4, "expectimax": options.expectimax}
    runs = []
    for size in (3, 4):
        for name, number in games.items():
            runs.append(measure(size, name, number))
            print(runs[-1], file=sys.stderr, flush=True)
    result = {
        "question": (__doc__ or "").splitlines()[0],
        "config": {"most_moves": MOST_MOVES, "games": games},
        "runs": runs,
        **where(("numpy",)),
    }
    print(write_result("game2048", result))


if __name__ == "__main__":
    main()
