"""What is wrong with a recipe, told so that it can be put right: where, what was found, what is allowed, what to read.

recipes/sft-20b.yaml:14: unknown key `train.lerning_rate`; did you mean `learning_rate`?
  allowed here: steps, epochs, learning_rate, ...        more: ossia explain train
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from pydantic import ValidationError

from ossia.config.keys import ANY_NAME, all_keys, children, nearest, nearest_key, value_in_words
from ossia.config.yaml_lines import KeyPath, dotted, parse_yaml
from ossia.errors import RecipeError

# pydantic's own codes that need words of ours; every other code says "found this, expected that type".
_CONSEQUENCE = "default_factory_not_called"  # another key of the section is wrong, and that is told already
_LATER = {("method", "dpo")}  # planned; saying so is kinder than a guess
_TAGS = ("list", "mapping", "[key]")


@dataclass(frozen=True, slots=True)
class Places:
    """Where each key of a recipe came from: a line of its file, or an override on the command line."""

    file: str
    lines: dict[KeyPath, int] = field(default_factory=dict)
    overrides: dict[KeyPath, str] = field(default_factory=dict)

    def of(self, path: KeyPath) -> str:
        """The place of a key, or of the nearest section around it that was written down: `my.yaml:14`."""
        for length in range(len(path), -1, -1):
            if path[:length] in self.overrides:
                return f"command line, {self.overrides[path[:length]]}"
            if path[:length] in self.lines:
                return f"{self.file}:{self.lines[path[:length]]}"
        return self.file

    def order(self, path: KeyPath) -> tuple[bool, int]:
        """Sorts findings as a reader meets them: the file's lines from the top, then the command line."""
        for length in range(len(path), -1, -1):
            if path[:length] in self.overrides:
                return True, list(self.overrides).index(path[:length])
            if path[:length] in self.lines:
                return False, self.lines[path[:length]]
        return False, 0


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing to put right: the key it is about, what was found, what is allowed, and what `ossia explain` knows."""

    path: KeyPath
    message: str
    allowed: str = ""
    explain: str = ""
    line: int | None = None  # of the file, where no key stands for it

    def text(self, places: Places) -> str:
        """The finding as it is shown, with its place in front."""
        more = f"more: ossia explain {self.explain}".rstrip() if self.allowed or self.explain else ""
        second = "        ".join(part for part in (self.allowed, more) if part)
        place = f"{places.file}:{self.line}" if self.line is not None else places.of(self.path)
        return f"{place}: {self.message}" + (f"\n  {second}" if second else "")


def recipe_error(findings: Iterable[Finding], places: Places) -> RecipeError:
    """One error with everything that was found, in the order of the file."""

    def order(finding: Finding) -> tuple[bool, int]:
        return places.order(finding.path) if finding.line is None else (False, finding.line)

    return RecipeError("\n".join(finding.text(places) for finding in sorted(findings, key=order)))


def from_pydantic(error: ValidationError, given: Any) -> list[Finding]:
    """pydantic's errors about `given` (the value that was validated) as findings, one a mistake; no combinations."""
    findings: list[Finding] = []
    seen: set[KeyPath] = set()
    for detail in error.errors(include_url=False):
        path, found = path_in(detail["loc"], given), detail["input"]
        if detail["type"] == "combination" or is_consequence(detail):
            continue
        if path not in seen:
            seen.add(path)
            findings.append(_finding(detail["type"], path, found, detail))
    return findings


def is_consequence(detail: Any) -> bool:
    """Whether one of pydantic's errors only follows from another: it has counted wrong entries as missing, say."""
    return detail["type"] == _CONSEQUENCE or (detail["type"] == "too_short" and bool(detail["input"]))


def schema_name(path: KeyPath) -> str:
    """The dotted name that `ossia explain` knows a key path by: ("data", 0, "path") -> "data.path"."""
    name = ""
    for piece in path:
        if isinstance(piece, int):
            continue
        inside = f"{name}.{piece}" if name else piece
        if inside not in all_keys() and any(key.startswith(f"{name}.{ANY_NAME}.") for key in all_keys()):
            inside = f"{name}.{ANY_NAME}"
        name = inside
    return name


def _explainable(name: str) -> str:
    while name and name not in all_keys():
        name = name.rpartition(".")[0]
    return name


