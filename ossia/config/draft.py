"""A recipe with mistakes, read as far as it goes, so that mistakes of different kinds and sections are told at once.

Keys are compared with each other, and with what is on the machine, only where they are valid by themselves. So what is
wrong is noted and taken out, and the rest is read again, until it is a recipe. Nothing is told that may only follow
from another mistake: neither of a key that was taken out, nor of one that isn't given while an unknown key may mean it.
"""

from __future__ import annotations

from collections.abc import Iterator
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any

from pydantic import ValidationError

from ossia.config.findings import (
    Finding,
    Places,
    clash_finding,
    from_pydantic,
    is_consequence,
    nearest_name,
    path_in,
    schema_name,
)
from ossia.config.schema import Recipe
from ossia.config.section import Clash, listed
from ossia.config.yaml_lines import KeyPath

_STAND_IN = "?"  # for a text that has to be given


@dataclass(slots=True)
class Doubts:
    """Which keys a reader can't be sure of.

    taken_out  those of which a mistake was told
    meant      schema names that unknown keys were probably meant to be; `anything` if nobody can tell what they meant
    """

    given: dict[str, Any]
    taken_out: list[KeyPath] = field(default_factory=list)
    meant: list[str] = field(default_factory=list)
    anything: bool = False

    def trusts(self, path: KeyPath) -> bool:
        """Whether the value of a key, or its absence, is what the user wants."""
        if any(path[: len(gone)] == gone for gone in self.taken_out):
            return False
        if _holds(self.given, path):
            return True
        name = schema_name(path)
        related = (f"{meant}.".startswith(f"{name}.") or f"{name}.".startswith(f"{meant}.") for meant in self.meant)
        return not self.anything and not any(related)

    def add_unknown(self, path: KeyPath) -> None:
        """Note an unknown key."""
        meant = nearest_name(path)
        if meant is None:
            self.anything = True
        else:
            self.meant.append(meant)


@dataclass(frozen=True, slots=True)
class Draft:
    """What could be read of a recipe, and everything wrong with it; `recipe` is None if too little could be."""

    recipe: Recipe | None
    places: Places
    findings: list[Finding]
    doubts: Doubts


def draft_of(given: dict[str, Any], places: Places, findings: list[Finding], doubtful: list[KeyPath]) -> Draft:
    """Read `given`, the values of a file and of overrides.

    findings  what is wrong already
    doubtful  keys that these are about; () for one that nobody knows
    """
    tree = deepcopy(given)
    for section, key, name in ((tree, "data", "path"), (tree.get("eval"), "data", "path"), (tree, "env", "id")):
        if isinstance(section, dict) and key in section:  # as it is read
            section[key] = listed(section[key], name)
    doubts = Doubts(deepcopy(tree), [path for path in doubtful if path], anything=() in doubtful)
    findings = [*findings]
    for attempt in range(_leaves(tree) + 1):
        try:
            return Draft(Recipe.model_validate(tree), places, findings, doubts)
        except ValidationError as error:
            if attempt == 0:
                findings += from_pydantic(error, given)
            if not _take_out(error, tree, doubts, findings):
                break
    return Draft(None, places, findings, doubts)


def _take_out(error: ValidationError, tree: dict[str, Any], doubts: Doubts, findings: list[Finding]) -> bool:
    """Take what is wrong out of the tree, and add the clashes among it that are told; False if nothing was left to."""
    before = deepcopy(tree)
    details = error.errors(include_url=False)
    for detail in details:
        if detail["type"] == "combination" or is_consequence(detail):
            continue
        path = path_in(detail["loc"], before)
        if detail["type"] == "extra_forbidden":
            doubts.add_unknown(path)
        else:
            doubts.taken_out.append(path)
        _remove(tree, path)
    for path, clash in _clashes(details, before):
        keys = [(*path, *key.split(".")) for key in clash.keys]
        if all(map(doubts.trusts, keys)):
            findings.append(clash_finding(keys[0], clash.message))
            doubts.taken_out.append(keys[0])
        for key in keys if not _holds(tree, keys[0]) else keys[:1]:
            _remove(tree, key)
    return tree != before


def _clashes(details: list[Any], tree: dict[str, Any]) -> Iterator[tuple[KeyPath, Clash]]:
    for detail in details:
        if detail["type"] == "combination":
            for clash in detail["ctx"]["clashes"]:
                yield path_in(detail["loc"], tree), clash


def _holds(tree: Any, path: KeyPath) -> bool:
    """Whether there is a key of this path."""
    for piece in path:
        keys = tree if isinstance(tree, dict) else range(len(tree)) if isinstance(tree, list) else ()
        if piece not in keys:
            return False
        tree = tree[piece]
    return True


def _remove(tree: dict[str, Any], path: KeyPath) -> None:
    """Take a key out, or put a stand-in in its place where a recipe can't be without it."""
    inside = path[1:] if path[:1] == ("eval",) else path  # `data` here and there
    if inside[:1] == ("data",) and len(inside) <= 2 and (len(inside) == 2 or inside == path):
        _set(tree, path, {"path": _STAND_IN} if len(inside) == 2 else [{"path": _STAND_IN}])
    elif path == ("model",) or (inside[:1] == ("data",) and inside[2:] == ("path",)):
        _set(tree, path, _STAND_IN)
    else:
        while path and isinstance(path[-1], int):
            path = path[:-1]  # a list is only good as a whole
        container: Any = tree
        for piece in path[:-1]:
            if not _holds(container, (piece,)):
                return
            container = container[piece]
        if isinstance(container, dict) and path:
            container.pop(path[-1], None)


def _set(tree: Any, path: KeyPath, value: Any) -> None:
    for piece in path[:-1]:
        tree = tree[piece]
    tree[path[-1]] = value


def _leaves(tree: Any) -> int:
    entries = tree.values() if isinstance(tree, dict) else tree if isinstance(tree, list) else ()
    return 1 + sum(map(_leaves, entries))
