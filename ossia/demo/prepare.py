"""What the demo trains on and from, as files: conversations, a small vocabulary, an untrained checkpoint, a recipe.

`python -m ossia.demo.prepare FOLDER` writes them and trains nothing; recipes/ has recipes that start from runs/demo.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass, field
from pathlib import Path

from ossia.demo.conversations import DemoFiles, Sizes, make_data, write
from ossia.demo.start import write_untrained
from ossia.demo.vocabulary import write_vocabulary
from ossia.errors import UserError

DATA, START, RECIPE = "data", "start", "demo.yaml"

_RECIPE_TEXT = """\
# What `ossia demo` trains. This model begins with random weights, so all of them are trained, at a high rate.
# For a real one change `model`, `data` and `output`, add `adapter: {{rank: 16}}`, and leave out dtype, weights, train.
method: sft
model: {model}
dtype: float32
weights: bf16                     # MXFP4 experts are expanded, because they are trained too
data: {{path: {train}}}
eval: {{data: {{path: {heldout}}}, every: {every}}}
max_length: {max_length}
train:
  steps: {steps}
  tokens_per_step: {tokens_per_step}
  learning_rate: {learning_rate}
  warmup: 0.05
  seed: {seed}
  save_every: {every}
output: {output}
"""


@dataclass(frozen=True, slots=True)
class Plan:
    """How long to train on how much, and the width of an expert (None: the demo shape's); the defaults are what the
    demo was measured with.
    """

    sizes: Sizes = field(default_factory=Sizes)
    steps: int = 600
    tokens_per_step: int = 2048
    learning_rate: float = 3e-3
    evaluations: int = 4
    width: int | None = None


def prepare(folder: Path, *, seed: int, plan: Plan) -> tuple[DemoFiles, Path]:
    """Write data, vocabulary, untrained checkpoint and recipe into `folder`; the data files and the recipe's file.

    Raises UserError, with nothing written, if one of them is there already
    """
    for there in (folder / name for name in (DATA, START, RECIPE) if (folder / name).exists()):
        raise UserError(f"{there} is there already; name another folder, or remove it first")
    data = make_data(seed, plan.sizes)
    files = write(data, folder / DATA)
    tokenizer = write_vocabulary((*data.train, *data.heldout), folder / DATA / "tokenizer.json")
    write_untrained(folder / START, tokenizer, seed=seed, width=plan.width)
    recipe_file = folder / RECIPE
    recipe_file.write_text(recipe_text(folder, seed=seed, plan=plan), encoding="utf-8")
    return files, recipe_file


def recipe_text(folder: Path, *, seed: int, plan: Plan) -> str:
    """The recipe that trains in `folder` on what `prepare` writes there."""
    files = DemoFiles.within(folder / DATA)
    return _RECIPE_TEXT.format(
        model=json.dumps(str(folder / START)),
        train=json.dumps(str(files.train)),
        heldout=json.dumps(str(files.heldout)),
        output=json.dumps(str(folder)),
        every=max(1, plan.steps // plan.evaluations),
        max_length=min(512, plan.tokens_per_step),
        steps=plan.steps,
        tokens_per_step=plan.tokens_per_step,
        learning_rate=plan.learning_rate,
        seed=seed,
    )


def main() -> None:
    """Write into the folder that the command line names, with the demo's seed and plan; prints the recipe's file."""
    if len(sys.argv) != 2:
        raise SystemExit("python -m ossia.demo.prepare FOLDER: name one folder, such as runs/demo")
    try:
        print(prepare(Path(sys.argv[1]), seed=0, plan=Plan())[1])
    except UserError as error:
        print(error, file=sys.stderr)
        raise SystemExit(error.exit_code) from None


if __name__ == "__main__":
    main()
