"""Held-out loss of a model, with an adapter or without: `ossia eval RECIPE`."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from itertools import islice

import torch

from ossia.config import Recipe
from ossia.data.dataset import in_order, open_datasets
from ossia.data.pack import pack_samples
from ossia.data.tokenizer import open_vocabulary
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
    """The loss on the recipe's held-out rows; what they are is said on stderr.

    adapter  a run folder or an adapter's folder, put on the model
    Raises   RecipeError if the recipe holds no rows out: a loss on what was trained says nothing of anything else
    """
    if recipe.method != "sft" or recipe.data is None:
        raise RecipeError("eval: held-out loss is of `method: sft`; held-out rewards are in the run's report")
    if not recipe.has_eval:
        here = f"`eval.data={recipe.data[0].path}` takes the rows that are trained on"
        raise RecipeError(f"eval: the recipe holds no rows out\n  next: give eval.split or eval.data; {here}")
    if recipe.train.threads is not None:
        torch.set_num_threads(recipe.train.threads)
    datasets = open_datasets(recipe, open_vocabulary(recipe.model))
    for note in datasets.notes:
        print(note, file=sys.stderr)
    samples = list(islice(in_order(datasets.held_out), recipe.eval.max_samples))
    model, _ = open_model(
        recipe.model,
        adapter=adapter,
        dtype=recipe.dtype,
        weights=recipe.weights,
        device=recipe.device,
        attention=recipe.attention,
    )
    model.qat = model.qat or recipe.qat is not None
    found = evaluate_loss(model, pack_samples(samples, recipe.train.tokens_per_pack))
    perplexity = float(torch.tensor(found.loss, dtype=torch.float64).exp())
    return EvalResult(found.loss, perplexity, found.weight, len(samples), found.tokens, found.trained)
