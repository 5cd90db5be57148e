"""Words about the recipe's keys: for the terminal (`ossia explain`) and for docs/recipe.md, from the schema alone."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator

from ossia.config.keys import Key, all_keys, children, nearest, nearest_key
from ossia.errors import RecipeError

_WIDTH = 100


def explain(key: str | None = None) -> str:
    """What a recipe's keys are.

    key      a dotted name (`train.learning_rate`), a section (`train`), a last part that only one key has
             (`learning_rate`), or None for a list of all keys
    Returns  text for a terminal, ending in a newline
    Raises   RecipeError for a key that doesn't exist, naming the nearest
    """
    if key is None:
        lines = [f"{name:<28} {_default(entry)}" for name, entry in _told_once()]
        head = "Every key of a recipe and its default. More on one, or on a section: ossia explain KEY\n"
        return "\n".join([head, *lines]) + "\n"
    found = _find(key)
    if found.section is None:
        return _paragraph(found)
    inside = [all_keys()[f"{found.name}.{name}"] for name in children(found.name)]
    return "\n".join([_paragraph(found), *(_paragraph(entry) for entry in inside)])


def recipe_page() -> str:
    """docs/recipe.md: every key with type, default and meaning, as Markdown tables, one a section."""
    parts = [
        "# The recipe, key by key",
        "Written by `ossia explain --markdown` from the schema (`ossia/config/schema.py`); don't edit it by hand.\n"
        "`model` and `data` have to be given, every other key has a default. Paths start at the current folder.\n"
        "The command line sets any key with `key=value`: `ossia train my.yaml train.steps=100 data.0.path=x.jsonl`.",
    ]
    tables: dict[str, list[str]] = {}
    for name, entry in _told_once():
        section, _, last = name.rpartition(".")
        if entry.section is None:
            cells = (f"`{last}`", entry.type, entry.default or "(has to be given)", entry.meaning)
            rows = tables.setdefault(section, ["| key | type | default | meaning |", "|---|---|---|---|"])
            rows.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    for section, rows in tables.items():
        intro = all_keys()[section].meaning if section in all_keys() else ""
        parts += [f"## `{section}`" if section else "## Top level", intro, "\n".join(rows)]
    return "\n\n".join(part for part in parts if part) + "\n"


def _told_once() -> Iterator[tuple[str, Key]]:
    """All keys, top level first; a section that is used in two places (`data`, `eval.data`) is told in the first."""
    told: set[type] = set()
    hidden: list[str] = []
    entries = sorted(all_keys().items(), key=lambda item: item[1].section is not None or "." in item[0])
    for name, entry in entries:
        if any(name.startswith(prefix) for prefix in hidden):
            continue
        if entry.section in told:
            hidden.append(f"{name}.")
        elif entry.section is not None:
            told.add(entry.section)
        yield name, entry


def _find(key: str) -> Key:
    keys = all_keys()
    if key in keys:
        return keys[key]
    same_end = [entry for name, entry in keys.items() if name.rpartition(".")[2] == key]
    first_sections = {entry.field.description: entry for entry in reversed(same_end)}
    if len(first_sections) == 1:
        return next(iter(first_sections.values()))
    if same_end:
        raise RecipeError(f"`{key}` is the name of several keys: {', '.join(entry.name for entry in same_end)}")
    section, _, last = key.rpartition(".")
    meant = nearest(key, keys) or nearest_key(last, section if section in keys else "")
    guess = f"; did you mean `{meant}`?" if meant else ""
    raise RecipeError(f"a recipe has no key `{key}`{guess}\n  all keys: ossia explain")


def _default(entry: Key) -> str:
    if entry.section is not None:
        return entry.meaning
    return entry.default or "(has to be given)"


def _paragraph(entry: Key) -> str:
    rows = [("type", entry.type)]
    if entry.section is None or not entry.field.is_required():
        rows.append(("default", entry.default or "none: it has to be given"))
    if entry.section is not None:
        rows = [("keys", ", ".join(children(entry.name)))]
    lines = [entry.name, *textwrap.wrap(entry.meaning, _WIDTH, initial_indent="  ", subsequent_indent="  ")]
    for label, words in rows:
        lines += textwrap.wrap(words, _WIDTH, initial_indent=f"  {label + ':':<9}", subsequent_indent=" " * 11)
    return "\n".join(lines) + "\n"
