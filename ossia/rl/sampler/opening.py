"""The sampler that a recipe asks for."""

from __future__ import annotations

from collections.abc import Sequence

from ossia.config import Recipe
from ossia.engine import Engine, harmony_stops
from ossia.harmony.vocab import Vocabulary
from ossia.model.transformer import Transformer
from ossia.rl.sampler.base import Sampler
from ossia.rl.sampler.http import HttpSampler
from ossia.rl.sampler.local import EngineSampler
from ossia.rl.sampler.probe import policy_check
from ossia.rl.sampler.served import Served


def rollout_server(recipe: Recipe) -> Served | None:
    """The server of `rl.rollout`, before any weight is read; None: the engine samples. Raises RunError."""
    return None if recipe.rl.rollout == "engine" else Served.open(recipe)


def open_sampler(
    recipe: Recipe, model: Transformer, vocab: Vocabulary, served: Served | None, prompts: Sequence[Sequence[int]]
) -> Sampler:
    """What samples for a run.

    served   what `rollout_server` gave
    prompts  ids, a few of the run's own, for the check of a server before step 1
    """
    if served is None:
        return EngineSampler(Engine(model, vocab=vocab, max_batch=recipe.rl.prompts * recipe.rl.group).session())
    return HttpSampler(served, model, policy_check(model, prompts, harmony_stops(vocab)))
