"""An import in words: the recipe as commented YAML, and the table of what became of every key."""

from __future__ import annotations

import json
import re
import textwrap
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from ossia.axolotl.draft import Draft, Fate, Verdict
from ossia.config.keys import children
from ossia.config.yaml_lines import KeyPath, parse_yaml

if TYPE_CHECKING:
    from ossia.axolotl.read import Imported

_WIDTH = 120
_COMMENT_COLUMN = 50
_PLAIN = re.compile(r"[A-Za-z.][A-Za-z0-9_./-]*")
_TITLES = {
    Fate.mapped: "mapped",
    Fate.not_needed: "not needed",
    Fate.not_supported: "not supported: what to do",
    Fate.unknown: "no key of Axolotl's, which ignores it without a word",
}


def recipe_text(draft: Draft) -> str:
    """The recipe as YAML: a head that says where it is from and what was left out, the source of each key behind it."""
    left = [one for one in draft.verdicts.values() if one.fate in (Fate.not_supported, Fate.unknown)]
    head = [f"From {draft.name}, an Axolotl config, by `ossia import-recipe`. Behind a key: what it came from."]
    head += [f"Look at: {remark}" for remark in draft.remarks]
    for words in dict.fromkeys(one.words for one in left):
        keys = ", ".join(f"{one.key}: {one.value}" for one in left if one.words == words)
        head.append(f"Not carried over: {keys}; {words}")
    lines = [line for text in head for line in textwrap.wrap(_one_line(text), _WIDTH - 2, subsequent_indent="  ")]
    body = "\n".join(_section(draft, draft.recipe, (), ""))
    text = "\n".join(f"# {line}" for line in lines) + f"\n\n{body}\n"
    parsed = parse_yaml(text)
    assert not parsed.problems, parsed.problems
    assert parsed.value == draft.recipe, "what was written has to read back as the same"
    return text


def _section(draft: Draft, section: dict[str, Any], path: KeyPath, indent: str) -> Iterator[str]:
    names = children(".".join(str(piece) for piece in path if isinstance(piece, str)))
    for key in sorted(section, key=lambda key: names.index(key) if key in names else len(names)):
        value, here = section[key], (*path, key)
        if isinstance(value, dict) and value:
            yield f"{indent}{_scalar(key)}:"
            yield from _section(draft, value, here, f"{indent}  ")
        elif isinstance(value, list | tuple) and any(isinstance(entry, dict) for entry in value):
            yield f"{indent}{key}:"
            for number, entry in enumerate(value):
                lines = list(_section(draft, entry, (*here, number), f"{indent}    "))
                yield f"{indent}  - {lines[0].lstrip()}"
                yield from lines[1:]
        else:
            line = f"{indent}{_scalar(key)}: {_scalar(value)}"
            note = _one_line(draft.notes.get(here, ""))
            yield f"{line:<{_COMMENT_COLUMN}}  # {note}" if note else line


def _scalar(value: Any) -> str:
    """A value on one line, as this and every other YAML reader understands it."""
    if isinstance(value, list | tuple):
        return f"[{', '.join(_scalar(entry) for entry in value)}]"
    if isinstance(value, bool) or value is None:
        return json.dumps(value)
    if isinstance(value, float):
        text = repr(value)
        return text.replace("e", ".0e") if "e" in text and "." not in text else text
    if isinstance(value, str) and _PLAIN.fullmatch(value) and isinstance(parse_yaml(value).value, str):
        return value if value.lower() not in ("yes", "no", "on", "off", "y", "n") else json.dumps(value)
    return json.dumps(value, ensure_ascii=True)


def as_text(imported: Imported) -> str:
    """What became of every key, in lines for a terminal, what needs a decision last."""
    counts = [(fate, [one for one in imported.verdicts if one.fate is fate]) for fate in Fate]
    lines = []
    for fate, found in counts:
        if found:
            lines += [f"{_TITLES[fate]} ({len(found)})", *_table([(_key(one), one.value, one.words) for one in found])]
    if imported.defaults:
        lines += ["Axolotl's defaults that aren't Ossia's, written out", *_table(imported.defaults_as_rows)]
    for remark in imported.remarks:
        lines += textwrap.wrap(f"look at: {remark}", _WIDTH, subsequent_indent="  ")
    numbers = ", ".join(f"{len(found)} {fate.value}" for fate, found in counts if found)
    return "\n".join([*lines, f"{imported.name}: {len(imported.verdicts)} keys: {numbers}"])


def _key(verdict: Verdict) -> str:
    return verdict.key if verdict.line is None else f"{verdict.line}: {verdict.key}"


def _table(rows: Sequence[tuple[str, str, str]]) -> Iterator[str]:
    """Key, value and words in columns; what doesn't fit goes on below its own column."""
    width = min(max(len(key) for key, _, _ in rows), 48)
    values = min(max(len(value) for _, value, _ in rows), 24)
    before = ""
    for key, value, words in rows:
        words, before = ("as above" if words == before else words), words
        short = value if len(value) <= values else f"{value[: values - 3]}..."
        lead = f"  {key:<{width}}  {_one_line(short):<{values}}  "
        room = max(_WIDTH - width - values - 6, 40)
        first, *rest = textwrap.wrap(_one_line(words), room) or [""]
        yield (lead + first).rstrip()
        yield from (f"{'':<{width + values + 6}}{line}" for line in rest)


def _one_line(text: str) -> str:
    return " ".join(text.split())
