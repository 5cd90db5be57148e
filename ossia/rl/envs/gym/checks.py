"""Own verdicts for tasks of reasoning-gym whose scorers can't be used, and which answers the others may see.

Of the scorers of version 0.1.25, nine execute the answer (`eval`, sympy's `parse_expr`): a program in the scorer's own
process can name its own reward, in a jail too. Five more pay for what is no answer: `game_of_life_halting` compares
truth values of text, so that any text is right, `coin_flip` takes 0 for every small probability, and `spell_backward`,
`letter_jumble` and `time_intervals` read as much as they like of several answers.
Each check gets the answer and the entry, and is exact. Integrals have no short exact check: there the answer's
characters and names are restricted to those of a formula before sympy reads it, in the jail.
"""

from __future__ import annotations

import ast
import re
from collections import Counter
from collections.abc import Callable, Mapping
from fractions import Fraction
from typing import Any

from ossia.rl.envs.math.number import read_number
from ossia.rl.envs.math.text import clean

Entry = Mapping[str, Any]
_MOST = 400  # characters of an answer that is read here
_FORMULA = re.compile(r"[0-9A-Za-z\s+*/^().-]*")
_FUNCTIONS = {"sin", "cos", "tan", "exp", "log", "sqrt", "asin", "acos", "atan", "sinh", "cosh", "tanh", "pi", "C"}
_TERM = re.compile(r"[+-]?[^+-]+")
_SHORT = 3  # words of a reference that an answer is measured by
_DIGITS = re.compile(r"\d+(?:\.\d+)?")
_NOT_FINITE = re.compile(r"(?<![a-z])(?:nan|inf)", re.IGNORECASE)


def as_written(answer: str, entry: Entry) -> bool:
    """The very text, line by line; spaces around a line don't count."""
    return _lines(answer) == _lines(entry["answer"])


def words_as_written(answer: str, entry: Entry) -> bool:
    """The very words, in small or large letters."""
    return answer.casefold().split() == entry["answer"].casefold().split()


def one_of_the_boards(answer: str, entry: Entry) -> bool:
    """Any of the solutions that the puzzle has."""
    return any(_lines(answer) == _lines(board) for board in entry["metadata"]["valid_answers"])


def probability(answer: str, entry: Entry) -> bool:
    """A fraction or decimal within a ten-thousandth of the right probability, of itself and not of 1."""
    found, right = _fraction(answer.strip()), Fraction(entry["answer"])
    return found is not None and abs(found - right) <= right / 10_000


def countdown(answer: str, entry: Entry) -> bool:
    """All of the numbers, once each, worked out to the target."""
    return _makes(answer, entry["metadata"]["numbers"], entry["metadata"]["target"])


def puzzle24(answer: str, entry: Entry) -> bool:
    """The four numbers, once each, worked out to 24. The package's own scorer takes any four."""
    return _makes(answer, entry["metadata"]["numbers"], 24)


def expanded(answer: str, entry: Entry) -> bool:
    """The product's terms, multiplied out and collected: the question's own factors are no answer."""
    return (found := _terms(answer)) is not None and found == _terms(entry["answer"])


CHECKS: Mapping[str, Callable[[str, Entry], bool]] = {
    "binary_matrix": as_written,
    "coin_flip": probability,
    "countdown": countdown,
    "game_of_life_halting": as_written,
    "letter_jumble": words_as_written,
    "n_queens": one_of_the_boards,
    "polynomial_multiplication": expanded,
    "puzzle24": puzzle24,
    "spell_backward": as_written,
    "spiral_matrix": as_written,
    "string_insertion": as_written,
    "time_intervals": as_written,
}
FORMULAS = ("simple_integration", "intermediate_integration")  # their scorers run on what `is_formula` lets through


