"""Checks of a recipe against this machine before any weight is read: files, folders and config.json only."""

from __future__ import annotations

import json
import re
from pathlib import Path

from ossia.config.findings import Finding, Places, recipe_error, schema_name
from ossia.config.keys import nearest, value_in_words
from ossia.config.load import load_recipe
from ossia.config.schema import DataSourceConfig, Recipe
from ossia.config.yaml_lines import KeyPath, dotted
from ossia.errors import RecipeError

DATA_SUFFIXES = (".jsonl", ".jsonl.gz", ".ndjson", ".json", ".parquet")
RECIPE_IN_RUN = "recipe.yaml"
_FREE_ON_RESUME = ("output", "train.save_every", "train.keep")  # they change no number of the run


def check_recipe(
    recipe: Recipe,
    places: Places | None = None,
    *,
    resume: bool = False,
    writes: bool = True,
    model_folder: Path | None = None,
) -> None:
    """Refuses a recipe that can't run here, with everything that is in the way.

    recipe        as loaded
    places        where its keys came from, for the errors (from `read_recipe`); None: errors name the keys only
    resume        the run goes on in an output folder that holds it already
    writes        whether the output folder is going to be written (not by `ossia data` and `ossia eval`)
    model_folder  where a hub model's files are, once they are on this machine; a local `model` is its own folder
    Raises        RecipeError: model folder missing or without config.json; `max_length` over the model's limit; a data
                  file that is not there; an output folder that holds another run
    """
    findings = _model(recipe, model_folder)
    for i, source in enumerate(recipe.data):
        findings += _source(source, ("data", i, "path"))
    for i, source in enumerate(recipe.eval.data or ()):
        findings += _source(source, ("eval", "data", i, "path"))
    if recipe.adapter is not None and recipe.adapter.init_from is not None:
        findings += _adapter(recipe.adapter.init_from)
    if writes:
        findings += _output(recipe, resume)
    if findings:
        raise recipe_error(findings, places or Places("recipe"))


def is_hub_name(name: str) -> bool:
    """Whether a `model` or `path` means a Hugging Face repository: `owner/name`, and nothing of that name is here.

    A name that starts like a path (`./`, `/`, `~`), ends like a data file, or begins with an existing folder is local.
    """
    path = Path(name).expanduser()
    looks_like_one = re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", name) is not None
    return looks_like_one and not path.exists() and not name.endswith(DATA_SUFFIXES) and not path.parent.exists()


def _missing(path: KeyPath, name: str, what: str, otherwise: str) -> Finding:
    place = Path(name).expanduser()
    if not place.parent.is_dir():
        here = f"the folder {place.parent} is not there either (the current folder is {Path.cwd()})"
        return Finding(path, f"`{dotted(path)}`: there is no {what} {name}; {here}", otherwise, schema_name(path))
    meant = nearest(place.name, [entry.name for entry in place.parent.iterdir()])
    guess = f"; did you mean {place.parent / meant}?" if meant else f" (the current folder is {Path.cwd()})"
    return Finding(path, f"`{dotted(path)}`: there is no {what} {name}{guess}", otherwise, schema_name(path))


def _model(recipe: Recipe, model_folder: Path | None) -> list[Finding]:
    if model_folder is None:
        if is_hub_name(recipe.model):
            return []
        model_folder = Path(recipe.model).expanduser()
    if not model_folder.exists():
        allowed = "allowed: a checkpoint's folder, or owner/name on the Hugging Face hub"
        return [_missing(("model",), recipe.model, "folder", allowed)]
    config_file = model_folder / "config.json"
    if not config_file.is_file():
        return [Finding(("model",), f"`model`: {model_folder} has no config.json, so it is no checkpoint folder")]
    try:
        config = json.loads(config_file.read_text(encoding="utf-8"))
    except ValueError as error:
        return [Finding(("model",), f"`model`: {config_file} is not valid JSON: {error}")]
    limit = config.get("max_position_embeddings") if isinstance(config, dict) else None
    if isinstance(limit, int) and recipe.max_length > limit:
        message = f"`max_length` is {recipe.max_length}, over the {limit} positions that the model was made for"
        return [Finding(("max_length",), f"{message} (max_position_embeddings in {config_file})", explain="max_length")]
    return []


def _source(source: DataSourceConfig, path: KeyPath) -> list[Finding]:
    place = Path(source.path).expanduser()
    if is_hub_name(source.path):
        return []
    if not place.exists():
        allowed = f"allowed: a file ({', '.join(DATA_SUFFIXES)}), a folder of these, or owner/name on the hub"
        return [_missing(path, source.path, "file or folder", allowed)]
    return []


def _adapter(init_from: Path) -> list[Finding]:
    path: KeyPath = ("adapter", "init_from")
    folder = init_from.expanduser()
    if not folder.exists():
        return [_missing(path, str(init_from), "folder", "allowed: the folder of a saved adapter, or of a run")]
    return []


def _output(recipe: Recipe, resume: bool) -> list[Finding]:
    path: KeyPath = ("output",)
    folder = recipe.output.expanduser()
    if folder.exists() and not folder.is_dir():
        return [Finding(path, f"`output`: {recipe.output} is a file; name a folder")]
    written = folder / RECIPE_IN_RUN
    if not written.is_file() or not _has_started(folder):
        return []
    try:
        changed = _differences(load_recipe(written), recipe)
    except RecipeError as error:
        return [Finding(path, f"`output`: {written} can't be read, so the folder may hold another run: {error}")]
    if not changed and not resume:
        return [
            Finding(path, f"`output`: {recipe.output} holds this run already; add --resume, or name another folder")
        ]
    if changed:
        then = "a run is resumed with the recipe it began with" if resume else "name another folder"
        return [Finding(path, f"`output`: {recipe.output} holds a run of another recipe ({changed}); {then}")]
    return []


def _has_started(folder: Path) -> bool:
    """Whether a run got as far as its first step or checkpoint; what stopped before that can be started again."""
    events, checkpoints = folder / "events.jsonl", folder / "checkpoints"
    return (events.is_file() and events.stat().st_size > 0) or (checkpoints.is_dir() and any(checkpoints.iterdir()))


def _differences(before: Recipe, now: Recipe) -> str:
    """The first keys that differ, `train.steps: 10 there, 20 here`; "" if none do."""
    old, new = _flat(before.model_dump(mode="json")), _flat(now.model_dump(mode="json"))
    keys = [key for key in {**old, **new} if old.get(key) != new.get(key) and key not in _FREE_ON_RESUME]
    told = [f"{key}: {value_in_words(old.get(key))} there, {value_in_words(new.get(key))} here" for key in keys[:3]]
    return "; ".join(told + ([f"and {len(keys) - 3} more"] if len(keys) > 3 else []))


def _flat(value: object, path: KeyPath = ()) -> dict[str, object]:
    entries = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else None
    if not entries:
        return {dotted(path): value}
    return {key: leaf for name, inside in entries for key, leaf in _flat(inside, (*path, name)).items()}
