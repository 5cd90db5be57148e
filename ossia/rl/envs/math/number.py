r"""A number as people write it, exactly: 1,250  -0.5  3/4  2\frac{1}{2}  0.\overline{3}  1.2\times 10^{5}  40%

Nothing here is computed beyond that, so `3+4`, `2^{10}`, `5!` and `\sum i` are no numbers: a question written down once
more is no answer.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction
from math import gcd
from typing import Literal

Form = Literal["whole", "decimal", "fraction", "power"]
_WHOLE = r"(?:\d{1,3}(?:,\d{3})+|\d+)"
_SIGNED = rf"[+-]?\s*{_WHOLE}"
_FORMS: tuple[tuple[Form, re.Pattern[str]], ...] = (
    ("whole", re.compile(rf"(?P<whole>{_WHOLE})(?:\.0*)?")),
    ("decimal", re.compile(rf"(?P<whole>{_WHOLE})?\.(?P<part>\d*)(?:\\overline\{{(?P<again>\d+)\}})?")),
    ("fraction", re.compile(rf"(?P<over>{_WHOLE})\s*/\s*(?P<under>{_WHOLE})")),
    ("fraction", re.compile(rf"\\frac\{{\s*(?P<over>{_SIGNED})\s*\}}\{{\s*(?P<under>{_SIGNED})\s*\}}")),
    ("fraction", re.compile(rf"(?P<whole>{_WHOLE})\s*\\frac\{{(?P<over>{_WHOLE})\}}\{{(?P<under>{_WHOLE})\}}")),
    ("fraction", re.compile(rf"(?P<whole>{_WHOLE})\s+(?P<over>{_WHOLE})/(?P<under>{_WHOLE})")),
    (
        "power",
        re.compile(
            rf"(?P<whole>{_WHOLE})(?:\.(?P<part>\d+))?\s*(?:e|E|(?:\\times|\\cdot|\*)\s*10\s*\^)\s*\{{?(?P<by>[+-]?\d{{1,3}})\}}?"
        ),
    ),
)
_AROUND = re.compile(
    r"(?P<sign>[+-]?)\s*(?P<money>[$€£]?)\s*(?P<minus>[+-]?)(?P<body>[\d.\\].*?)\s*(?P<unit>%|[a-zA-Z].*)?"
)
_UNIT = re.compile(r"[A-Za-z]+(?:[ /·]+[A-Za-z]+){0,3}\s*(?:\^\{[23]\})?")
_MONEY = {"$": "dollar", "€": "euro", "£": "pound", "": ""}


@dataclass(frozen=True, slots=True)
class Number:
    """A number and how it was written.

    unit     the word behind it, or the currency before it; "%" of a percentage, whose value is as written, not / 100
    reduced  no common factor in a fraction, one digit before the point of a power of ten
    """

    value: Fraction
    form: Form
    unit: str
    reduced: bool


def read_number(text: str) -> Number | None:
    """The number that a text as `clean` has it is; None if it is none."""
    for unit_at_all in (False, True):  # first without a unit: "1.5e3" is a number and not 1.5 of some `e3`
        parts = _AROUND.fullmatch(text)
        if parts is None:
            return None
        body, unit = (
            (parts["body"], parts["unit"] or "") if unit_at_all else (parts["body"] + (parts["unit"] or ""), "")
        )
        if not unit_at_all and body.endswith("%"):
            continue
        if unit and unit != "%" and not _UNIT.fullmatch(unit):
            return None
        if (parts["sign"] and parts["minus"]) or (parts["money"] and unit not in ("", "%")):
            return None
        for form, pattern in _FORMS:
            match = pattern.fullmatch(body.strip())
            if match is not None and (made := _value(form, match)) is not None:
                value, reduced = made
                negative = "-" in (parts["sign"], parts["minus"])
                return Number(-value if negative else value, form, unit or _MONEY[parts["money"]], reduced)
    return None


def _value(form: Form, match: re.Match[str]) -> tuple[Fraction, bool] | None:
    """What the digits say, and whether in the shortest way; None for a division by zero."""
    group = {name: (text or "").replace(",", "").replace(" ", "") for name, text in match.groupdict().items()}
    if form == "whole":
        return Fraction(int(group["whole"])), True
    if form == "fraction":
        over, under = int(group["over"]), int(group["under"])
        if under == 0:
            return None
        whole = int(group.get("whole") or 0)
        return whole + Fraction(over, under), gcd(over, under) == 1 and abs(under) != 1 and not (whole and over > under)
    value, part = Fraction(int(group["whole"] or 0)), group["part"]
    if form == "decimal":
        again = group["again"]
        if not (group["whole"] or part or again):
            return None
        value += Fraction(int(part or 0), 10 ** len(part))
        return value + (Fraction(int(again), 10 ** len(part) * (10 ** len(again) - 1)) if again else 0), True
    value += Fraction(int(part or 0), 10 ** len(part))
    return value * Fraction(10) ** int(group["by"]), 1 <= value < 10


def same_number(gold: Number, given: Number, question: str, literal: str) -> bool:
    """Whether a number answers a question whose answer is another.

    A unit has to be the gold's own, or one that the question names. A fraction has to be reduced (as far as the gold
    is), and another form of number than the gold's mustn't be the question's own: to write 0.5 as a fraction is asked.

    question  as it was asked
    literal   the given number as it was written
    """
    if not (given.reduced or not gold.reduced):
        return False
    if given.form != gold.form and re.search(rf"(?<![\d.]){re.escape(literal)}(?![\d.]*\d)", question):
        return False
    asked = question.casefold()
    if "%" in (gold.unit, given.unit):
        if {gold.unit, given.unit} - {"%", ""}:
            return False
        percents = gold.value == given.value and (gold.unit == given.unit or "percent" in asked or "%" in asked)
        return percents or gold.value / _hundred(gold) == given.value / _hundred(given)
    if given.unit and (_one(given.unit) != _one(gold.unit) if gold.unit else not _named(given.unit, asked)):
        return False
    return gold.value == given.value


def _hundred(number: Number) -> int:
    return 100 if number.unit == "%" else 1


def _one(unit: str) -> str:
    """A unit in the singular, without spaces."""
    return re.sub(r"s\b", "", unit.casefold()).replace(" ", "").replace("{", "").replace("}", "")


def _named(unit: str, asked: str) -> bool:
    """Whether a question names a unit."""
    if unit in ("dollar", "euro", "pound") and any(sign in asked for sign, name in _MONEY.items() if name == unit):
        return True
    words = _singulars(re.sub(r"\bangle\b|\\circ|°", " degree ", asked))
    return set(_singulars(unit.casefold())) <= set(words)


def _singulars(text: str) -> list[str]:
    return [re.sub(r"(?<=..)s$", "", word) for word in re.findall(r"[a-z]+", text)]
