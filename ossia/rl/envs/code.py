"""What environments share whose answer is a program: the one fenced block of the final answer, or why there is none.

Strict, because whatever picks one of several blocks can be made to pick another than a reader would.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from ossia.rl.env import Split, Task, Turn, final

MOST_CHARACTERS = 50_000
_FENCE = re.compile(r"^ {0,3}(`{3,}|~{3,})[ \t]*([^\n`]*?)[ \t\r]*$", re.MULTILINE)
_TAGS = {"python": ("python", "py", "python3"), "c": ("c", "C")}


@dataclass(frozen=True, slots=True)
class Code:
    """A program, or in a word why there is none: no_answer, no_block, several_blocks, other_language, too_long."""

    text: str | None
    problem: str = ""

    def metrics(self) -> Mapping[str, float]:
        """For an episode's log: whether there was a program."""
        return {"has_code": float(self.text is not None)}


def code_of(turn: Turn, language: str) -> Code:
    """The content of the one block of an answer that is fenced by ```; text may stand before and after it.

    language  python or c: the block is marked as that, or not at all
    """
    answer = turn.answer()
    if answer is None:
        return Code(None, "no_answer")
    fences = list(_FENCE.finditer(answer))
    if not fences:
        return Code(None, "no_block")
    if len(fences) != 2 or fences[0][1] != "```" or fences[1][1] != "```" or fences[1][2]:
        return Code(None, "no_block" if len(fences) == 1 else "several_blocks")
    if fences[0][2] not in ("", *_TAGS[language]):
        return Code(None, "other_language")
    text = answer[fences[0].end() + 1 : fences[1].start()]
    return Code(text) if len(text) <= MOST_CHARACTERS else Code(None, "too_long")


def seeded(question: str, name: str, split: Split, seed: int) -> Iterator[Task]:
    """Tasks that ask one question and differ by `info["seed"]`, of which their secret games or inputs are made.

    Even numbers are trained, odd ones held out; `name` and the number are the task's name.
    """
    rng = random.Random(f"{name} {split} {seed}")
    row = {"messages": [{"role": "user", "content": question}]}
    while True:
        number = rng.getrandbits(48) * 2 + (split == "eval")
        yield Task(row, {"seed": number}, f"{name} {number}")


def answered(code: str, language: str) -> Turn:
    """A turn that answers with a program: for `Env.examples` and tests."""
    return final(f"```{language}\n{code.strip()}\n```")


def unusable(code: str, language: str) -> Sequence[Turn]:
    """Turns that hold a program, and of which none may be taken: for `Env.examples` and tests."""
    block = f"```{language}\n{code.strip()}\n```"
    return [final(code), final(f"{block}\n{block}"), final(block[:-3]), final(f"```js{block[3 + len(language) :]}")]
