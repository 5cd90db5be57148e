"""Two small skills with exact answers: reverse eight letters, sort six digits.

A row is one conversation in OpenAI's messages form: a question, short working as `thinking`, the answer. The same function
that writes the answer into a training row gives the held-out question its key, so neither can be wrong alone.
Letters and digits stand apart ("k f a"), so each is one o200k token. Pure Python: no torch.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

Row = dict[str, Any]

LETTERS = "abcdefghijklmnopqrstuvwxyz"
DIGITS = "0123456789"
NUM_LETTERS = 8
NUM_DIGITS = 6

_REVERSE_QUESTIONS = (
    "Reverse these letters: {items}",
    "Write these letters backwards: {items}",
    "Please read these letters from right to left: {items}",
    "Turn this row of letters around: {items}",
    "What is the reverse of {items}",
    "I typed {items} and need it back to front.",
)
_SORT_QUESTIONS = (
    "Sort these digits: {items}",
    "Put these digits in order, smallest first: {items}",
    "Please arrange these digits from low to high: {items}",
    "Order this row of digits: {items}",
    "What is {items} in rising order?",
    "I drew the digits {items} and want them sorted.",
)


@dataclass(frozen=True, slots=True)
class Skill:
    """One skill: how a problem is drawn, asked, worked and answered (all texts; items separated by single spaces)."""

    name: str
    questions: tuple[str, ...]
    working: str
    draw: Callable[[random.Random], tuple[str, ...]]
    solve: Callable[[tuple[str, ...]], tuple[str, ...]]


def _draw_letters(rng: random.Random) -> tuple[str, ...]:
    return tuple(rng.sample(LETTERS, NUM_LETTERS))


def _draw_digits(rng: random.Random) -> tuple[str, ...]:
    return tuple(rng.choices(DIGITS, k=NUM_DIGITS))


def _reverse(items: tuple[str, ...]) -> tuple[str, ...]:
    return items[::-1]


def _sort(items: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(sorted(items))


REVERSE = Skill("reverse", _REVERSE_QUESTIONS, "Letters: {items}. Backwards: {answer}.", _draw_letters, _reverse)
SORT = Skill("sort", _SORT_QUESTIONS, "Digits: {items}. In order: {answer}.", _draw_digits, _sort)
SKILLS = (REVERSE, SORT)


def question_of(skill: Skill, items: tuple[str, ...], rng: random.Random) -> str:
    """The user's words for one problem, in one of the skill's ways of asking."""
    return rng.choice(skill.questions).format(items=" ".join(items))


def answer_of(skill: Skill, items: tuple[str, ...]) -> str:
    """The exact text of the right final message."""
    return " ".join(skill.solve(items))


def skill_row(skill: Skill, items: tuple[str, ...], rng: random.Random) -> Row:
    """A whole conversation: question, working (analysis channel), answer (final channel)."""
    answer = answer_of(skill, items)
    thinking = skill.working.format(items=" ".join(items), answer=answer)
    return {
        "messages": [
            {"role": "user", "content": question_of(skill, items, rng)},
            {"role": "assistant", "thinking": thinking, "content": answer},
        ]
    }
