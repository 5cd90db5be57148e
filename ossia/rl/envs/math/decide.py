r"""Whether an answer is the reference's: decided here where both can be read exactly, left to a verifier where not.

What a verifier of equality would pay for is refused before it is asked: the question restated, a form other than the
reference's (factored for expanded), an expression left to be worked out, names that the reference doesn't use.
"""

from __future__ import annotations

import re
from collections import Counter

from ossia.rl.envs.math.number import read_number, same_number
from ossia.rl.envs.math.text import MOST, clean

_OPEN, _CLOSE = ("(", "[", r"\{"), (")", "]", r"\}")
_OR = re.compile(r"\s*,?\s+(?:or|and)\s+")
_WORD = re.compile(r"[A-Za-z][A-Za-z' -]*[A-Za-z]|\(?[A-Z]\)?")
_ALLOWED = re.compile(r"[0-9A-Za-z\s+\-*/^_{}()\[\]|.,=<>\\:;!%]*")
_COMMAND = re.compile(r"\\([A-Za-z]+)")
_HARMLESS = {"frac", "cdot", "times", "le", "leq", "ge", "geq", "lt", "gt", "cup", "infty"}
_UNDONE = re.compile(r"(?<![\w^{}])\d+\s*[-+/]\s*\d+(?![\w\\({^])|\d\s*(?:\*|\\cdot|\\times|\\div)\s*\d")
_ROOT = re.compile(r"\\sqrt\{\s*(\d+)\s*\}")
_PRODUCT = re.compile(
    r"[\dA-Za-z)}]\s*(?:\*|\\cdot|\\times)?\s*\([^()]*[-+][^()]*\)|\([^()]*[-+][^()]*\)\s*[\^\dA-Za-z*\\(]"
)
_TOWER = re.compile(r"\^\s*\{[^{}]*\^|\^[^{}\s]*\^|\*\*")


def decide(gold: str, given: str, question: str) -> bool | None:
    """Whether `given` is the answer `gold`, both as people write them; None: a verifier may say (`may_verify`).

    question  as it was asked: its own words are no answer, and it says which units are meant
    """
    if len(given) > MOST or not given.strip():
        return False
    return _decide(clean(gold), clean(given), question)


def _decide(gold: str, given: str, question: str) -> bool | None:
    number = read_number(gold)
    if number is not None:
        answer = read_number(given)
        return answer is not None and same_number(number, answer, question, given)
    if _squeeze(given) == _squeeze(gold):
        return True
    if _WORD.fullmatch(gold):
        return _word(gold) == _word(given)
    if restated(given, question):
        return False
    golds, answers = _items(gold), _items(given)
    if golds is not None and answers is not None:
        return _all_same(golds, answers, question) and (None if _undecided(golds, answers, question) else True)
    return None if may_verify(gold, given) else False


def _squeeze(text: str) -> str:
    return text.replace(" ", "")


def _word(text: str) -> str:
    return text.strip("() ").casefold()


def restated(given: str, question: str) -> bool:
    """Whether a text stands in the question."""
    return len(_squeeze(given)) > 2 and _squeeze(given) in _squeeze(clean(question))


def _items(text: str) -> tuple[str, list[str]] | None:
    """The brackets around a list, "" where there are none, and its items; None of a single thing."""
    text = _OR.sub(", ", text.strip())
    kind = ""
    for opening in _OPEN:
        for closing in _CLOSE:
            inner = text[len(opening) : -len(closing)]
            if text.startswith(opening) and text.endswith(closing) and _flat(inner):
                kind, text = opening + closing, inner
                break
        if kind:
            break
    items = _split(text)
    return (kind, items) if len(items) > 1 and all(items) else None


def _flat(text: str) -> bool:
    """Whether no bracket of a text closes one that was opened before it."""
    depth = 0
    for letter in text:
        depth += (letter in "([{") - (letter in ")]}")
        if depth < 0:
            return False
    return depth == 0


def _split(text: str) -> list[str]:
    """At commas outside of brackets."""
    parts, depth = [""], 0
    for letter in text:
        depth += (letter in "([{") - (letter in ")]}")
        if letter == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += letter
    return [part.strip() for part in parts]


def _all_same(gold: tuple[str, list[str]], given: tuple[str, list[str]], question: str) -> bool:
    """Whether no item is known to differ; the order counts in brackets, not in a set or a bare list."""
    (kind, golds), (other, answers) = gold, given
    bare = ("", r"\{\}")
    if len(golds) != len(answers) or (kind != other and not (kind in bare and other in bare)):
        return False
    return not any(verdict is False for verdict in _pairs(kind, golds, answers, question))


def _undecided(gold: tuple[str, list[str]], given: tuple[str, list[str]], question: str) -> bool:
    return any(verdict is None for verdict in _pairs(gold[0], gold[1], given[1], question))


def _pairs(kind: str, golds: list[str], answers: list[str], question: str) -> list[bool | None]:
    """The verdict on each item of the reference; in a set, on the best of the answers that are left."""
    if kind not in ("", r"\{\}"):
        return [_decide(gold, answer, question) for gold, answer in zip(golds, answers, strict=True)]
    left, verdicts = list(answers), []
    for gold in golds:
        tried = [_decide(gold, answer, question) for answer in left]
        best = next((want for want in (True, None) if want in tried), False)
        if best is not False:
            left.pop(tried.index(best))
        verdicts.append(best)
    return verdicts


def may_verify(gold: str, given: str) -> bool:
    """Whether an answer, as `clean` has it, is of the reference's own kind, so that a verifier may see it."""
    if not _ALLOWED.fullmatch(given) or "__" in given or ("!" in given and "!" not in gold):
        return False
    if any(not name <= allowed for name, allowed in zip(_names(given), _names(gold), strict=True)):
        return False  # a letter or a function that the reference lacks, or one more often than there
    if bool(_PRODUCT.search(given)) != bool(_PRODUCT.search(gold)):
        return False  # expanded where the reference is factored, or the other way
    if any(pattern.search(given) and not pattern.search(gold) for pattern in (_UNDONE, _TOWER)):
        return False
    return all(root in _ROOT.findall(gold) or _squarefree(int(root)) for root in _ROOT.findall(given))


def _names(text: str) -> tuple[Counter[str], Counter[str]]:
    """Commands, but for harmless ones, and letters, with how often they are there."""
    commands = Counter(name for name in _COMMAND.findall(text) if name not in _HARMLESS)
    return commands, Counter(re.findall(r"[A-Za-z]", _COMMAND.sub("", text)))


def _squarefree(number: int) -> bool:
    """Whether no square divides it; beyond what is looked at soon, it isn't."""
    return 1 < number < 10**9 and all(number % (n * n) for n in range(2, int(number**0.5) + 1))
