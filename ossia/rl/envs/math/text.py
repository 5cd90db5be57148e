r"""An answer as text: where it stands in what was said, and one spelling for what is written in several.

"So the sum is \boxed{\dfrac12}."  ->  \frac{1}{2}          "$1{,}250$."  ->  1,250
"""

from __future__ import annotations

import re

MOST = 400  # characters of an answer
_MOST_BOXES = 20
_BOX = re.compile(r"\\boxed\s*\{")
_SAYS = re.compile(r"(?:so,? |thus,? |hence,? )?(?:the |my )?(?:final |correct )?answer(?: is)?\s*:?\s+", re.IGNORECASE)
_SPACES = re.compile(r"\\[,;:! ]|\\q?quad\b|~|\s+")
_TEXT = re.compile(r"\\(?:text|textbf|textit|textrm|mathrm|mathbf|mathit|mbox|hbox)\s*\{([^{}]*)\}")
_DEGREES = re.compile(r"\^\s*(?:\\circ\b|\{\s*\\circ\s*\})|\\degree\b|°")
_BARE_FRAC = re.compile(r"\\frac\s*(\d|[A-Za-z]|\{[^{}]*\})\s*(\d|[A-Za-z]|\{[^{}]*\})")
_BARE_ROOT = re.compile(r"\\sqrt\s*([0-9A-Za-z])")
_BARE_POWER = re.compile(r"\^\s*([0-9A-Za-z])")
_VARIABLE = re.compile(r"[A-Za-z]\s*=\s*(?=[^=])")
_WRAPPED = (("$$", "$$"), ("$", "$"), (r"\(", r"\)"), (r"\[", r"\]"), ("**", "**"), ("`", "`"))
_SAME = {
    "−": "-",
    "–": "-",
    "×": r"\times ",
    "·": r"\cdot ",
    "π": r"\pi ",
    "√": r"\sqrt ",
    "∞": r"\infty ",
    r"\dfrac": r"\frac",
    r"\tfrac": r"\frac",
    r"\cfrac": r"\frac",
    r"\left": "",
    r"\right": "",
    r"\lbrace": r"\{",
    r"\rbrace": r"\}",
    "{,}": ",",
    r"\%": "%",
    r"\$": "$",
}
_SAME_RE = re.compile("|".join(re.escape(key) + (r"(?![A-Za-z])" if key[0] == "\\" and key[-1].isalpha() else "")
                               for key in _SAME))  # fmt: skip


def said(text: str) -> str | None:
    r"""The one answer in a final message: what is in its `\boxed{}`, or else all of it.

    None where two boxes differ, or one isn't closed: only one answer can be right.
    """
    inside = boxed(text)
    if inside is None:
        return None
    if inside:
        kinds = set(inside)
        if len(kinds) > _MOST_BOXES or any(len(one) > MOST for one in kinds):
            return None  # nobody's answer, and not worth the time to read
        return inside[0] if len(set(map(squeezed, kinds))) == 1 else None
    if len(text) > 2 * MOST:
        return text
    plain = _unwrapped(text.strip())
    return _unwrapped(_SAYS.sub("", plain, count=1) if _SAYS.match(plain) else plain)


def boxed(text: str) -> list[str] | None:
    r"""What is in the `\boxed{}`es of a text; None where one isn't closed."""
    found, end = [], 0
    while (match := _BOX.search(text, end)) is not None:
        depth, end = 1, match.end()
        while depth and end < len(text):
            depth += {"{": 1, "}": -1}.get(text[end], 0) * (text[end - 1] != "\\")
            end += 1
        if depth:
            return None
        found.append(text[match.end() : end - 1].strip())
    return found


def gold_of(text: str) -> str:
    r"""The answer in a data row's column: after `####`, in the last `\boxed{}`, or all of it."""
    if "####" in text:
        return text.rpartition("####")[2].strip()
    inside = boxed(text)
    return inside[-1] if inside else text.strip()


def clean(text: str) -> str:
    """One spelling: no layout commands, one kind of fraction, braces around exponents, text as such."""
    text = _SAME_RE.sub(lambda match: _SAME[match.group()], _unwrapped(text.strip()))
    text = _DEGREES.sub(" degrees", text)
    text = _TEXT.sub(r" \1 ", text)
    text = _SPACES.sub(" ", text)
    text = _BARE_FRAC.sub(lambda m: rf"\frac{_braced(m.group(1))}{_braced(m.group(2))}", text)
    text = _BARE_ROOT.sub(r"\\sqrt{\1}", text)
    text = _BARE_POWER.sub(r"^{\1}", text)
    text = _unwrapped(text.strip())
    return _VARIABLE.sub("", text, count=1) if _VARIABLE.match(text) else text


def squeezed(text: str) -> str:
    """A text as `clean` has it, without spaces: for comparing."""
    return clean(text).replace(" ", "")


def _braced(part: str) -> str:
    return part if part.startswith("{") else f"{{{part}}}"


def _unwrapped(text: str) -> str:
    """Without what only sets it off: dollars of math mode, stars, a full stop."""
    while True:
        shorter = text.removesuffix(".").strip()
        for before, after in _WRAPPED:
            inner = shorter[len(before) : -len(after)]
            if shorter.startswith(before) and shorter.endswith(after) and inner and before not in inner:
                shorter = inner.strip()
        if shorter == text:
            return text
        text = shorter
