"""Checks of a recipe against this machine before any weight is read: files, folders and config.json only."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ossia.config.findings import Finding, Places, recipe_error, schema_name
from ossia.config.keys import nearest, value_in_words
from ossia.config.load import draft_from_dict, draft_recipe, load_recipe
from ossia.config.schema import DataSourceConfig, Recipe
from ossia.config.yaml_lines import KeyPath, dotted
from ossia.disk import why_no_folder
from ossia.errors import RecipeError, first_few

DATA_SUFFIXES = (".jsonl", ".jsonl.gz", ".ndjson", ".json", ".parquet")
RECIPE_IN_RUN = "recipe.yaml"
_FREE_ON_RESUME = (
    "output",
    "train.save_every",
    "train.keep",
    "parallel.ranks",
    "parallel.context",
    "parallel.experts",
    "parallel.shard",
    "parallel.offload",
    "parallel.timeout",
    "parallel.async_save",
)  # they change no number of the run
_LENGTH = {"train.steps", "train.epochs"}


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
    findings = _in_the_way(recipe, lambda path: True, resume, writes, model_folder)
    if findings:
        raise recipe_error(findings, places or Places("recipe"))


def checked_recipe(
    source: Path | Mapping[str, Any], overrides: Sequence[str] = (), *, resume: bool = False, writes: bool = True
) -> Recipe:
    """A recipe that can run here: as `load_recipe` or `recipe_from_dict` give it, checked as `check_recipe` does.

    Raises  RecipeError with what either has found, together
    """
    draft = draft_recipe(source, overrides) if isinstance(source, Path) else draft_from_dict(source)
    findings = draft.findings
    if draft.recipe is not None:
        whole = writes and not findings  # a part of a recipe can't be compared with the one of a run
        findings = [*findings, *_in_the_way(draft.recipe, draft.doubts.trusts, resume, whole, None)]
    if findings or draft.recipe is None:
        raise recipe_error(findings, draft.places)
    return draft.recipe


def _in_the_way(
    recipe: Recipe, trusts: Callable[[KeyPath], bool], resume: bool, writes: bool, model_folder: Path | None
) -> list[Finding]:
    """Everything on this machine that a recipe meets, of the keys whose values are sure."""
    findings = _model(recipe, model_folder, trusts(("max_length",))) if trusts(("model",)) else []
    sources: list[tuple[KeyPath, DataSourceConfig]] = [
        *((("data", i, "path"), source) for i, source in enumerate(recipe.data or ())),
        *((("eval", "data", i, "path"), source) for i, source in enumerate(recipe.eval.data or ())),
    ]
    for path, source in sources:
        if trusts(path):
            findings += _source(source, path)
    if recipe.adapter is not None and recipe.adapter.init_from is not None:
        findings += _adapter(recipe.adapter.init_from)
    if writes:
        findings += _output(recipe, resume)
    return findings


def is_hub_name(name: str) -> bool:
    """Whether a `model` or `path` means a Hugging Face repository: `owner/name`, and nothing of that name is here.

    A name that starts like a path (`./`, `/`, `~`), ends like a data file, or begins with an existing folder is local.
    """
    path = Path(name).expanduser()
    looks_like_one = re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", name) is not None
    return looks_like_one and not path.exists() and not name.endswith(DATA_SUFFIXES) and not path.parent.exists()


def _missing(path: KeyPath, name: str, what: str, otherwise: str) -> Finding:
    place = Path(name).expanduser()
    if place.is_symlink():
        told = f"`{dotted(path)}`: {name} is a link to {place.readlink()}, which is not there"
        return Finding(path, told, otherwise, schema_name(path))
    if not place.parent.is_dir():
        here = f"the folder {place.parent} is not there either (the current folder is {Path.cwd()})"
        return Finding(path, f"`{dotted(path)}`: there is no {what} {name}; {here}", otherwise, schema_name(path))
    meant = nearest(place.name, [entry.name for entry in place.parent.iterdir()])
    guess = f"; did you mean {place.parent / meant}?" if meant else f" (the current folder is {Path.cwd()})"
    return Finding(path, f"`{dotted(path)}`: there is no {what} {name}{guess}", otherwise, schema_name(path))


def _model(recipe: Recipe, model_folder: Path | None, check_length: bool) -> list[Finding]:
    if model_folder is None:
        if is_hub_name(recipe.model):
            return []
        model_folder = Path(recipe.model).expanduser()
    if not model_folder.exists():
        allowed = "allowed: a checkpoint's folder, or owner/name on the Hugging Face hub"
        return [_missing(("model",), recipe.model, "folder", allowed)]
    config_file = model_folder / "config.json"
    if not config_file.is_file() and (model_folder / RECIPE_IN_RUN).is_file():
        whole = model_folder / "model"
        told = f"`model`: {model_folder} is a run folder, not a model"
        ways = f"the model that it trained, and `adapter.init_from: {model_folder}` to train its adapter on"
        return [Finding(("model",), told, f"next: name {whole if whole.is_dir() else ways}", "adapter.init_from")]
    if model_folder.suffix == ".gguf" and model_folder.is_file():
        way = f"next: make a folder of it: ossia export {model_folder} --to hf-mxfp4 --output FOLDER (or hf-bf16)"
        return [Finding(("model",), f"`model`: {model_folder} is a GGUF file", way)]
    if not config_file.is_file():
        return [Finding(("model",), f"`model`: {model_folder} has no config.json, so it is no checkpoint folder")]
    try:
        config = json.loads(config_file.read_text(encoding="utf-8"))
    except ValueError as error:
        return [Finding(("model",), f"`model`: {config_file} is not valid JSON: {error}")]
    limit = config.get("max_position_embeddings") if isinstance(config, dict) else None
    if check_length and isinstance(limit, int) and recipe.max_length > limit:
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
    if os.path.exists(folder) and not folder.is_dir():
        return [Finding(path, f"`output`: {recipe.output} is a file; name a folder")]
    if Path.cwd().is_relative_to(folder.resolve()):
        told = "is the current folder or one around it, so everything here would be in the run folder"
        return [Finding(path, f"`output`: {recipe.output} {told}; name one of its own")]
    if why := why_no_folder(folder):
        return [Finding(path, f"`output`: {recipe.output} can't be a folder: {why}; name another")]
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
    if not changed:
        return []
    keys = "; ".join(first_few(list(changed.values()), most=3))
    told = f"`output`: {recipe.output} holds a run of another recipe ({keys})"
    if not resume:
        return [Finding(path, f"{told}; name another folder")]
    if not changed.keys() <= _LENGTH:
        return [Finding(path, f"{told}; a run is resumed with the recipe it began with")]
    why = "a run keeps its length, as the learning rate of every step depends on how many there are"
    trained = f"model={folder / 'model'}" if recipe.adapter is None else f"adapter.init_from={recipe.output}"
    return [Finding(path, f"{told}; {why}", f"next: to train on, start another run with {trained}", "train.steps")]


def _has_started(folder: Path) -> bool:
    """Whether a run got as far as its first step or checkpoint; what stopped before that can be started again."""
    events, checkpoints = folder / "events.jsonl", folder / "checkpoints"
    return (events.is_file() and events.stat().st_size > 0) or (checkpoints.is_dir() and any(checkpoints.iterdir()))


def _differences(before: Recipe, now: Recipe) -> dict[str, str]:
    """The keys that differ, each with both values: `train.steps: 10 there, 20 here`."""
    old, new = _flat(before.model_dump(mode="json")), _flat(now.model_dump(mode="json"))
    keys = [key for key in {**old, **new} if old.get(key) != new.get(key) and key not in _FREE_ON_RESUME]
    return {key: f"{key}: {value_in_words(old.get(key))} there, {value_in_words(new.get(key))} here" for key in keys}


def _flat(value: object, path: KeyPath = ()) -> dict[str, object]:
    entries = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else None
    if not entries:
        return {dotted(path): value}
    return {key: leaf for name, inside in entries for key, leaf in _flat(inside, (*path, name)).items()}
