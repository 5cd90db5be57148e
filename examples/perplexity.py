"""Perplexity of the tokens that a recipe trains, by Harmony channel.

Run: python examples/perplexity.py my.yaml data=heldout.jsonl [--adapter RUN]

It joins two forms made for other programs: `ossia data --json` says which ids there are and what each of them counts,
`ossia score` what a model gives them.
"""

import argparse
import json
import math
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path

from ossia.config import load_recipe

options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
options.add_argument("recipe", type=Path)
options.add_argument("changes", nargs="*", metavar="KEY=VALUE", help="keys of the recipe to set, model= among them")
options.add_argument("--adapter", help="a run folder")
given = options.parse_args()
recipe = load_recipe(given.recipe, given.changes)


def ossia(*arguments: str) -> str:
    """What an `ossia` command prints; its progress and its errors go to the terminal."""
    command = [sys.executable, "-m", "ossia", *arguments]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout


with tempfile.TemporaryDirectory() as scratch:
    samples, scored = Path(scratch, "samples.jsonl"), Path(scratch, "scored.jsonl")
    samples.write_text(ossia("data", str(given.recipe), *given.changes, "--json"), encoding="utf-8")
    how = ["--dtype", recipe.dtype, "--weights", recipe.weights]
    how += ["--adapter", given.adapter] if given.adapter else []
    ossia("score", recipe.model, "--in", str(samples), "--out", str(scored), *how)
    rows = [json.loads(line) for line in scored.read_text(encoding="utf-8").splitlines()]

nats, counted, left_out = Counter(), Counter(), 0
for row in rows:
    targets = row.get("targets", row["ids"])
    columns = zip(row["ids"], targets, row["weights"], row["channels"], row["logprobs"], strict=True)
    for number, target, weight, channel, logprob in columns:
        if weight and number != target:
            left_out += 1  # a stop that the model samples and the history doesn't hold: `score` knows the ids alone
        elif weight:
            for name in (channel or "no channel", "all"):
                nats[name] -= weight * logprob
                counted[name] += weight
for name, total in nats.items():
    mean = total / counted[name]
    print(f"{name:<12} {mean:.4f} nats a token, perplexity {math.exp(mean):.3f}, {counted[name]:g} tokens")
print(f"{left_out} stops in the middle of a conversation were left out")
