"""What a command line asks to be served -> models with an engine each.

```text
MODEL ... or NAME=MODEL ...           each a name, a transformer, an engine and its thread
RUN ... or NAME=RUN ...               a run folder: the model that it trains, and its adapter under the run's name
--adapter NAME=DIR or MODEL:NAME=DIR  an adapter of one of them: of the model that it was trained on, if none is named
```
"""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from ossia.config import RECIPE_IN_RUN, is_hub_name, load_recipe
from ossia.engine import Engine, default_cache_bytes
from ossia.engine.grammar import GrammarCompiler
from ossia.errors import UserError
from ossia.harmony import Renderer, Vocabulary
from ossia.model.checkpoint import CONFIG
from ossia.model.lora import Lora
from ossia.model.open import MODEL_IN_RUN, open_model, weights_bytes
from ossia.model.peft import find_adapter, load_adapter, recorded_base
from ossia.model.transformer import Transformer
from ossia.train.state import human_bytes
from ossia.web.follow import RunAdapter
from ossia.web.metrics import Metrics
from ossia.web.protocol.prompts import Served
from ossia.web.worker import Worker

log = logging.getLogger("ossia.web")
_NAME = re.compile(r"[\w.:/@-]+")


@dataclass(frozen=True, slots=True)
class Hosted:
    """A model that is served.

    runs  of adapters that follow a run, by their names
    """

    served: Served
    worker: Worker
    runs: Mapping[str, RunAdapter] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Wanted:
    """A model to be served: its name, what was given for it, and its adapters' places by their names."""

    name: str
    model: str
    adapters: dict[str, Path] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Limits:
    """What each model may take: see `run_server`."""

    max_batch: int
    max_queue: int
    max_length: int | None = None
    int8_cache: bool = False


def read_wanted(models: Sequence[str], adapters: Sequence[str]) -> list[Wanted]:
    """MODEL arguments and --adapter options as what to serve. Raises UserError for a name that isn't one of its own,
    or an adapter whose model isn't clear; no weight is read."""
    assert models
    found: dict[str, Wanted] = {}
    runs: list[tuple[str, str, Path, Wanted]] = []
    for given in models:
        name, model = _named(given)
        folder = Path(model).expanduser()
        if not _is_run(folder) or (folder / CONFIG).is_file():
            _add_model(found, given, name, model)
            continue
        recipe = load_recipe(folder / RECIPE_IN_RUN)
        if recipe.adapter is None:
            _add_model(found, given, name, str(_whole_model(given, folder)))
            continue
        known = [one for one in found.values() if _same(recipe.model, one.model)]
        wanted = known[0] if known else _add_model(found, recipe.model, _named(recipe.model)[0], recipe.model)
        runs.append((given, name, folder, wanted))
    taken = set(found)
    for given, name, folder, wanted in runs:
        _take_name(taken, given, name)
        wanted.adapters[name] = folder
    for given in adapters:
        name, place, of = _adapter(given, found)
        _take_name(taken, f"--adapter {given}", name)
        path = Path(place).expanduser()
        if not _is_run(path):
            path = find_adapter(place)
        elif load_recipe(path / RECIPE_IN_RUN).adapter is None:
            raise UserError(
                f"--adapter {given}: this run trains all weights, so it has no adapter\n"
                f"  next: serve it as a model of its own: ossia serve {name}={place}"
            )
        wanted = of or _model_of(given, name, path, list(found.values()))
        wanted.adapters[name] = path
    return list(found.values())


def _add_model(found: dict[str, Wanted], given: str, name: str, model: str) -> Wanted:
    if name in found:
        raise UserError(
            f"{given}: {found[name].model} has the name {name} already\n"
            f"  next: give one of them another name, like {name}-2={model}"
        )
    found[name] = Wanted(name, model)
    return found[name]


def _take_name(taken: set[str], given: str, name: str) -> None:
    if name in taken:
        raise UserError(f"{given}: there is something with the name {name} already; choose another")
    taken.add(name)


def _is_run(folder: Path) -> bool:
    return (folder / RECIPE_IN_RUN).is_file()


def _whole_model(given: str, run: Path) -> Path:
    """What a run that trains all weights leaves at its end. Raises UserError before that."""
    model = run / MODEL_IN_RUN
    if not (model / CONFIG).is_file():
        raise UserError(
            f"{given}: this run trains all weights, and they are a model only at its end\n"
            "  next: wait for it, or make one of its newest checkpoint with `ossia export`, and serve that"
        )
    return model


def _named(given: str) -> tuple[str, str]:
    """MODEL or NAME=MODEL -> (name, model)."""
    name, equals, model = given.partition("=")
    if not equals or Path(given).expanduser().exists():
        return (given if is_hub_name(given) else Path(given).expanduser().resolve().name), given
    if not _NAME.fullmatch(name) or not model:
        raise UserError(f"{given}: expected MODEL, or NAME=MODEL like tuned=runs/tuned/model")
    return name, model


