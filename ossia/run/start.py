"""How every run begins, whatever its method: folder, model, what is trained, sinks; and the job around its step."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ossia.config import RECIPE_IN_RUN, Recipe
from ossia.engine.engine import default_cache_bytes
from ossia.errors import RunError
from ossia.harmony.vocab import Vocabulary
from ossia.model.cut.trained import TrainedParts
from ossia.model.open import DTYPE_NAMES, open_model
from ossia.model.transformer import Transformer
from ossia.plan.many.shard import cut_footprint
from ossia.plan.memory import cache_bytes, footprint
from ossia.plan.text import as_line
from ossia.run.attention import settle_attention
from ossia.run.shard import ranks_to_cut_over
from ossia.run.trained import ADAPTER, MODEL, make_trainable, show_trainable
from ossia.train.events import ENV, EVENTS, EventLog, Log, NoLog, Sink, environment, peak_bytes, write_env
from ossia.train.loop import Job, Stream, find_start
from ossia.train.optim import AdamW, lr_at
from ossia.train.ranks.agree import agree, code_identity, tensors_identity, weights_identity
from ossia.train.ranks.members import experts_over
from ossia.train.ranks.number import num_ranks
from ossia.train.report.page import REPORT, SAMPLES
from ossia.train.shards.find import find_start_together
from ossia.train.sinks import TerminalSink, check_sinks, open_sinks
from ossia.train.state import SavedState, checkpoint_paths, seed_generators, write_file
from ossia.train.step import how_to_step, work_of

if TYPE_CHECKING:
    from ossia.train.ranks.world import World

# What a run writes into its folder, besides its events.
_WRITTEN = (ADAPTER, MODEL, ENV, RECIPE_IN_RUN, REPORT, SAMPLES)
_NAMED = 5


@dataclass(frozen=True, slots=True)
class Started:
    """A run that can begin: its events, the checkpoint it goes on from (None: it begins), its model."""

    log: Log
    saved: SavedState | None
    model: Transformer
    vocab: Vocabulary


def settle(recipe: Recipe) -> None:
    """Threads and seeds as the recipe says. Raises MissingExtraError if the package of a sink isn't installed."""
    if recipe.train.threads is not None:
        torch.set_num_threads(recipe.train.threads)
    seed_generators(recipe.train.seed)
    check_sinks(recipe.log.sinks)


@contextmanager
def started(
    recipe: Recipe,
    steps: int,
    *,
    resume: bool,
    sink: Sink | None,
    world: World | None = None,
    data: Sequence[str] = (),
) -> Iterator[Started]:
    """Open the run folder, which nobody else may write until this is left, and the model with what is trained of it.

    resume  go on from the newest whole checkpoint
    sink    hears every event instead of the terminal
    world   the ranks that train together: rank 0 alone has the folder, and all go on from its checkpoint
    data    fingerprints of the data, which have to be the same on all ranks
    Raises  RunError as `find_start`, where ranks differ (`train.ranks.agree`), and for a folder that holds what this
            run would write; what opening the model raises
    """
    folder = recipe.output
    leads = world is None or world.leads
    over = experts_over(world, recipe)
    if leads:
        _check_folder(folder, recipe)
    with EventLog(folder) if leads else nullcontext(NoLog()) as log:
        if world is None:
            saved = find_start(folder, resume=resume, say=say)
        else:
            saved = find_start_together(world, folder, resume=resume, say=say)
        ranks = ranks_to_cut_over(recipe, world, say)
        model, vocab = open_model(
            recipe.model,
            dtype=recipe.dtype,
            weights="mmap" if ranks is not None and recipe.adapter is None else recipe.weights,
            device=recipe.device,
            attention=recipe.attention,
            ranks=None if recipe.adapter is None else ranks,
            experts_over=over,
            offload=recipe.offloads_parts,
        )
        make_trainable(model, recipe, ranks)
        show_trainable(model)
        settle_attention(model, automatic=recipe.attention == "auto", say=say)
        if world is not None:
            agree(world, _identity(recipe, model, data))
            world.has_begun()
        if isinstance(log, NoLog):
            yield Started(log, saved, model, vocab)
            return
        write_file(folder / RECIPE_IN_RUN, recipe.to_yaml())
        start = saved.step if saved else 0
        now = datetime.now().astimezone()
        env = environment(model.device) | ({} if world is None else {"ranks": world.size})
        write_env(folder, env, now=now, resumed_from=saved.step if saved else None, say=say)
        log.add(sink or TerminalSink(steps, step=start))
        log.add(*open_sinks(recipe.log.sinks, folder, recipe.model_dump(mode="json"), step=start))
        yield Started(log, saved, model, vocab)


def _identity(recipe: Recipe, model: Transformer, data: Sequence[str]) -> dict[str, str]:
    """What has to be the same on every rank, by the name that an error calls it by."""
    return {
        "recipe": recipe.to_yaml(),
        "code": code_identity(),
        "data": "; ".join(data),
        "model (a hash of its weights)": weights_identity(model.weights.checkpoint),
        "attention": model.backend,
        # of cut tensors there is one copy, of a model that was compared
        "trained tensors (a checksum)": "" if model.trainable.cut else tensors_identity(model.trainable.tensors),
    }


