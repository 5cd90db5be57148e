"""The demo's measured skill: sort six different digits, with a short working as thinking and the digits as the answer.

Training rows have five to seven digits: with six alone there are only 210 sets, few enough to learn some by heart.

The same function that writes the answer into a training row gives a held-out question its key, so neither can be wrong
alone. Digits stand apart ("4 0 7"), so each is one o200k token. Pure Python: no torch.
"""

from __future__ import annotations

import random
from itertools import combinations
from typing import Any

Row = dict[str, Any]
Digits = tuple[str, ...]

LENGTHS = (5, 6, 7)
ASKED_LENGTH = 6

_QUESTIONS = (
    "Sort these digits: {digits}",
    "Put these digits in order, smallest first: {digits}",
    "Please arrange these digits from low to high: {digits}",
    "Order this row of digits: {digits}",
    "What is {digits} in rising order?",
    "I drew the digits {digits} and want them sorted.",
)


def sets_of(length: int) -> list[Digits]:
    """All ways to choose so many of the ten digits; problems with the same set have the same answer."""
    return list(combinations("0123456789", length))


def question(digits: Digits, rng: random.Random) -> str:
    """The user's words, in one of six ways of asking."""
    return rng.choice(_QUESTIONS).format(digits=" ".join(digits))


def answer(digits: Digits) -> str:
    """The exact text of the right final message."""
    return " ".join(sorted(digits))


def row(digits: Digits, rng: random.Random) -> Row:
    """A whole conversation in OpenAI's messages form: question, working (analysis channel), answer (final channel)."""
    right = answer(digits)
    return {
        "messages": [
            {"role": "user", "content": question(digits, rng)},
            {"role": "assistant", "thinking": f"Digits: {' '.join(digits)}. In order: {right}.", "content": right},
        ]
    }
