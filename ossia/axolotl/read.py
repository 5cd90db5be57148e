"""An Axolotl config, read, mapped key by key, and checked by loading the recipe that comes out.

What Axolotl does in silence is said here: keys that it doesn't know, and defaults of its own that change a result.
"""

from __future__ import annotations

from copy import deepcopy
from dataclasses import dataclass
from difflib import get_close_matches

from ossia.axolotl.data import map_data
from ossia.axolotl.draft import EMPTY, Draft, Fate, Verdict, leaves
from ossia.axolotl.keys import INSIDE, KNOWN, MAPPED, REASONS
from ossia.axolotl.model import map_model
from ossia.axolotl.rl import map_rl
from ossia.axolotl.text import recipe_text
from ossia.axolotl.training import map_training
from ossia.config.draft import draft_of
from ossia.config.findings import Finding, Places, recipe_error
from ossia.config.keys import nearest, value_in_words
from ossia.config.schema import Recipe
from ossia.config.yaml_lines import KeyPath, parse_yaml
from ossia.errors import RecipeError

_OTHER_METHODS = ("dpo", "gdpo", "ipo", "kto", "orpo", "simpo", "ebft")


@dataclass(frozen=True, slots=True)
class Imported:
    """The recipe as text and as loaded, and what became of every key of the config, in the order of its file.

    defaults  Axolotl's defaults that aren't Ossia's: (what, the recipe's key and value)
    remarks   what to look at before training
    """

    name: str
    text: str
    recipe: Recipe
    verdicts: tuple[Verdict, ...]
    defaults: tuple[tuple[str, str], ...]
    remarks: tuple[str, ...]

    @property
    def defaults_as_rows(self) -> list[tuple[str, str, str]]:
        """The defaults as rows of three."""
        return [(what, "", words) for what, words in self.defaults]


def import_axolotl(text: str, name: str, gpus: int | None = None) -> Imported:
    """An Axolotl config as a recipe.

    text     the YAML file
    name     what messages call it
    gpus     how many devices it ran on, which multiplies its batch; None: what its `dp_shard_size` says, else 1
    Raises   RecipeError, each finding with its line: no YAML, no Axolotl config, no `base_model`, no rows to train
             on, a method that Ossia lacks, or values out of which no recipe can be made
    """
    parsed = parse_yaml(text)
    places = Places(name, dict(parsed.lines))
    if parsed.problems:
        raise recipe_error([Finding((), one.message, line=one.line) for one in parsed.problems], places)
    given = parsed.value
    if not isinstance(given, dict) or not given:
        raise RecipeError(f"{name}: an Axolotl config is a mapping of keys to values, `base_model: ...`")
    _check(given, places)
    draft = Draft(name, given, places.lines, 1)
    draft.gpus = gpus or max((draft.whole("dp_shard_size") or 1) * (draft.whole("dp_replicate_size") or 1), 1)
    _name_the_unknown(draft)
    map_data(draft)
    map_training(draft)
    map_model(draft)
    map_rl(draft)
    _settle_the_rest(draft)
    recipe = _loaded(draft)
    order = {path: i for i, path in enumerate(leaves(draft.given))}
    verdicts = tuple(sorted(draft.verdicts.values(), key=lambda one: order[one.path]))
    assert len(verdicts) == len(order), "every key has its verdict"
    return Imported(name, recipe_text(draft), recipe, verdicts, tuple(draft.defaults), tuple(draft.remarks))


def _check(given: dict[str, object], places: Places) -> None:
    """What no recipe can be made of. Raises RecipeError."""
    base, findings = given.get("base_model"), []
    if "base_model" not in given:
        if "model" in given and given.keys().isdisjoint(KNOWN - {"adapter", "datasets"}):
            raise RecipeError(f"{places.file}: this is a recipe of Ossia's already; next: ossia train {places.file}")
        if len(given.keys() & KNOWN) < 2:
            found = ", ".join(list(given)[:5])
            raise RecipeError(f"{places.file}: this is no Axolotl config; it has no `base_model`, found: {found}")
        meant = nearest("base_model", given)
        guess = f"; did you mean it by `{meant}`?" if meant else ""
        findings.append(Finding((), f"`base_model` is missing, which names the model{guess}"))
    elif not isinstance(base, str) or not base:
        findings.append(Finding(("base_model",), "`base_model` is no name of a model or folder"))
    method = given.get("rl")
    if method not in (None, "grpo"):
        later = "preference methods aren't there yet" if method in _OTHER_METHODS else "that is no method"
        findings.append(
            Finding(("rl",), f"`rl` is {method}; {later}", "allowed: grpo, or no `rl` for supervised training")
        )
    findings += [
        Finding((key,), f"`{key}`: Ossia trains no reward models")
        for key in ("reward_model", "process_reward_model")
        if given.get(key)
    ]
    if not any(given.get(key) for key in ("datasets", "pretraining_dataset")):
        findings.append(Finding((), "`datasets` is missing or empty: the rows to train on"))
    elif given.get("datasets") and not isinstance(given["datasets"], list):
        findings.append(Finding(("datasets",), "`datasets` is a list of sections, each with a `path`"))
    if findings:
        raise recipe_error(findings, places)


def _name_the_unknown(draft: Draft) -> None:
    """A verdict for every key that Axolotl doesn't know, before a mapper takes it for part of a known section."""
    for path in leaves(draft.given):
        top = str(path[0])
        inner = next((str(piece) for piece in path[1:] if isinstance(piece, str)), None)
        if top not in KNOWN:
            _unknown(draft, path, top, KNOWN)
        elif inner is not None and top in INSIDE and inner not in INSIDE[top]:
            _unknown(draft, path, inner, INSIDE[top])


def _settle_the_rest(draft: Draft) -> None:
    """A verdict for every key that no mapper has said anything about."""
    for path in leaves(draft.given):
        if not draft.is_open(path):
            continue
        top = str(path[0])
        if draft.get(*path) in (None, "", [], {}):
            draft.verdicts[path] = Verdict(path, "", Fate.not_needed, EMPTY, draft.lines.get(path))
        elif top in REASONS:
            draft.say(path, *REASONS[top])
        else:
            draft.refuse(path, "the recipe has nothing of it; `ossia explain` has every key that there is")


def _unknown(draft: Draft, path: KeyPath, word: str, names: frozenset[str]) -> None:
    near = get_close_matches(word, names, n=1, cutoff=0.85)  # by one letter or two; else one that decides something
    meant = near[0] if near else nearest(word, names & MAPPED) or nearest(word, names)
    guess = f"; did you mean `{meant}`? Put it right there and import again" if meant else "; leave it out"
    words = f"Axolotl ignores this silently{guess}"
    draft.verdicts[path] = Verdict(path, value_in_words(draft.get(*path)), Fate.unknown, words, draft.lines.get(path))


def _loaded(draft: Draft) -> Recipe:
    """The recipe as Ossia loads it. Raises RecipeError at the lines of the config that its values came from."""
    places = Places(draft.name, {key: draft.lines[path] for key, path in draft.origin.items() if path in draft.lines})
    loaded = draft_of(deepcopy(draft.recipe), places, [], [])
    if loaded.findings or loaded.recipe is None:
        raise recipe_error(loaded.findings, places)
    return loaded.recipe
