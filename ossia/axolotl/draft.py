"""What an import is made with: Axolotl's values by key, the recipe that grows from them, what became of every key.

A mapper reads values through the draft and says what became of them. What no mapper has said anything about when all
are done is answered from the tables of `keys.py`, so no key can be passed over in silence.
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from ossia.config.keys import value_in_words
from ossia.config.yaml_lines import KeyPath, dotted

EMPTY = "empty: nothing to carry over"


class Fate(StrEnum):
    """What became of a key."""

    mapped = "mapped"
    not_needed = "not needed"
    not_supported = "not supported"
    unknown = "unknown to Axolotl"


@dataclass(frozen=True, slots=True)
class Verdict:
    """One key of the file, its value, and what became of it; `line` of the file, counted from 1."""

    path: KeyPath
    value: str
    fate: Fate
    words: str
    line: int | None

    @property
    def key(self) -> str:
        """The key as people write it: `datasets.0.path`."""
        return dotted(self.path)


@dataclass(slots=True)
class Draft:
    """An import on its way.

    given     the file's values; lines: of each key path in it
    recipe    what has been mapped; notes: the comment behind each of its keys; origin: the key it came from
    verdicts  by leaf of `given`
    defaults  Axolotl's defaults that had to be written out, as (key and value, what became of it)
    remarks   what to look at before training
    """

    name: str
    given: dict[str, Any]
    lines: dict[KeyPath, int]
    gpus: int
    recipe: dict[str, Any] = field(default_factory=dict)
    notes: dict[KeyPath, str] = field(default_factory=dict)
    origin: dict[KeyPath, KeyPath] = field(default_factory=dict)
    verdicts: dict[KeyPath, Verdict] = field(default_factory=dict)
    defaults: list[tuple[str, str]] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)

    # --- reading --------------------------------------------------------------------------------------------------

    def get(self, *path: str | int) -> Any:
        """The value at a path; None where it is absent or empty."""
        value: Any = self.given
        for piece in path:
            inside = value if isinstance(value, dict) else dict(enumerate(value)) if isinstance(value, list) else {}
            value = inside.get(piece)
        return value

    def number(self, *path: str | int) -> float | None:
        """A number, also one that is written as text; anything else is told to be none."""
        value = self.get(*path)
        if isinstance(value, str):
            with suppress(ValueError):
                value = float(value)
        if value is None or (isinstance(value, int | float) and not isinstance(value, bool)):
            return value
        self.refuse(path, "expected a number; set the key of the recipe yourself")
        return None

    def whole(self, *path: str | int) -> int | None:
        """A whole number; anything else is told to be none."""
        value = self.number(*path)
        if value is not None and not float(value).is_integer():
            self.refuse(path, "expected a whole number; set the key of the recipe yourself")
            return None
        return None if value is None else int(value)

    def flag(self, *path: str | int) -> bool | None:
        """True or false; Axolotl reads YAML 1.1, where yes, no, on and off are such too. Other values count as true."""
        value = self.get(*path)
        if isinstance(value, str) and value.lower() in ("yes", "on", "no", "off"):
            return value.lower() in ("yes", "on")
        return None if value is None else bool(value)

    def text(self, *path: str | int) -> str | None:
        """Text; anything else is told to be none."""
        value = self.get(*path)
        if value is not None and not isinstance(value, str):
            self.refuse(path, "expected text; set the key of the recipe yourself")
            return None
        return value or None

    # --- saying ---------------------------------------------------------------------------------------------------

    def put(self, key: KeyPath, value: Any, note: str, came_from: KeyPath = ()) -> None:
        """Set a key of the recipe, with the comment behind it."""
        container = self.recipe
        for piece in key[:-1]:
            container = container.setdefault(piece, {})
        container[key[-1]] = value
        self.notes[key] = note
        self.origin[key] = came_from

    def map(self, path: KeyPath, key: KeyPath, value: Any, words: str = "") -> None:
        """A key became one of the recipe's."""
        self.put(key, value, dotted(path), path)
        self.tell(path, key, value, words)

    def tell(self, path: KeyPath, key: KeyPath, value: Any, words: str = "") -> None:
        """As `map`, of a value that the caller puts into the recipe itself."""
        self.notes.setdefault(key, dotted(path))
        self.origin.setdefault(key, path)
        shown = f"{dotted(key)}: {value_in_words(value)}"
        self.say(path, Fate.mapped, f"{shown}; {words}" if words else shown)

    def skip(self, path: KeyPath, why: str) -> None:
        """A key isn't needed."""
        self.say(path, Fate.not_needed, why)

    def refuse(self, path: KeyPath, instead: str) -> None:
        """A key isn't supported; `instead` says what to do."""
        self.say(path, Fate.not_supported, instead)

    def default(self, what: str, key: KeyPath, value: Any) -> None:
        """A default of Axolotl's that isn't Ossia's, written out."""
        self.put(key, value, f"Axolotl's default ({what})")
        self.defaults.append((what, f"{dotted(key)}: {value_in_words(value)}"))

    def say(self, path: KeyPath, fate: Fate, words: str) -> None:
        """A verdict about a key, or everything inside a section. The first one stands; what is empty gets none."""
        for leaf in leaves(self.get(*path), path):
            if leaf not in self.verdicts and self.get(*leaf) is not None:
                shown = value_in_words(self.get(*leaf))
                self.verdicts[leaf] = Verdict(leaf, shown, fate, words, self.lines.get(leaf))

    def is_open(self, path: KeyPath) -> bool:
        """Whether nothing has been said about a key yet."""
        return path not in self.verdicts


def leaves(value: Any, path: KeyPath = ()) -> list[KeyPath]:
    """The paths of what holds a value: scalars, lists of scalars, and empty sections."""
    if isinstance(value, dict) and value:
        return [leaf for key, inside in value.items() for leaf in leaves(inside, (*path, key))]
    if isinstance(value, list) and any(isinstance(entry, dict | list) for entry in value):
        return [leaf for number, inside in enumerate(value) for leaf in leaves(inside, (*path, number))]
    return [path]
