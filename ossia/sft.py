"""Supervised fine-tuning, top to bottom: model, adapter, data, step, loop, and what is left in the run folder.

```text
train.jsonl -> conversations -> Harmony ids and a weight per token -> packs -> layer-major step -> adapter or weights
```
The run folder holds recipe.yaml (resolved), env.json, events.jsonl, samples.jsonl, checkpoints/, and at the end
report.html and either adapter/ (PEFT's format) or model/ (a checkpoint).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict
from functools import partial
from itertools import islice

from ossia.config import Recipe
from ossia.data.dataset import Datasets, Lengths, in_order, measure, open_datasets, require_trained
from ossia.data.pack import Pack, PackedStream, pack_samples
from ossia.data.preview import row_bar
from ossia.data.sample import Sample
from ossia.data.tokenizer import open_vocabulary
from ossia.model.checkpoint import Checkpoint
from ossia.model.open import model_folder
from ossia.model.transformer import Transformer
from ossia.run.samples import questions_of, record_samples
from ossia.run.start import adamw_of, job_of, say, settle, started, tokens_of_rank
from ossia.run.trained import RunResult, save_result, whole_model
from ossia.train.events import Sink
from ossia.train.loop import Job, run_loop
from ossia.train.ranks.members import Group, check_heads, group_of
from ossia.train.ranks.world import World, joined
from ossia.train.report import write_report
from ossia.train.step import evaluate_loss, how_to_step, train_step

ROWS_TO_CHECK = 50_000


def run(recipe: Recipe, *, resume: bool = False, sink: Sink | None = None) -> RunResult:
    """Train as the recipe says.

    resume  go on from the newest whole checkpoint of `recipe.output`
    sink    hears every event instead of the terminal
    Raises  UserError for what the user has to change; Interrupted, saved, after Ctrl-C
    """
    with joined(recipe.device, timeout_s=recipe.parallel.timeout) as world:
        return _fine_tune(recipe, world, resume=resume or (world is not None and world.again), sink=sink)


def _fine_tune(recipe: Recipe, world: World | None, *, resume: bool, sink: Sink | None) -> RunResult:
    """The run, as one rank of `world` or alone."""
    settle(recipe)
    group = group_of(world, recipe.parallel.context)
    if group is not None:
        check_heads(group, Checkpoint.open(model_folder(recipe.model)).arch.num_kv_heads)
    datasets = open_datasets(recipe, open_vocabulary(recipe.model), check=False)
    for note in datasets.notes:
        say(note)
    held_out, lengths = read_rows(recipe, datasets, say)
    stream = open_stream(recipe, datasets, say)
    steps = recipe.train.steps or stream.count_steps(lengths)
    folder, leads = recipe.output, world is None or world.leads
    fingerprints = [dataset.fingerprint for dataset in (*datasets.train, *datasets.held_out)]
    with started(recipe, steps, resume=resume, sink=sink, world=world, data=fingerprints) as begun:
        model = begun.model
        answer = partial(
            record_samples,
            folder / "samples.jsonl",
            vocab=begun.vocab,
            questions=questions_of(held_out, recipe.eval.answers),
            max_tokens=recipe.eval.answer_tokens,
        )
        if begun.saved is None and leads:
            with nullcontext() if world is None else world.busy("answering"):
                answer(model.whole(), step=0)
        packs = pack_samples(held_out, recipe.train.tokens_per_pack)
        result = run_loop(make_job(recipe, model, stream, packs, steps, world, group), begun.log, begun.saved)
        trained = save_result(recipe, model, world)
        if not leads:
            return RunResult(folder, result.step, trained)
        answer(whole_model(model, trained), step=result.step)
    say(f"report: {write_report(folder)}")
    return RunResult(folder, result.step, trained)


def read_rows(recipe: Recipe, datasets: Datasets, say: Callable[[str], None]) -> tuple[list[Sample], Lengths]:
    """Read and render every row once, so that a bad one ends the run before step 1 and not in the middle.

    More rows than that takes seconds for are only checked as they are read, unless `train.epochs` has them counted.
    Returns  the held-out samples, at most `eval.max_samples`, and the lengths of all samples if they were counted
    Raises   DataError with the first bad rows and their number, or for a source of which nothing is trained
    """
    every = (*datasets.train, *datasets.held_out)
    num_rows = sum(map(len, every))
    if num_rows > ROWS_TO_CHECK and recipe.train.steps is not None:
        say(f"{num_rows:,} rows: checked as they are read; `ossia data RECIPE` checks them all beforehand")
        for dataset in every:
            require_trained(dataset)
        return list(islice(in_order(datasets.held_out), recipe.eval.max_samples)), {}
    with row_bar(every) as progress:
        counts, held_out, lengths = measure(datasets, recipe.eval.max_samples, progress)
    for warning in counts.warnings():
        say(warning)
    return held_out, lengths


def open_stream(recipe: Recipe, datasets: Datasets, say: Callable[[str], None]) -> PackedStream:
    """The training samples, packed, in the seed's order; says so if a step holds less than `tokens_per_step`."""
    train = recipe.train
    num_packs, rest = divmod(train.tokens_per_step, train.tokens_per_pack)
    if rest:
        what = f"{num_packs} packs of {train.tokens_per_pack:,} tokens fit, so a step has at most"
        say(f"train.tokens_per_step {train.tokens_per_step:,}: {what} {train.tokens_per_step - rest:,}")
    return PackedStream(
        datasets.train,
        tokens_per_step=train.tokens_per_step,
        tokens_per_pack=train.tokens_per_pack,
        seed=train.seed,
        epochs=train.epochs,
    )


def make_job(
    recipe: Recipe,
    model: Transformer,
    stream: PackedStream,
    held_out: Sequence[Pack],
    steps: int,
    world: World | None = None,
    group: Group | None = None,
) -> Job:
    """The loop's job: AdamW over what is trainable, `train_step` on each step's packs."""
    train = recipe.train
    optimizer = adamw_of(recipe, model, world)
    sizes = tokens_of_rank(recipe, world), -(-train.tokens_per_pack // recipe.parallel.context), recipe.max_length
    how = how_to_step(model, train.recompute, *sizes)
    dropout = recipe.adapter is not None and recipe.adapter.dropout > 0

    def step(packs: list[Pack], lr: float) -> Mapping[str, float]:
        seed = train.seed * 1_000_003 + optimizer.num_updates if dropout else None
        result = train_step(
            model,
            optimizer,
            packs,
            lr=lr,
            clip=train.clip,
            **how._asdict(),
            dropout_seed=seed,
            world=world,
            group=group,
        )
        return asdict(result)

    def evaluate() -> Mapping[str, float]:
        result = evaluate_loss(model, held_out, world, group)
        return {"eval_loss": result.loss, "eval_tokens": result.tokens, "eval_trained": result.trained}

    def counts() -> Mapping[str, int]:
        seen = stream.statistics
        return {
            "rows": seen.rows,
            "skipped": seen.skipped,
            "dropped": seen.dropped,
            "truncated": seen.truncated,
            "untrained": seen.untrained,
        }

    return job_of(
        recipe,
        model,
        optimizer,
        steps,
        data=stream,
        step=step,
        evaluate=evaluate if held_out else None,
        counts=counts,
        world=world,
    )
