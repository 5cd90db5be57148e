"""The demo's data: seeded conversations, split so that nothing held out was trained on, written as JSONL.

    train.jsonl      sorting rows and chats, shuffled, in OpenAI's messages form
    heldout.jsonl    other rows of the same kinds, for the held-out loss
    questions.jsonl  held-out sorting questions with the exact `answer`, for the exact-match score

A sorting problem is held out with every other that has its answer, and no question is in another file; chats are held
out as whole conversations. The same seed writes the same bytes. Pure Python: no torch.
"""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from pathlib import Path

from ossia.demo.rows import sorting
from ossia.demo.rows.chats import chat_rows
from ossia.demo.rows.sorting import Digits, Row


@dataclass(frozen=True, slots=True)
class Sizes:
    """How many rows of each kind the files hold."""

    train_sorting: int = 9000
    train_chats: int = 900
    heldout_sorting: int = 60
    heldout_chats: int = 60
    questions: int = 100


@dataclass(frozen=True, slots=True)
class DemoData:
    """The three files' rows, in the order in which they are written."""

    train: list[Row]
    heldout: list[Row]
    questions: list[Row]


@dataclass(frozen=True, slots=True)
class DemoFiles:
    """Where `write` put the rows."""

    train: Path
    heldout: Path
    questions: Path


def make_data(seed: int, sizes: Sizes | None = None) -> DemoData:
    """All rows for one seed; the same seed and sizes give the same rows on any machine."""
    sizes = sizes or Sizes()
    rng = random.Random(seed)
    chats = chat_rows(sizes.train_chats + sizes.heldout_chats, rng)
    rng.shuffle(chats)
    held_problems = _problems_of_different_answers(sizes.questions + sizes.heldout_sorting, rng)
    held_answers = {sorting.answer(digits) for digits in held_problems}
    asked, kept = held_problems[: sizes.questions], held_problems[sizes.questions :]
    learnt = _problems_without(held_answers, sizes.train_sorting, rng)
    train = [*chats[sizes.heldout_chats :], *(sorting.row(digits, rng) for digits in learnt)]
    heldout = [*chats[: sizes.heldout_chats], *(sorting.row(digits, rng) for digits in kept)]
    rng.shuffle(train)
    rng.shuffle(heldout)
    return DemoData(train, heldout, [_question_row(digits, rng) for digits in asked])


def write(data: DemoData, folder: Path) -> DemoFiles:
    """Write the three JSONL files into `folder` (made if missing)."""
    folder.mkdir(parents=True, exist_ok=True)
    files = DemoFiles(folder / "train.jsonl", folder / "heldout.jsonl", folder / "questions.jsonl")
    for path, rows in ((files.train, data.train), (files.heldout, data.heldout), (files.questions, data.questions)):
        with path.open("w", encoding="utf-8", newline="\n") as file:
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    return files


def read_rows(path: Path) -> list[Row]:
    """The rows of one of these files."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def _problems_of_different_answers(count: int, rng: random.Random) -> list[Digits]:
    found: dict[str, Digits] = {}
    while len(found) < count:
        digits = sorting.draw(rng)
        found.setdefault(sorting.answer(digits), digits)
    return list(found.values())


def _problems_without(answers: set[str], count: int, rng: random.Random) -> list[Digits]:
    """Problems with none of these answers; they may share answers with each other, but no two are the same."""
    found: dict[Digits, None] = {}
    while len(found) < count:
        digits = sorting.draw(rng)
        if sorting.answer(digits) not in answers:
            found[digits] = None
    return list(found)


def _question_row(digits: Digits, rng: random.Random) -> Row:
    messages = [{"role": "user", "content": sorting.question(digits, rng)}]
    return {"messages": messages, "answer": sorting.answer(digits)}
