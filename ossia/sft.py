"""Supervised fine-tuning, top to bottom: model, adapter, data, step, loop, and what is left in the run folder.

```text
train.jsonl -> conversations -> Harmony ids and a weight per token -> packs -> layer-major step -> adapter or weights
```
The run folder holds recipe.yaml (resolved), env.json, events.jsonl, samples.jsonl, checkpoints/, and at the end
report.html and either adapter/ (PEFT's format) or model/ (a checkpoint).
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from datetime import datetime
from functools import partial
from itertools import islice

import torch

from ossia.config import Recipe
from ossia.data.dataset import Datasets, Lengths, in_order, measure, open_datasets, require_trained
from ossia.data.pack import Pack, PackedStream, pack_samples
from ossia.data.preview import row_bar
from ossia.data.sample import Sample
from ossia.data.tokenizer import open_vocabulary
from ossia.model.open import open_model
from ossia.model.transformer import Transformer
from ossia.ops.memory import machine_memory
from ossia.run.samples import questions_of, record_samples
from ossia.run.trained import RunResult, make_trainable, save_result, show_trainable
from ossia.train.events import EventLog, Sink, environment, peak_bytes, write_env
from ossia.train.loop import Job, find_start, run_loop
from ossia.train.optim import AdamW, lr_at
from ossia.train.report import write_report
from ossia.train.sinks import TerminalSink, check_sinks, open_sinks
from ossia.train.state import seed_generators, write_file
from ossia.train.step import evaluate_loss, keeps_activations, train_step

ROWS_TO_CHECK = 50_000


def run(recipe: Recipe, *, resume: bool = False, sink: Sink | None = None) -> RunResult:
    """Train as the recipe says.

    resume  go on from the newest whole checkpoint of `recipe.output`
    sink    hears every event instead of the terminal
    Raises  UserError for what the user has to change; Interrupted, saved, after Ctrl-C
    """
    if recipe.train.threads is not None:
        torch.set_num_threads(recipe.train.threads)
    seed_generators(recipe.train.seed)
    say: Callable[[str], None] = partial(print, file=sys.stderr)
    check_sinks(recipe.log.sinks)
    datasets = open_datasets(recipe, open_vocabulary(recipe.model), check=False)
    for note in datasets.notes:
        say(note)
    held_out, lengths = read_rows(recipe, datasets, say)
    stream = open_stream(recipe, datasets, say)
    steps = recipe.train.steps or stream.count_steps(lengths)
    folder = recipe.output
    with EventLog(folder) as log:
        saved = find_start(folder, resume=resume, say=say)
        model, vocab = open_model(recipe.model, dtype=recipe.dtype, weights=recipe.weights, device=recipe.device)
        make_trainable(model, recipe)
        show_trainable(model)
        write_file(folder / "recipe.yaml", recipe.to_yaml())
        start = saved.step if saved else 0
        now = datetime.now().astimezone()
        write_env(folder, environment(model.device), now=now, resumed_from=saved.step if saved else None, say=say)
        log.add(sink or TerminalSink(steps, step=start))
        log.add(*open_sinks(recipe.log.sinks, folder, recipe.model_dump(mode="json"), step=start))
        answer = partial(
            record_samples,
            folder / "samples.jsonl",
            model,
            vocab,
            questions_of(held_out, recipe.eval.answers),
            max_tokens=recipe.eval.answer_tokens,
        )
        if saved is None:
            answer(step=0)
        packs = pack_samples(held_out, recipe.train.tokens_per_pack)
        result = run_loop(make_job(recipe, model, stream, packs, steps), log, saved)
        answer(step=result.step)
    trained = save_result(recipe, model)
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


def make_job(recipe: Recipe, model: Transformer, stream: PackedStream, held_out: Sequence[Pack], steps: int) -> Job:
    """The loop's job: AdamW over what is trainable, `train_step` on each step's packs."""
    train = recipe.train
    params = model.trainable.tensors
    optimizer = AdamW(params, betas=(train.beta1, train.beta2), eps=train.eps, weight_decay=train.weight_decay)
    keep = keeps_activations(model, train.recompute, train.tokens_per_step, machine_memory()[0])
    dropout = recipe.adapter is not None and recipe.adapter.dropout > 0

    def step(packs: list[Pack], lr: float) -> Mapping[str, float]:
        seed = train.seed * 1_000_003 + optimizer.num_updates if dropout else None
        result = train_step(model, optimizer, packs, lr=lr, clip=train.clip, recompute=not keep, dropout_seed=seed)
        return asdict(result)

    def evaluate() -> Mapping[str, float]:
        result = evaluate_loss(model, held_out)
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

    return Job(
        run=recipe.output,
        steps=steps,
        data=stream,
        params=params,
        optimizer=optimizer,
        lr_at=lambda number: lr_at(
            number,
            steps=steps,
            peak=train.learning_rate,
            schedule=train.schedule,
            warmup=train.warmup,
            min_lr_ratio=train.min_lr_ratio,
        ),
        step=step,
        evaluate=evaluate if held_out else None,
        eval_every=recipe.eval.every,
        save_every=train.save_every,
        keep=train.keep,
        counts=counts,
        about={
            "parameters_trained": model.trainable.num_parameters,
            "placement": model.weights.placement,
            "attention_backend": model.backend,
        },
        resume_with=f"ossia train {recipe.output / 'recipe.yaml'} --resume",
        clock=time.perf_counter,
        memory=lambda: peak_bytes(model.device),
    )
