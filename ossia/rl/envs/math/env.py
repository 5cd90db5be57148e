r"""Math questions from rows of one's own: a question and its answer, given in the final message, `\boxed{}` or plain.

The order of the checks is what keeps the reward honest: exact comparison here (`decide`), a grammar that an answer has
to keep to before anything else reads it (`may_verify`), and only then math-verify, which hangs on towers of exponents
and takes a restated question for its answer, inside the jail. The reward is 1 or 0.
"""

from __future__ import annotations

import random
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import Any

from ossia.data.rows import Rows
from ossia.data.sources import open_rows
from ossia.errors import DataError, MissingExtraError, RecipeError
from ossia.rl.env import OneStep, Split, Task, Turn, final
from ossia.rl.envs.lazily import SYMPY
from ossia.rl.envs.math.decide import decide
from ossia.rl.envs.math.number import read_number
from ossia.rl.envs.math.text import clean, gold_of, said
from ossia.rl.jail import Jail, Jails, Limits

_HELD_OUT = 10  # one question of so many
_LIMITS = Limits(cpu_s=1.0, wall_s=10.0, total_s=10.0, memory_bytes=512 << 20)
# What is imported at first use has to be imported before a process locks itself in.
_WARM = (
    SYMPY
    + r"""
from math_verify import parse, verify
for gold, given in (("x^2+1", "1+x^2"), ("(1,x)", "(1,x)"),
                    (r"2\sqrt{3}", r"\sqrt{3}\cdot 2"), (r"\{1,y\}", r"\{y,1\}"),
                    (r"\frac{\pi}{2}", r"0.5\pi"), ("x<3", "3>x"), (r"(-\infty,2]", r"(-\infty,2]"),
                    (r"\begin{pmatrix}1\\2\end{pmatrix}", r"\begin{pmatrix}1\\2\end{pmatrix}"), ("3+2i", "2i+3")):
    verify(*(parse(f"${text}$", parsing_timeout=None) for text in (gold, given)), timeout_seconds=None)
"""
)
_CHECK = r"""
from math_verify import parse, verify
from math_verify.parser import LatexExtractionConfig

def check(gold, given):
    read = [parse(f"${text}$", [LatexExtractionConfig()], parsing_timeout=None) for text in (gold, given)]
    return bool(all(read) and verify(*read, timeout_seconds=None))
"""


@dataclass(frozen=True, slots=True)
class Math:
    r"""Rows of a question and an answer.

    data           file, folder or hub dataset of rows, as in a recipe's `data`; `split` of a hub dataset
    question       the column with the question
    answer         the column with the answer: the answer itself, or a solution with it after `####` or in `\boxed{}`
    instruction    what the developer message says; "": none
    """

    data: str
    jails: Jails
    question: str = "question"
    answer: str = "answer"
    split: str = "train"
    instruction: str = r"End with the final answer alone in \boxed{}, in its simplest form."
    _rows: Rows = field(init=False, repr=False)
    _places: dict[Split, list[int]] = field(init=False, repr=False)
    _jail: Jail = field(init=False, repr=False)

    def __post_init__(self) -> None:
        if find_spec("math_verify") is None:
            raise MissingExtraError("env.math: needs math-verify: pip install 'ossia[rl-envs]'")
        rows = open_rows(self.data, self.split)
        places: dict[Split, list[int]] = {"train": [], "eval": []}
        for index in range(len(rows)):
            asked, _ = self._row(rows, index)
            places["eval" if zlib.crc32(asked.encode()) % _HELD_OUT == 0 else "train"].append(index)
        jail = self.jails.get("compute", preload=("math_verify",), warm=_WARM)
        for name, value in (("_rows", rows), ("_places", places), ("_jail", jail)):
            object.__setattr__(self, name, value)

    def tasks(self, split: Split, seed: int) -> Iterator[Task]:
        """The rows in the seed's order; a tenth of the questions, by their text, is held out."""
        places = list(self._places[split])
        random.Random(f"{split} {seed}").shuffle(places)
        for index in places:
            asked, gold = self._row(self._rows, index)
            row: dict[str, Any] = {"messages": [{"role": "user", "content": asked}]}
            if self.instruction:
                row["developer"] = self.instruction
            yield Task(row, {"question": asked, "answer": gold}, self._rows.where(index))

    def open(self, task: Task, seed: int) -> OneStep:
        """See Env."""

        def verdict(turn: Turn) -> tuple[float, dict[str, float]]:
            text = turn.answer()
            metrics = {"well_formed": float(text is not None), "verifier_asked": 0.0, "verifier_failed": 0.0}
            given = said(text) if text is not None else None
            if given is None:
                return 0.0, metrics
            right = decide(task.info["answer"], given, task.info["question"])
            if right is None:
                metrics["verifier_asked"] = 1.0
                right = self._ask(task.info["answer"], given, metrics)
            return float(right), metrics

        return OneStep(verdict)

    def examples(self, task: Task) -> tuple[Turn, Sequence[Turn]]:
        """See Env."""
        gold, asked = task.info["answer"], task.info["question"]
        number = read_number(clean(gold))
        near = str(number.value + 1) if number is not None else f"{gold} + 1"
        right = rf"\boxed{{{gold}}}"
        wrong = ["", near, rf"\boxed{{{near}}}", rf"{right} or \boxed{{{near}}}", f"{gold} or {near}", asked]
        return final(right), [*(final(text) for text in wrong), Turn(final(right).messages, None)]

    def _row(self, rows: Rows, index: int) -> tuple[str, str]:
        """Question and answer of a row. Raises DataError, RecipeError for a column that isn't there."""
        row = rows.row(index)
        for option, column in (("question", self.question), ("answer", self.answer)):
            if column not in row:
                raise RecipeError(
                    f"env.math: `{option}` is {column!r}, a column that {rows.where(index)} lacks\n"
                    f"  allowed: {', '.join(row)}"
                )
        asked, answer = row[self.question], row[self.answer]
        if not isinstance(asked, str) or not asked.strip():
            raise DataError(f"{rows.where(index)}: `{self.question}` is no text")
        if isinstance(answer, bool) or not isinstance(answer, str | int | float):
            raise DataError(f"{rows.where(index)}: `{self.answer}` is neither text nor a number")
        gold = gold_of(str(answer))
        if not gold:
            raise DataError(f"{rows.where(index)}: `{self.answer}` holds no answer")
        return asked, gold

    def _ask(self, gold: str, given: str, metrics: dict[str, float]) -> bool:
        """What math-verify says in a jail; where it fails or takes too long, the answer isn't right."""
        with self._jail.open(_CHECK, _LIMITS) as program:
            outcome = program.call("check", clean(gold), clean(given))
        metrics["verifier_failed"] = float(outcome.failure is not None)
        return outcome.value is True
