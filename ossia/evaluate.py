"""Held-out loss of a model, with an adapter or without: `ossia eval RECIPE`."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import islice

import torch

from ossia.config import Recipe
from ossia.data.dataset import in_order, open_datasets
from ossia.data.pack import pack_samples
from ossia.errors import RecipeError
from ossia.model.open import open_model
from ossia.train.step import evaluate_loss


@dataclass(frozen=True, slots=True)
class EvalResult:
    """Loss in nats per unit of weight, its exponential, and the counts behind it."""

    loss: float
    perplexity: float
    weight: float
    samples: int
    tokens: int
    trained: int


def run(recipe: Recipe, *, adapter: str | None) -> EvalResult:
    """The loss on the recipe's held-out rows; on all its rows where it holds none out.

    adapter  a run folder or an adapter's folder, put on the model
    """
    if recipe.train.threads is not None:
        torch.set_num_threads(recipe.train.threads)
    model, vocab = open_model(
        recipe.model, adapter=adapter, dtype=recipe.dtype, weights=recipe.weights, device=recipe.device
    )
    datasets = open_datasets(recipe, vocab)
    samples = list(islice(in_order(datasets.held_out or datasets.train), recipe.eval.max_samples))
    if not samples:
        raise RecipeError("eval: there is no sample to evaluate; give `eval.data` or rows in `data`")
    found = evaluate_loss(model, pack_samples(samples, recipe.train.tokens_per_pack))
    perplexity = float(torch.tensor(found.loss, dtype=torch.float64).exp())
    return EvalResult(found.loss, perplexity, found.weight, len(samples), found.tokens, found.trained)