def _adapter(given: str, models: Mapping[str, Wanted]) -> tuple[str, str, Wanted | None]:
    """NAME=DIR or MODEL:NAME=DIR -> name, folder, and the model where it is named."""
    name, equals, folder = given.partition("=")
    if not equals or not folder or not _NAME.fullmatch(name):
        raise UserError(f"--adapter {given}: expected NAME=DIR, like --adapter math=runs/math")
    for model in models:
        if name.startswith(f"{model}:") and len(name) > len(model) + 1:
            return name.removeprefix(f"{model}:"), folder, models[model]
    return name, folder, None


def _model_of(given: str, name: str, path: Path, models: Sequence[Wanted]) -> Wanted:
    """The model that an adapter belongs to: the only one, or the only one that it says it was trained on."""
    if len(models) == 1:
        return models[0]
    base = load_recipe(path / RECIPE_IN_RUN).model if _is_run(path) else recorded_base(path)
    fitting = [one for one in models if base is not None and _same(base, one.model)]
    if len(fitting) == 1:
        return fitting[0]
    says = f"it was trained on {base}" if base else "it doesn't say what it was trained on"
    ways = " or ".join(f"--adapter {one.name}:{name}=..." for one in models)
    raise UserError(f"--adapter {given}: {says}; which of the models is it for?\n  next: say so with {ways}")


def _same(base: str, model: str) -> bool:
    return base == model or Path(base).expanduser().resolve() == Path(model).expanduser().resolve()


def open_hosted(
    wanted: Sequence[Wanted],
    metrics: Metrics,
    limits: Limits,
    **how: Any,
) -> list[Hosted]:
    """Read the models and adapters, and make their engines, which share the memory for caches.

    how     for `open_model`: dtype, weights, device
    Raises  UserError for a model or an adapter that can't be used
    """
    opened = [(one, *open_model(one.model, **how)) for one in wanted]
    for one, model, _ in opened:
        most = model.arch.max_positions
        if limits.max_length is not None and not 2 <= limits.max_length <= most:
            raise UserError(f"--max-length: found {limits.max_length}; allowed: 2 to {most}, {one.name}'s positions")
    share = [default_cache_bytes(model) // len(opened) for _, model, _ in opened]
    for (one, model, _), cache_bytes in zip(opened, share, strict=True):
        held = f"{human_bytes(weights_bytes(model.weights))} of weights ({model.weights.placement})"
        log.info("%s: %s, a cache of up to %s", one.name, held, human_bytes(cache_bytes))
    return [
        _host(one, model, vocab, metrics, limits, cache_bytes=cache_bytes, dtype=how["dtype"])
        for (one, model, vocab), cache_bytes in zip(opened, share, strict=True)
    ]


def _host(
    wanted: Wanted,
    model: Transformer,
    vocab: Vocabulary,
    metrics: Metrics,
    limits: Limits,
    *,
    cache_bytes: int,
    dtype: str,
) -> Hosted:
    arch, base = model.arch, model.weights.checkpoint
    load: Callable[[Path], Lora] = partial(load_adapter, arch=arch, device=torch.device("cpu"), base=base)
    runs = {name: RunAdapter(name, path, load) for name, path in wanted.adapters.items() if _is_run(path)}
    read = {name: runs[name].first() if name in runs else load(path) for name, path in wanted.adapters.items()}
    for name in runs:
        if load_recipe(wanted.adapters[name] / RECIPE_IN_RUN).qat is not None:
            log.warning("%s: trained with `qat`, served unrounded; its export to hf-mxfp4 is the very model", name)
    loras = {name: None if lora is None else lora.to(model.device) for name, lora in read.items()}
    grammar = GrammarCompiler(vocab, arch.vocab_size) if find_spec("llguidance") else None
    served = Served(
        wanted.name,
        vocab,
        Renderer(vocab),
        arch.vocab_size,
        limits.max_length or arch.max_positions,
        int(time.time()),
        dtype,
        grammar,
        tuple(wanted.adapters),
        (wanted.model,),
    )
    engine = Engine(
        model,
        vocab=vocab,
        adapters=loras,
        max_batch=limits.max_batch,
        cache_bytes=cache_bytes,
        cache_dtype="int8" if limits.int8_cache else "model",
    )
    steps = {name: run.step for name, run in runs.items() if run.step is not None}
    worker = Worker(engine, name=wanted.name, max_queue=limits.max_queue, metrics=metrics, steps=steps)
    for run in runs.values():
        for _ in range(run.num_bad):
            metrics.bad_checkpoint(run.name)
    return Hosted(served, worker, runs)