def is_formula(answer: str, entry: Entry) -> bool:
    """Whether sympy may read an answer: numbers, operators, the variable, functions of a short list, one `^` at a time.

    `Integral(...)` isn't on the list, so the question can't be its own answer.
    """
    if len(answer) > _MOST or not _FORMULA.fullmatch(answer):
        return False
    names = set(re.findall(r"[A-Za-z]+", answer))
    return names <= _FUNCTIONS | {entry["metadata"]["variable"]} and not re.search(
        r"\.\s*[A-Za-z(]|[)A-Za-z]\s*\.", answer
    )


def is_one_answer(answer: str, gold: str | None) -> bool:
    """Whether an answer is one only, as far as the reference tells: `6 or 7` may hit what a scorer looks for.

    Instead of a number there is a number, and instead of three words or fewer no more of them, with as many numbers.
    `nan` and `inf` are none: no distance from these is large, and some scorers pay for that.
    """
    if gold is None or answer == gold:
        return True
    if _NOT_FINITE.search(answer):
        return False
    if read_number(clean(gold)) is not None:
        return len(answer) <= _MOST and read_number(clean(answer)) is not None
    words, most = len(answer.split()), len(gold.split())
    if most > _SHORT:
        return True
    return words <= most and len(_DIGITS.findall(answer)) == len(_DIGITS.findall(gold))


def _lines(text: str) -> list[str]:
    return [line.strip() for line in text.strip().splitlines()]


def _fraction(text: str) -> Fraction | None:
    """A number written as `3/8`, `0.375` or `3`; None for other text."""
    if len(text) > 100 or not re.fullmatch(r"\d+(?:\.\d+)?(?:/\d+)?", text):
        return None
    over, _, under = text.partition("/")
    return None if under and not int(under) else Fraction(over) / int(under or 1)


def _makes(answer: str, numbers: list[int], target: int) -> bool:
    """Whether an answer works out to the target, from just these numbers and + - * / ( )."""
    if len(answer) > _MOST or not re.fullmatch(r"[0-9\s+*/()-]*", answer):
        return False
    try:
        tree = ast.parse(answer.strip(), mode="eval").body
        used: list[int] = []
        value = _worked_out(tree, used)
    except (SyntaxError, ValueError, ZeroDivisionError, RecursionError, MemoryError):
        return False
    return value == target and sorted(used) == sorted(numbers)


def _worked_out(node: ast.expr, used: list[int]) -> Fraction:
    """The value of an expression of + - * /, exactly; ValueError for any other."""
    if isinstance(node, ast.Constant) and type(node.value) is int:
        used.append(node.value)
        return Fraction(node.value)
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        return -_worked_out(node.operand, used)
    if isinstance(node, ast.BinOp):
        left, right = _worked_out(node.left, used), _worked_out(node.right, used)
        match node.op:
            case ast.Add():
                return left + right
            case ast.Sub():
                return left - right
            case ast.Mult():
                return left * right
            case ast.Div():
                return left / right
    raise ValueError("not + - * /")


def _terms(text: str) -> dict[tuple[tuple[str, int], ...], int] | None:
    """Coefficient of each monomial of a sum such as `6*x**2*y - 3*x + 1`; None for text of another form.

    A monomial that stands there twice is not collected: None.
    """
    text = re.sub(r"\s+", "", text).replace("**", "^")
    if len(text) > 10 * _MOST or not re.fullmatch(r"[0-9A-Za-z+*^-]+", text) or re.search(r"[+-]{2}|[+-]$", text):
        return None
    found: dict[tuple[tuple[str, int], ...], int] = {}
    for term in _TERM.findall(text):
        coefficient, powers = -1 if term[0] == "-" else 1, Counter[str]()
        for factor in term.lstrip("+-").split("*"):
            match = re.fullmatch(r"(?P<number>\d{1,30})|(?P<letter>[A-Za-z])(?:\^(?P<power>\d{1,3}))?", factor)
            if match is None:
                return None
            if match["number"]:
                coefficient *= int(match["number"])
            else:
                powers[match["letter"]] += int(match["power"] or 1)
        monomial = tuple(sorted(powers.items()))
        if monomial in found:
            return None
        found[monomial] = coefficient
    return {monomial: coefficient for monomial, coefficient in found.items() if coefficient}
