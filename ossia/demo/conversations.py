"""The demo's data: seeded conversations, split so that nothing held out was trained on, written as JSONL.

    train.jsonl      sorting rows and chats, shuffled, in OpenAI's messages form
    heldout.jsonl    other rows of the same kinds, for the held-out loss
    questions.jsonl  held-out sorting questions with the exact `answer`, for the exact-match score

The digits of a held-out sorting problem are never those of a training row, in whatever order, so no held-out answer was
ever seen; chats are held out as whole conversations. The same seed writes the same bytes. Pure Python: no torch.
"""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path

from ossia.demo.rows import sorting
from ossia.demo.rows.chats import chat_rows
from ossia.demo.rows.sorting import Digits, Row


@dataclass(frozen=True, slots=True)
class Sizes:
    """How many rows of each kind the files hold."""

    train_sorting: int = 6000
    train_chats: int = 600
    heldout_sorting: int = 60
    heldout_chats: int = 60
    heldout_sets: int = 40  # of the 210 sets of six digits
    questions: int = 100


@dataclass(frozen=True, slots=True)
class DemoData:
    """The three files' rows, in the order in which they are written."""

    train: list[Row]
    heldout: list[Row]
    questions: list[Row]


@dataclass(frozen=True, slots=True)
class DemoFiles:
    """Where `write` puts the rows."""

    train: Path
    heldout: Path
    questions: Path

    @classmethod
    def within(cls, folder: Path) -> DemoFiles:
        """The files of that folder, whether written yet or not."""
        return cls(folder / "train.jsonl", folder / "heldout.jsonl", folder / "questions.jsonl")


def make_data(seed: int, sizes: Sizes | None = None) -> DemoData:
    """All rows for one seed; the same seed and sizes give the same rows on any machine."""
    sizes = sizes or Sizes()
    rng = random.Random(seed)
    chats = chat_rows(sizes.train_chats + sizes.heldout_chats, rng)
    rng.shuffle(chats)
    held_sets = rng.sample(sorting.sets_of(sorting.ASKED_LENGTH), sizes.heldout_sets)
    sets = [chosen for length in sorting.LENGTHS for chosen in sorting.sets_of(length) if chosen not in held_sets]
    rng.shuffle(sets)
    held = _problems(held_sets, sizes.questions + sizes.heldout_sorting, rng)
    learnt = _problems(sets, sizes.train_sorting, rng)
    asked, kept = held[: sizes.questions], held[sizes.questions :]
    train = [*chats[sizes.heldout_chats :], *(sorting.row(digits, rng) for digits in learnt)]
    heldout = [*chats[: sizes.heldout_chats], *(sorting.row(digits, rng) for digits in kept)]
    rng.shuffle(train)
    rng.shuffle(heldout)
    return DemoData(train, heldout, [_question_row(digits, rng) for digits in asked])


def write(data: DemoData, folder: Path) -> DemoFiles:
    """Write the three JSONL files into `folder` (made if missing)."""
    folder.mkdir(parents=True, exist_ok=True)
    files = DemoFiles.within(folder)
    for path, rows in ((files.train, data.train), (files.heldout, data.heldout), (files.questions, data.questions)):
        with path.open("w", encoding="utf-8", newline="\n") as file:
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    return files


def read_rows(path: Path) -> list[Row]:
    """The rows of one of these files."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def _problems(sets: list[Digits], count: int, rng: random.Random) -> list[Digits]:
    """`count` different problems: sets in turn, the digits of each in a random order."""
    found: dict[Digits, None] = {}
    for chosen in cycle(sets):
        if len(found) == count:
            break
        found[tuple(rng.sample(chosen, len(chosen)))] = None
    return list(found)


def _question_row(digits: Digits, rng: random.Random) -> Row:
    messages = [{"role": "user", "content": sorting.question(digits, rng)}]
    return {"messages": messages, "answer": sorting.answer(digits)}
