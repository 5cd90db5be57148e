"""A recipe from its file and the overrides on the command line, or one error that names everything wrong with them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ossia.config.draft import Draft, draft_of
from ossia.config.findings import Finding, Places, recipe_error, schema_name
from ossia.config.keys import all_keys, nearest
from ossia.config.schema import Recipe
from ossia.config.yaml_lines import KeyPath, dotted, parse_yaml
from ossia.errors import RecipeError

_SOURCES: tuple[KeyPath, ...] = (("data",), ("eval", "data"))


def load_recipe(path: Path, overrides: Sequence[str] = ()) -> Recipe:
    """The recipe in a YAML file.

    path       the file
    overrides  `key=value` as on the command line: dotted keys, list entries by number (`data.0.path=x`), YAML values
    Returns    the recipe with every default filled in; `output` is runs/NAME of the file where it isn't given
    Raises     RecipeError with all that is wrong, one `file:line: ...` a finding
    """
    return read_recipe(path, overrides)[0]


def read_recipe(path: Path, overrides: Sequence[str] = ()) -> tuple[Recipe, Places]:
    """As `load_recipe`, and where each key came from, for errors that are found later (`check_recipe`)."""
    draft = draft_recipe(path, overrides)
    return _settled(draft), draft.places


def draft_recipe(path: Path, overrides: Sequence[str] = ()) -> Draft:
    """What can be read of a recipe's file, with all that is wrong. Raises RecipeError if that is nothing."""
    parsed = parse_yaml(recipe_file_text(path))
    places = Places(str(path), dict(parsed.lines))
    problems = [Finding((), problem.message, line=problem.line) for problem in parsed.problems]
    if problems and not isinstance(parsed.value, dict):
        raise recipe_error(problems, places)
    if parsed.value is None:
        raise RecipeError(f"{path}: the file is empty; a recipe needs `model` and `data`        more: ossia explain")
    if not isinstance(parsed.value, dict):
        raise RecipeError(f"{path}:1: a recipe is a mapping of keys to values, `model: ...`        more: ossia explain")
    given: dict[str, Any] = parsed.value
    doubtful = [problem.path for problem in parsed.problems]
    for text in overrides:
        if (found := _override(given, text, places)) is not None:
            problems.append(found)
            doubtful.append(_key_path(text.partition("=")[0]))
    given.setdefault("output", f"runs/{path.stem}")
    return draft_of(given, places, problems, doubtful)


def recipe_from_dict(given: Mapping[str, Any], name: str = "recipe") -> Recipe:
    """A recipe from plain values, as `ossia.train({...})` takes it; `name` stands for the file in errors.

    Raises  RecipeError with all that is wrong
    """
    return _settled(draft_from_dict(given, name))


def recipe_with(recipe: Recipe, overrides: Sequence[str]) -> Recipe:
    """A recipe with some of its keys set, `key=value` as on the command line. Raises RecipeError."""
    given, places = recipe.model_dump(mode="json", by_alias=True), Places("recipe")
    problems = [found for text in overrides if (found := _override(given, text, places)) is not None]
    return _settled(draft_of(given, places, problems, []))


def draft_from_dict(given: Mapping[str, Any], name: str = "recipe") -> Draft:
    """As `draft_recipe`, from plain values."""
    return draft_of(dict(given), Places(name), [], [])


def _settled(draft: Draft) -> Recipe:
    if draft.findings:
        raise recipe_error(draft.findings, draft.places)
    assert draft.recipe is not None
    return draft.recipe


def _key_path(name: str) -> KeyPath:
    return tuple(int(piece) if piece.isdigit() else piece for piece in name.split(".") if piece)


