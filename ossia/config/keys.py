"""Every key of a recipe as data, read off the schema: its dotted name, type, default and limits in words.

`ossia explain`, docs/recipe.md and every error of the loader take their words from here, so they can't disagree.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from annotated_types import Ge, Gt, Le, Lt
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from ossia.config.schema import Recipe

ANY_NAME = "NAME"  # stands in a dotted name for the key of a mapping that the user names


@dataclass(frozen=True, slots=True)
class Key:
    """One key: its dotted name (list indices left out), its field, and the section inside it, if it has one."""

    name: str
    field: FieldInfo
    section: type[BaseModel] | None

    @property
    def meaning(self) -> str:
        """What the key means, one or two sentences."""
        return " ".join((self.field.description or "").split())

    @property
    def type(self) -> str:
        """What may be written, in words: `whole number, at least 1, or null`."""
        return _in_words(self.field.annotation, self.field.metadata)

    @property
    def default(self) -> str:
        """The default as it would be written, or in words where it depends on other keys; "" if it has to be given."""
        extra = self.field.json_schema_extra
        if isinstance(extra, dict) and "default_in_words" in extra:
            return str(extra["default_in_words"])
        return "" if self.field.is_required() else value_in_words(self.field.default)


@cache
def all_keys() -> dict[str, Key]:
    """Every key of a recipe by its dotted name, in the schema's order, a section before what is in it."""
    return {key.name: key for key in _walk(Recipe, "")}


def children(name: str) -> list[str]:
    """Names that are allowed inside section `name` ("" is the recipe itself)."""
    prefix = f"{name}." if name else ""
    inside = [key.removeprefix(prefix) for key in all_keys() if key.startswith(prefix)]
    return [key for key in inside if "." not in key and key != ANY_NAME]


def nearest(word: str, candidates: Iterable[str]) -> str | None:
    """The candidate that `word` was probably meant to be (close in letters, or its initials), or None."""
    plain = word.lower().replace("-", "_")
    by_plain = {candidate.lower().replace("-", "_"): candidate for candidate in candidates}
    close = difflib.get_close_matches(plain, by_plain, n=1, cutoff=0.55)
    if close:
        return by_plain[close[0]]
    initials = {"".join(part[0] for part in name.split("_") if part): name for name in by_plain if "_" in name}
    return by_plain[initials[plain]] if plain in initials else None


def nearest_key(word: str, section: str) -> str | None:
    """The key that `word` in `section` was meant to be: one of the section's own, or the dotted name of another's."""
    own = nearest(word, children(section))
    if own is not None:
        return own
    elsewhere: dict[str, str] = {}
    for name in all_keys():
        elsewhere.setdefault(name.rpartition(".")[2], name)
    exact = nearest(word, elsewhere)
    return elsewhere[exact] if exact is not None else None


def value_in_words(value: Any) -> str:
    """A value as it would be written in a recipe; a section is only named as one."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(value_in_words(entry) for entry in value)}]"
    if isinstance(value, (dict, BaseModel)):
        return "a section"
    if isinstance(value, str) and (not value or value.strip() != value):
        return f"'{value}'"
    return str(value)


def _walk(model: type[BaseModel], prefix: str) -> Iterator[Key]:
    for name, field in model.model_fields.items():
        section, named = _section_in(field.annotation)
        key = Key(f"{prefix}{field.alias or name}", field, None if named else section)
        yield key
        if section is not None:
            yield from _walk(section, f"{key.name}.{ANY_NAME}." if named else f"{key.name}.")


def _section_in(annotation: Any) -> tuple[type[BaseModel] | None, bool]:
    """The section that a field holds, if any, and whether it is the value of a mapping with names of the user's."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation, False
    named = get_origin(annotation) is dict
    for part in get_args(annotation):
        section, deeper = _section_in(part)
        if section is not None:
            return section, named or deeper
    return None, False


def _in_words(annotation: Any, limits: Iterable[Any] = ()) -> str:
    origin, parts = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _in_words(parts[0], (*limits, *parts[1:]))
    if origin in (Union, UnionType):
        words = [_in_words(part, limits) for part in parts if part is not NoneType]
        return ", or ".join([*words, "null"] if NoneType in parts else words)
    if origin is Literal:
        return " | ".join(str(part) for part in parts)
    if origin is tuple:
        section = _section_in(parts[0])[0]
        return "section, or list of sections" if section is not None else f"list of {_in_words(parts[0])}"
    if origin is dict and get_origin(parts[0]) is Literal:
        return f"mapping from such a name to its {', '.join(parts[1].model_fields)}"
    plain = {
        bool: "true or false", int: "whole number", float: "number", str: "text", Path: "path",
    }  # fmt: skip
    name = plain.get(annotation) or ("section" if _section_in(annotation)[0] is not None else "mapping")
    return ", ".join([name, *(word for limit in limits for word in _limit_in_words(limit))])


def _limit_in_words(limit: Any) -> list[str]:
    match limit:
        case Ge(bound):
            return [f"at least {_number(bound)}"]
        case Gt(bound):
            return [f"above {_number(bound)}"]
        case Le(bound):
            return [f"at most {_number(bound)}"]
        case Lt(bound):
            return [f"below {_number(bound)}"]
        case FieldInfo():
            return [word for inner in limit.metadata for word in _limit_in_words(inner)]
        case _:
            return []


def _number(bound: Any) -> str:
    return str(bound) if isinstance(bound, int) else f"{bound:g}"
