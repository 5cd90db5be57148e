"""The tasks of a recipe that learns from rewards, as the policy gets them, and whether its environments hold."""

from __future__ import annotations

import json
from itertools import pairwise

import numpy as np
from rich.console import Console

from ossia.config import Recipe
from ossia.data.preview import sample_view
from ossia.data.sample import Sample
from ossia.data.tokenizer import open_vocabulary
from ossia.harmony.messages import ROLES
from ossia.harmony.render import Renderer, Span
from ossia.harmony.vocab import Vocabulary
from ossia.rl.env import validate
from ossia.rl.jail import Jails
from ossia.rl.tasks import Asked, TaskStream, open_envs

_TRIED = 20  # tasks of each environment whose examples are tried


def show_tasks(recipe: Recipe, *, limit: int, as_json: bool, console: Console) -> None:
    """Print the first tasks as tokens, and try each environment on its own examples.

    as_json  one JSON object a prompt on stdout, as `ossia data` has them, and nothing else
    Raises   what `open_envs`, `TaskStream.take` and the tokenizer raise: RewardError for an environment that pays a
             corrupted answer as much as the right one
    """
    vocab = open_vocabulary(recipe.model)
    with Jails(workers=recipe.rl.reward_workers, allow_weak=recipe.rl.jail == "weak") as jails:
        envs = open_envs(recipe, jails)
        room = recipe.max_length - recipe.rl.max_new
        stream = TaskStream(envs, "train", recipe.train.seed, Renderer(vocab), recipe.harmony, room)
        for asked in stream.take(limit):
            sample = _prompt(asked, vocab)
            if as_json:
                print(json.dumps(sample.to_json()))
            else:
                console.print(sample_view(sample, vocab))
        if as_json:
            return
        for named in envs:
            tried = validate(named.env, named.name, seed=recipe.train.seed, most=_TRIED)
            held = f"the right answer earns more than each corrupted one, in {tried} of {tried} tasks"
            console.print(f"env {named.name}: {held if tried else 'it has no examples to try'}", soft_wrap=True)


def _prompt(asked: Asked, vocab: Vocabulary) -> Sample:
    """A task's prompt as a sample of which nothing is trained; each message is its author's."""
    ids, start = list(asked.ids), vocab.special["<|start|>"]
    edges = [place for place, number in enumerate(ids) if number == start] + [len(ids)]
    spans = []
    for begin, end in pairwise(edges):
        head = vocab.decode(ids[begin + 1 : end])
        role = next((role for role in ROLES if head.startswith(role)), "tool")  # a tool's message begins with its name
        spans.append(Span(begin, end, role, None))
    source = f"{asked.env_id}: {asked.task.name}"
    return Sample(np.array(ids, np.int32), np.zeros(len(ids), np.float32), None, source, tuple(spans))
