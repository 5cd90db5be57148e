"""The demo's data: seeded conversations, split so that nothing held out was trained on, written as JSONL.

    train.jsonl      skill rows and chats, shuffled, in OpenAI's messages form
    heldout.jsonl    other rows of the same kinds, for the held-out loss
    questions.jsonl  held-out skill questions with the exact `answer`, for the exact-match score

A skill problem is held out with everything that shares its answer, and held-out questions are in no other file; chats are held
out as whole conversations. The same seed writes the same bytes. Pure Python: no torch.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from ossia.demo.chats import Row, chat_rows
from ossia.demo.skills import SKILLS, Skill, answer_of, question_of, skill_row

Problem = tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Sizes:
    """How many rows of each kind the demo's files hold (skill counts are over all skills together)."""

    train_skill: int = 12000
    train_chats: int = 600
    heldout_skill: int = 80
    heldout_chats: int = 40
    questions: int = 64


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
    train, heldout = chats[sizes.heldout_chats :], chats[: sizes.heldout_chats]
    questions: list[Row] = []
    for skill in SKILLS:
        taken: set[str] = set()
        asked = _problems(skill, sizes.questions // len(SKILLS), rng, taken)
        kept = _problems(skill, sizes.heldout_skill // len(SKILLS), rng, taken)
        held_answers = frozenset(taken)
        questions += [_question_row(skill, items, rng) for items in asked]
        heldout += [skill_row(skill, items, rng) for items in kept]
        learnt = _training_problems(skill, sizes.train_skill // len(SKILLS), rng, held_answers)
        train += [skill_row(skill, items, rng) for items in learnt]
    for rows in (train, heldout, questions):
        rng.shuffle(rows)
    return DemoData(train, heldout, questions)


def write(data: DemoData, folder: Path) -> DemoFiles:
    """Write the three JSONL files into `folder` (made if missing)."""
    folder.mkdir(parents=True, exist_ok=True)
    files = DemoFiles(folder / "train.jsonl", folder / "heldout.jsonl", folder / "questions.jsonl")
    for path, rows in ((files.train, data.train), (files.heldout, data.heldout), (files.questions, data.questions)):
        _write_rows(path, rows)
    return files


def read_rows(path: Path) -> list[Row]:
    """The rows of one of these files."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def _write_rows(path: Path, rows: Iterable[Row]) -> None:
    with path.open("w", encoding="utf-8", newline="\n") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def _problems(skill: Skill, count: int, rng: random.Random, taken: set[str]) -> list[Problem]:
    """`count` problems whose answers are new; their answers are added to `taken`."""
    found: list[Problem] = []
    while len(found) < count:
        items = skill.draw(rng)
        answer = answer_of(skill, items)
        if answer not in taken:
            taken.add(answer)
            found.append(items)
    return found


def _training_problems(skill: Skill, count: int, rng: random.Random, held_answers: frozenset[str]) -> list[Problem]:
    """`count` problems, none with a held-out answer; problems may share an answer with each other."""
    found: list[Problem] = []
    while len(found) < count:
        items = skill.draw(rng)
        if answer_of(skill, items) not in held_answers:
            found.append(items)
    return found


def _question_row(skill: Skill, items: Problem, rng: random.Random) -> Row:
    """One held-out question and its key."""
    messages = [{"role": "user", "content": question_of(skill, items, rng)}]
    return {"messages": messages, "answer": answer_of(skill, items), "skill": skill.name}