def path_in(loc: tuple[int | str, ...], given: Any) -> KeyPath:
    """pydantic's location without what it adds: names of union branches, the index of an only entry."""
    path: list[str | int] = []
    value = given
    for piece in loc:
        entries = range(len(value)) if isinstance(value, (list, tuple)) else value if isinstance(value, dict) else ()
        if piece in entries:
            value = value[piece]
        elif piece in _TAGS or (isinstance(value, dict) and isinstance(piece, int)):
            continue
        path.append(piece)
    return tuple(path)


def clash_finding(path: KeyPath, message: str) -> Finding:
    """Values that don't go together, told at the key to blame."""
    return Finding(path, message, explain=_explainable(schema_name(path)))


def nearest_name(path: KeyPath) -> str | None:
    """The dotted name of the key that an unknown one was probably meant to be."""
    section = schema_name(path[:-1])
    meant = nearest_key(str(path[-1]), section)
    return f"{section}.{meant}" if section and meant in children(section) else meant


def _finding(code: str, path: KeyPath, found: Any, detail: Any) -> Finding:
    name, section = schema_name(path), schema_name(path[:-1])
    if code == "extra_forbidden":
        return unknown_key(path)
    if code == "missing":
        key = all_keys()[name]
        return Finding(path, f"`{dotted(path)}` is missing: {key.meaning}", f"expected: {key.type}", name)
    if code == "literal_error":
        return wrong_choice(path, found, re.findall(r"'([^']*)'", detail["ctx"]["expected"]))
    where = _explainable(name)
    known = all_keys().get(where)
    message = f"`{dotted(path)}` is {_shown(found)}{_hint(code, found)}"
    if name not in all_keys() and children(name):  # an entry of a mapping whose names are the user's
        return Finding(path, message, f"expected: a section with {', '.join(children(name))}", where)
    if known is None:
        return Finding(path, f"{message}; {detail['msg']}", explain=section)
    if known.section is not None and isinstance(path[-1], int):
        return Finding(path, message, f"expected: a section with {', '.join(children(where))}", where)
    return Finding(path, message, f"expected: {known.type}", where)


def unknown_key(path: KeyPath) -> Finding:
    """A key that its section doesn't have, with the one that was probably meant."""
    section, word = schema_name(path[:-1]), str(path[-1])
    if section and all_keys()[_explainable(section)].section is None and not children(section):
        return Finding(path, f"`{dotted(path[:-1])}` has no keys inside it", explain=_explainable(section))
    meant = nearest_key(word, section)
    guess = f"; did you mean `{meant}`?" if meant else ""
    allowed = f"allowed here: {', '.join(children(section))}"
    return Finding(path, f"unknown key `{dotted(path)}`{guess}", allowed, _explainable(section))


def wrong_choice(path: KeyPath, found: Any, allowed: list[str]) -> Finding:
    """A value that is none of those allowed, with the one that was probably meant."""
    meant = nearest(found, allowed) if isinstance(found, str) else None
    guess = f"; did you mean `{meant}`?" if meant else ""
    if path[-1] == found:  # the name of a mapping's entry is what is wrong
        message = f"`{dotted(path[:-1])}` has no `{found}`{guess}"
    else:
        later = isinstance(found, str) and (dotted(path), found) in _LATER
        message = f"`{dotted(path)}` is {_shown(found)}{', which Ossia cannot do yet' if later else guess}"
    return Finding(path, message, f"allowed: {', '.join(allowed)}", _explainable(schema_name(path)))


def _shown(found: Any) -> str:
    if isinstance(found, str):
        return f"the text '{found}'" if found else "empty"
    if isinstance(found, (list, tuple)):
        return "a list" if found else "an empty list"
    return value_in_words(found)


def _hint(code: str, found: Any) -> str:
    """What to write instead, where that is plain from what was found."""
    if code in ("int_type", "float_type") and isinstance(found, str):
        return "; write it without quotes" if isinstance(parse_yaml(found).value, int | float) else ""
    if code == "int_type" and isinstance(found, float) and found.is_integer():
        return f"; write {int(found)}"
    if code == "bool_type" and str(found).lower() in ("yes", "no", "on", "off", "1", "0"):
        return f"; write {'true' if str(found).lower() in ('yes', 'on', '1') else 'false'}"
    if code == "tuple_type" and isinstance(found, str):
        return f"; write [{found}]"
    return ""
