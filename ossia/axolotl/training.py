"""Steps and batches, the optimizer, evaluation, checkpoints and logs."""

from __future__ import annotations

from ossia.axolotl.draft import Draft, Fate
from ossia.axolotl.keys import SHARDING

_SCHEDULES = {"cosine": "cosine", "linear": "linear", "constant_with_warmup": "constant", "constant": "constant"}
_DEFAULT_LENGTH = 512  # Axolotl's sequence_len
_BETA2 = 0.999  # AdamW's default in transformers


def map_training(draft: Draft) -> None:
    """`max_length`, `train`, `eval`, `log`; of `method: sft` also the batch (of `grpo` see rl.py)."""
    _length(draft)
    _batch(draft)
    _steps(draft)
    _optimizer(draft)
    _schedule(draft)
    _evaluation(draft)
    _checkpoints(draft)
    _logs(draft)


def is_grpo(draft: Draft) -> bool:
    """Whether rewards train, not rows."""
    return draft.get("rl") == "grpo"


def rows_of_step(draft: Draft) -> int:
    """Rows of an optimizer step over all devices, as Axolotl counts them."""
    micro = draft.whole("micro_batch_size") or 1
    batch = draft.whole("batch_size")
    accumulated = draft.whole("gradient_accumulation_steps") or (batch // micro if batch else 1)
    return max(micro, 1) * max(accumulated, 1) * draft.gpus


def _length(draft: Draft) -> None:
    length = draft.whole("sequence_len")
    if length is not None:
        draft.map(("sequence_len",), ("max_length",), length)
    else:
        draft.default(f"sequence_len: {_DEFAULT_LENGTH}", ("max_length",), _DEFAULT_LENGTH)
    ours = {"drop": "drop", "truncate": "truncate", "raise": "error"}
    given = draft.text("excess_length_strategy")
    if given in ours:
        draft.map(("excess_length_strategy",), ("on_long",), ours[given])
    elif given is not None:
        draft.refuse(("excess_length_strategy",), "expected drop, truncate or raise; set `on_long`")
    elif not is_grpo(draft):
        draft.default("excess_length_strategy: drop", ("on_long",), "drop")


def _batch(draft: Draft) -> None:
    packing = draft.flag("sample_packing")
    if packing:
        draft.skip(("sample_packing",), "samples are always packed, and those in a pack don't see each other")
    elif packing is False:
        why = "samples are always packed, with the gradient of one by one"
        draft.skip(("sample_packing",), f"{why}; a step counts tokens, not rows")
    backend = draft.get("attn_implementation")
    if packing and isinstance(backend, str) and backend.endswith("vllm-flash-attn3"):
        why = "`attention: auto` takes the fastest backend; documents in a pack don't see each other, while with this"
        draft.skip(("attn_implementation",), f"{why} one Axolotl 0.18.0 doesn't keep them apart: its losses are others")
    if is_grpo(draft):
        return
    length = draft.recipe["max_length"]
    tokens = rows_of_step(draft) * length
    micro = draft.whole("micro_batch_size") or 1
    per_device = rows_of_step(draft) // micro // draft.gpus
    devices = f"{draft.gpus} GPU{'s' if draft.gpus > 1 else ''}"
    factors = f"{micro} x {per_device} rows x {length} tokens x {devices}"
    key = ("train", "tokens_per_step")
    given = [name for name in ("micro_batch_size", "gradient_accumulation_steps", "batch_size") if draft.get(name)]
    for name in given:
        draft.map((name,), key, tokens, factors)
    for name in ("dp_shard_size", "dp_replicate_size"):
        if draft.get(name) is not None:
            draft.map((name,), key, tokens, f"the batch of all {draft.gpus} devices, on one")
    draft.put(key, tokens, factors, (given[0],) if given else ())
    if not packing:
        draft.remarks.append(
            f"without `sample_packing` a step of Axolotl's is {rows_of_step(draft)} rows, however short; "
            f"`train.tokens_per_step` is what they take at full length. For as many steps set it to that number of "
            "rows times their mean length, which `ossia data RECIPE` helps to see (at least `max_length`)"
        )
    if draft.gpus == 1 and any(draft.get(name) for name in SHARDING):
        draft.remarks.append(
            "this config is for several GPUs and doesn't say how many; `--gpus N` makes `train.tokens_per_step` "
            "the batch of all of them"
        )


def _steps(draft: Draft) -> None:
    steps, epochs = draft.whole("max_steps"), draft.number("num_epochs")
    if steps is not None and steps < 1:  # -1 is how transformers says none
        draft.skip(("max_steps",), "below 1 it means none; the epochs count")
        steps = None
    if steps is not None:
        draft.map(("max_steps",), ("train", "steps"), steps)
        if epochs is not None:
            draft.skip(("num_epochs",), "`max_steps` decides")
    elif is_grpo(draft):
        draft.put(("train", "steps"), 100, "SET THIS: reinforcement learning has no epochs")
        draft.remarks.append("`train.steps` is 100 for want of `max_steps`: reinforcement learning has no epochs")
        if epochs is not None:
            draft.refuse(("num_epochs",), "set `train.steps`: prompts x epochs / `rl.prompts`")
    elif epochs is not None:
        draft.map(("num_epochs",), ("train", "epochs"), float(epochs))


def _optimizer(draft: Draft) -> None:
    name = draft.get("optimizer")
    if name is not None:
        if "adamw" in str(name) and "galore" not in str(name):
            packed = any(bits in str(name) for bits in ("8bit", "4bit", "fp8"))
            moments = "; its moments are float32, and `ossia plan RECIPE` says what they take" if packed else ""
            draft.say(("optimizer",), Fate.mapped, f"AdamW, the only optimizer{moments}")
        else:
            draft.refuse(("optimizer",), "AdamW trains instead; look for a learning rate that suits it")
    plain = (
        ("learning_rate", ("train", "learning_rate")),
        ("weight_decay", ("train", "weight_decay")),
        ("adam_beta1", ("train", "beta1")),
        ("adam_beta2", ("train", "beta2")),
        ("adam_epsilon", ("train", "eps")),
    )
    for source, key in plain:
        if (value := draft.number(source)) is not None:
            draft.map((source,), key, float(value))
    if draft.number("learning_rate") is None:
        draft.remarks.append("no `learning_rate`, so the recipe has Ossia's: 2e-4 with an adapter, 2e-5 without one")
    if draft.number("adam_beta2") is None:
        draft.default(f"adam_beta2: {_BETA2}", ("train", "beta2"), _BETA2)
    if (clip := draft.number("max_grad_norm")) is not None:
        draft.map(("max_grad_norm",), ("train", "clip"), float(clip) or None)
    if (seed := draft.whole("seed")) is not None:
        draft.map(("seed",), ("train", "seed"), seed, "the numbers that it gives are others")


def _schedule(draft: Draft) -> None:
    name = draft.text("lr_scheduler")
    if name in _SCHEDULES:
        draft.map(("lr_scheduler",), ("train", "schedule"), _SCHEDULES[name])
    elif name == "cosine_with_min_lr":
        draft.map(("lr_scheduler",), ("train", "schedule"), "cosine")
        if (low := draft.number("lr_scheduler_kwargs", "min_lr_rate")) is not None:
            draft.map(("lr_scheduler_kwargs", "min_lr_rate"), ("train", "min_lr_ratio"), float(low))
        top, least = draft.number("learning_rate"), draft.number("lr_scheduler_kwargs", "min_lr")
        if least is not None and top:
            share = f"{least:g} of {top:g}"
            draft.map(("lr_scheduler_kwargs", "min_lr"), ("train", "min_lr_ratio"), least / top, share)
    elif name is not None:
        draft.refuse(("lr_scheduler",), "allowed in `train.schedule`: cosine, linear, constant; the recipe has cosine")
    if (low := draft.number("cosine_min_lr_ratio")) is not None:
        draft.map(("cosine_min_lr_ratio",), ("train", "min_lr_ratio"), float(low))
    steps, share = draft.number("warmup_steps"), draft.number("warmup_ratio")
    if name == "constant":
        for key in ("warmup_steps", "warmup_ratio"):
            if draft.get(key) is not None:
                draft.skip((key,), "`constant` has no warm-up, which `constant_with_warmup` has")
        draft.put(("train", "warmup"), 0.0, "lr_scheduler: constant has none")
    elif steps is not None:
        draft.map(("warmup_steps",), ("train", "warmup"), float(steps))
        draft.skip(("warmup_ratio",), "`warmup_steps` decides") if share is not None else None
    elif share is not None:
        draft.map(("warmup_ratio",), ("train", "warmup"), float(share))
    elif (total := draft.recipe.get("train", {}).get("steps")) and int(0.03 * total) > 100:
        draft.default("100 steps of warm-up at most", ("train", "warmup"), 100.0)


def _evaluation(draft: Draft) -> None:
    """Held-out rows and how often they are looked at. What holds none out needs none of the other keys."""
    size = draft.number("val_set_size")
    if size is not None:
        if is_grpo(draft):
            draft.skip(("val_set_size",), "`rl.eval_tasks` holds tasks out, 64 as a default")
        elif size == 0:
            draft.skip(("val_set_size",), "no rows are held out unless `eval.split` says so")
        elif draft.get("test_datasets"):
            draft.skip(("val_set_size",), "`test_datasets` are the held-out rows")
        elif size < 1:
            draft.map(("val_set_size",), ("eval", "split"), float(size), "chosen by the seed, not the last rows")
        else:
            draft.refuse(("val_set_size",), "give the share of the rows, not their number: `eval.split: 0.02`")
    has_rows = bool(draft.recipe.get("eval"))
    every = _interval(draft, "eval_steps", "evals_per_epoch", "eval_strategy")
    strategy = "evaluation_strategy" if draft.get("eval_strategy") is None else "eval_strategy"
    for key in ("eval_steps", "evals_per_epoch", strategy):
        if draft.get(key) is None:
            continue
        if not has_rows:
            draft.skip((key,), "no rows are held out")
        elif every is not None:
            draft.map((key,), ("eval", "every"), every, "" if every else "once, at the end")
        else:
            draft.refuse((key,), "an interval is a number of steps: set `eval.every`; the recipe evaluates at the end")


def _checkpoints(draft: Draft) -> None:
    every = _interval(draft, "save_steps", "saves_per_epoch", "save_strategy")
    given = [key for key in ("save_steps", "saves_per_epoch", "save_strategy") if draft.get(key) is not None]
    for key in given:
        if every is not None:
            draft.map((key,), ("train", "save_every"), every, "" if every else "once, at the end")
        else:
            draft.refuse((key,), "an interval is a number of steps: set `train.save_every`, which is 100 now")
    if (most := draft.whole("save_total_limit")) is not None:
        draft.map(("save_total_limit",), ("train", "keep"), most)


def _interval(draft: Draft, steps_key: str, per_epoch_key: str, strategy_key: str) -> int | None:
    """Steps between two events, 0 for once at the end; None where that takes the number of steps of an epoch."""
    given, per_epoch, strategy = draft.number(steps_key), draft.number(per_epoch_key), draft.get(strategy_key)
    total, epochs = draft.recipe.get("train", {}).get("steps"), draft.number("num_epochs") or 1.0
    if given:
        return int(given) if given >= 1 else max(round(given * total), 1) if total else None
    if per_epoch:  # Axolotl makes a share of all steps of it, `max_steps` or not
        times = per_epoch * epochs
        return 0 if times <= 1 else max(round(total / times), 1) if total else None
    if strategy in ("no", False):
        return 0
    return 0 if strategy == "epoch" and epochs <= 1 and not total else None


def _logs(draft: Draft) -> None:
    sinks = []
    for sink, switch, first, rest in (
        ("tensorboard", "use_tensorboard", "", ""),
        (
            "wandb",
            "use_wandb",
            "wandb_project",
            "wandb_entity wandb_watch wandb_name wandb_log_model wandb_run_id wandb_mode",
        ),
        ("trackio", "use_trackio", "trackio_project_name", "trackio_run_name trackio_space_id"),
    ):
        asked = draft.flag(switch)
        on = asked if asked is not None else bool(first and draft.get(first))
        if on:
            sinks.append(sink)
            for key in filter(None, (switch, first)):
                if draft.get(key) is not None:
                    project = "; the project is `ossia`, the run has its folder's name" if key == first else ""
                    draft.map((key,), ("log", "sinks"), list(sinks), project.removeprefix("; "))
        for key in (switch, first, *rest.split()):
            if key and draft.get(key) is not None and draft.is_open((key,)):
                off = f"{sink} is off"
                draft.refuse((key,), "the run in it has its folder's name") if on else draft.skip((key,), off)