def _check_folder(folder: Path, recipe: Recipe) -> None:
    """Before a folder becomes a run's: refuse one with what the run would write itself, say what else is in it."""
    if not folder.is_dir() or (folder / EVENTS).exists() or checkpoint_paths(folder):
        return
    names = sorted(path.name for path in folder.iterdir() if not path.name.startswith("."))
    if taken := [name for name in names if name in _WRITTEN]:
        raise RunError(
            f"{folder}: `{taken[0]}` is there already, though no run is: the run would write over it, or take it for "
            "its own\n  next: choose another `output`, or move it away"
        )
    known = recipe.to_yaml()
    others = [name for name in names if str(folder / name) not in known and Path(name).suffix not in (".yaml", ".yml")]
    if others:
        more = f", and {len(others) - _NAMED} more" if len(others) > _NAMED else ""
        say(f"{folder}: holds what is of no run, and stays as it is: {', '.join(others[:_NAMED])}{more}")


def say(text: str) -> None:
    """A line for the person at the terminal."""
    print(text, file=sys.stderr)


def adamw_of(recipe: Recipe, model: Transformer, world: World | None = None) -> AdamW:
    """The recipe's optimizer over what is trained of the model; where that is cut, over this rank's parts."""
    train = recipe.train
    betas = (train.beta1, train.beta2)
    shapes, total = shapes_of(model), float if world is None or not model.trainable.cut else world.total
    return AdamW(
        model.trainable.tensors,
        betas=betas,
        eps=train.eps,
        weight_decay=train.weight_decay,
        shapes=shapes,
        total=total,
    )


def shapes_of(model: Transformer) -> Mapping[str, Sequence[int]] | None:
    """Of trained tensors that are cut over the ranks; None: they are whole."""
    return model.trainable.shapes if isinstance(model.trainable, TrainedParts) else None


def tokens_of_rank(recipe: Recipe, world: World | None) -> int:
    """Most tokens of a step that one process takes, if packs are full."""
    tokens, pack = recipe.tokens_of_step, recipe.train.tokens_per_pack
    if world is None:
        return tokens
    context = recipe.parallel.context
    return -(-min(tokens, -(-(tokens // pack) // (world.size // context)) * pack) // context)


def predicted(recipe: Recipe, model: Transformer, world: World | None = None) -> str:
    """The memory that a run's steps should take at most, in a line; of one of the ranks."""
    tokens, train = tokens_of_rank(recipe, world), recipe.train
    pack = min(tokens, -(-train.tokens_per_pack // recipe.parallel.context))
    how = how_to_step(model, train.recompute, tokens, pack, recipe.max_length)
    work = work_of(model, pack=pack, packs=tokens // pack, recompute=how.recompute)
    work = replace(work, offload=how.offload, chunk=how.tokens_at_once, keep_attention=how.keep_attention)
    if world is not None and model.cut:
        kept = {"offload": recipe.offloads_parts, "saves_beside": recipe.parallel.async_save}
        return as_line(work, cut_footprint(work, world.size, **kept))
    cached = cache_bytes(recipe, model.arch, DTYPE_NAMES[model.dtype], default_cache_bytes(model))
    return as_line(work, footprint(work, cache_bytes=cached))


def resume_with(recipe: Recipe, world: World | None) -> str:
    """What goes on with a run, by as many processes."""
    if world is None:
        alone = num_ranks(recipe, None, torch.cuda.device_count).number == 1
        return recipe.resume_command if alone else f"{recipe.resume_command} --nproc 1"
    if world.on_one_host:
        return f"{recipe.resume_command} --nproc {world.size}"
    return f"the same launcher on every host, with -m {recipe.resume_command}"


def job_of(
    recipe: Recipe,
    model: Transformer,
    optimizer: AdamW,
    steps: int,
    *,
    data: Stream,
    step: Callable[[list[Any], float], Mapping[str, Any]],
    evaluate: Callable[[], Mapping[str, float]] | None,
    counts: Callable[[], Mapping[str, int]],
    world: World | None = None,
) -> Job:
    """The loop's job around a method's `step` and `evaluate`, announced with the memory that it should take; see
    `train.loop.Job`."""
    train = recipe.train
    say(predicted(recipe, model, world))
    return Job(
        run=recipe.output,
        steps=steps,
        data=data,
        params=model.trainable.tensors,
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
        evaluate=evaluate,
        eval_every=recipe.eval.every,
        save_every=train.save_every,
        keep=train.keep,
        counts=counts,
        about={
            "parameters_trained": model.trainable.num_parameters,
            "placement": model.weights.placement,
            "shards": world.size if world is not None and model.cut else 1,
            "attention_backend": model.backend,
            "attention_probe": None if model.probed is None else asdict(model.probed),
        },
        resume_with=resume_with(recipe, world),
        clock=time.perf_counter,
        memory=lambda: peak_bytes(model.device),
        world=world,
        shapes=shapes_of(model),
        async_save=recipe.parallel.async_save,
    )