def recipe_file_text(path: Path) -> str:
    """The text of a YAML file that the user named. Raises RecipeError if there is none."""
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        folder = path.parent
        names = [entry.name for entry in folder.iterdir()] if folder.is_dir() else []
        meant = nearest(path.name, names)
        guess = f"; did you mean {folder / meant}?" if meant else f" (the current folder is {Path.cwd()})"
        raise RecipeError(f"{path}: no such recipe{guess}") from None
    except IsADirectoryError:
        raise RecipeError(f"{path}: this is a folder; name the recipe's YAML file in it") from None
    except UnicodeDecodeError as error:
        raise RecipeError(f"{path}: not UTF-8 text (byte {error.start}); is it a recipe?") from None
    except OSError as error:
        raise RecipeError(f"{path}: can't be read: {error.strerror}") from None


def _override(tree: dict[str, Any], text: str, places: Places) -> Finding | None:
    """Sets one `key=value` in the tree and notes where it came from; a finding if that can't be done."""
    name, equals, raw = text.partition("=")
    here: KeyPath = (f"override {text}",)
    places.overrides[here] = text
    if not equals or not name:
        return Finding(here, "an override is written key=value, for example train.steps=100", explain="train.steps")
    parsed = parse_yaml(raw)
    if parsed.problems:
        return Finding(here, f"the value of `{name}` is {parsed.problems[0].message}")
    container, path, problem = _descend(tree, name.split("."), text, places)
    if problem:
        return Finding(here, problem)
    if first := _set_before(container, path, text, places):
        return Finding(here, f"`{dotted(path)}` is set twice, also by {first}; keep one")
    for stale in [known for known in places.lines if known[: len(path)] == path]:
        del places.lines[stale]
    places.overrides[path] = text
    container[path[-1]] = parsed.value
    return None


def _set_before(container: Any, path: KeyPath, text: str, places: Places) -> str:
    """The override that set this very key already, itself or with the section around it; "" if none did."""
    if places.overrides.get(path, text) != text:
        return places.overrides[path]
    if not isinstance(container, dict) or path[-1] not in container:
        return ""
    around = (places.overrides.get(path[:length], "") for length in range(len(path) - 1, 0, -1))
    return next((other for other in around if other and _sets_whole(other, path)), "")


def _sets_whole(override: str, path: KeyPath) -> bool:
    """Whether an override sets a section that `path` is in, rather than a key of that section."""
    name = override.partition("=")[0]
    return any(name == dotted(path[:length]) for length in range(1, len(path)))


def _descend(tree: dict[str, Any], pieces: list[str], text: str, places: Places) -> tuple[Any, KeyPath, str]:
    """The mapping or list that holds the last piece, the whole key path, and what is in the way ("" if nothing is)."""
    container: Any = tree
    path: KeyPath = ()
    for i, piece in enumerate(pieces):
        last = i == len(pieces) - 1
        if isinstance(container, list):
            if not piece.isdigit() or int(piece) >= len(container):
                problem = f"`{dotted(path)}` is a list of {len(container)}; its entries are numbered from 0"
                return container, path, f"{problem}: {dotted((*path, 0, *pieces[i + piece.isdigit() :]))}"
            step: str | int = int(piece)
        elif isinstance(container, dict):
            if piece == "0" and not last and path in _SOURCES:
                continue  # one source, written without a list around it
            key = all_keys().get(schema_name(path))
            if piece.isdigit() and key is not None and "list of" in key.type:
                whole = f"{dotted(path)}=[{text.partition('=')[2]}]"
                return container, path, f"`{dotted(path)}` is a list, which is set as a whole: {whole}"
            step = piece
            if not last and container.get(step) is None:
                container[step] = {}
                places.overrides.setdefault((*path, step), text)
        else:
            return container, path, f"`{dotted(path)}` is {container!r}, which has no keys inside it"
        path = (*path, step)
        if not last:
            if isinstance(container[step], str) and (path in _SOURCES or path[:-1] in _SOURCES):
                container[step] = {"path": container[step]}  # a source that was written as its path alone
            container = container[step]
    return container, path, ""
