"""Reinforcement learning: the section `trl` of a config with `rl: grpo`."""

from __future__ import annotations

import re
from typing import Any

from ossia.axolotl.data import template_arguments
from ossia.axolotl.draft import Draft
from ossia.axolotl.training import is_grpo, rows_of_step

_LOSSES = ("grpo", "bnpo", "dr_grpo", "dapo", "cispo")
_DEFAULT_GROUP = 8  # TRL's num_generations
_OUR_NEW = 1024
_SERVER = (
    "use_vllm",
    "vllm_mode",
    "vllm_server_host",
    "vllm_server_port",
    "vllm_server_timeout",
    "vllm_enable_sleep_mode",
    "vllm_sync_interval",
    "vllm_lora_sync",
)
_SAMPLING = {"temperature": 1.0, "top_p": 1.0, "top_k": 0.0, "min_p": 0.0, "repetition_penalty": 1.0}


def map_rl(draft: Draft) -> None:
    """`method`, `reward` and `rl`."""
    if not is_grpo(draft):
        if draft.get("trl") is not None:
            draft.skip(("trl",), "it is for `rl`, which isn't given")
        return
    draft.map(("rl",), ("method",), "grpo")
    _rewards(draft)
    _sizes(draft)
    _loss(draft)
    _sampling(draft)
    if isinstance(draft.get("trl", "chat_template_kwargs"), dict):
        template_arguments(draft, ("trl", "chat_template_kwargs"))
    if draft.recipe.get("reward") is None:
        draft.recipe["reward"] = ["my_rewards.py:reward"]
        draft.notes[("reward",)] = "SET THIS: a function of yours"
        draft.remarks.append("no `trl.reward_funcs`: `reward` names a function that you have to write; docs/rl.md")
    draft.refuse(("trl",), "there is no such option: docs/rl.md, and `ossia explain rl`")


def _rewards(draft: Draft) -> None:
    given = draft.get("trl", "reward_funcs")
    names = [given] if isinstance(given, str) else given if isinstance(given, list) else []
    functions = [re.sub(r"\.([A-Za-z_]\w*)$", r":\1", str(name)) for name in names]
    functions = [name for name in functions if re.fullmatch(r".+:[A-Za-z_]\w*", name)]
    if functions and len(functions) == len(names):
        words = "called in TRL's form, with the answer alone, without the thinking; docs/rl.md"
        draft.map(("trl", "reward_funcs"), ("reward",), functions, words)
    elif given is not None:
        draft.refuse(("trl", "reward_funcs"), "write reward functions as module:function or file.py:function")
    weights = draft.get("trl", "reward_weights")
    if weights is not None:
        if isinstance(weights, list) and all(weight == 1 for weight in weights):
            draft.skip(("trl", "reward_weights"), "rewards add up, each once")
        else:
            draft.refuse(("trl", "reward_weights"), "rewards add up, each once: multiply in the function itself")


def _sizes(draft: Draft) -> None:
    group = draft.whole("trl", "num_generations")
    if group is not None:
        draft.map(("trl", "num_generations"), ("rl", "group"), group)
    else:
        group = _DEFAULT_GROUP
        draft.default(f"trl.num_generations: {group}", ("rl", "group"), group)
    new = draft.whole("trl", "max_completion_length")
    if new is not None:
        draft.map(("trl", "max_completion_length"), ("rl", "max_new"), new)
    else:
        new = max(min(_OUR_NEW, draft.recipe["max_length"] // 2), 1)
        draft.put(("rl", "max_new"), new, "SET THIS: there was no trl.max_completion_length")
        draft.remarks.append(f"no `trl.max_completion_length`, so `rl.max_new` is {new}")
    batch = draft.whole("trl", "generation_batch_size")
    answers = batch or rows_of_step(draft)
    prompts = max(answers // max(group, 1), 1)
    factors = f"{answers} answers of a step / {group} of each task"
    given = [("trl", "generation_batch_size")] if batch else []
    given += [
        (key,)
        for key in (
            "micro_batch_size",
            "gradient_accumulation_steps",
            "batch_size",
            "dp_shard_size",
            "dp_replicate_size",
        )
        if draft.get(key) is not None
    ]
    for path in given:
        draft.map(path, ("rl", "prompts"), prompts, factors)
    draft.put(("rl", "prompts"), prompts, factors, given[0] if given else ())
    length = draft.recipe["max_length"]
    if length <= draft.recipe["rl"]["max_new"]:
        draft.remarks.append(
            f"`max_length` is {length} and has to hold the prompt and `rl.max_new`, {draft.recipe['rl']['max_new']}: "
            "the recipe has their sum"
        )
        draft.put(("max_length",), length + draft.recipe["rl"]["max_new"], "sequence_len + trl.max_completion_length")


def _loss(draft: Draft) -> None:
    get = draft.get("trl", "loss_type")
    sequence = draft.get("trl", "importance_sampling_level") == "sequence"
    if get in _LOSSES:
        draft.map(("trl", "loss_type"), ("rl", "loss"), "gspo" if sequence else get)
    elif get is not None:
        draft.refuse(("trl", "loss_type"), f"allowed in `rl.loss`: {', '.join(_LOSSES)}, gspo")
    if sequence:
        draft.map(("trl", "importance_sampling_level"), ("rl", "loss"), "gspo")
    else:
        draft.skip(("trl", "importance_sampling_level"), "ratios are of tokens, except with `rl.loss: gspo`")
    if (beta := draft.number("trl", "beta")) is not None:
        draft.map(("trl", "beta"), ("rl", "kl"), float(beta))
        if beta and draft.get("adapter") is None:
            draft.remarks.append("`rl.kl` needs an `adapter`: the reference is the model with it switched off")
            del draft.recipe["rl"]["kl"]
            draft.verdicts.pop(("trl", "beta"))
            draft.refuse(("trl", "beta"), "`rl.kl` needs an `adapter`, whose base is the reference")
    if (count := draft.whole("trl", "num_iterations")) is not None:
        draft.map(("trl", "num_iterations"), ("rl", "iterations"), count)
    low, high = draft.number("trl", "epsilon"), draft.number("trl", "epsilon_high")
    if low is not None:
        draft.map(("trl", "epsilon"), ("rl", "clip_low"), float(low), "" if high is not None else "and rl.clip_high")
        if high is None:
            draft.put(("rl", "clip_high"), float(low), "trl.epsilon", ("trl", "epsilon"))
    if high is not None:
        draft.map(("trl", "epsilon_high"), ("rl", "clip_high"), float(high))
    if (scale := draft.flag("trl", "scale_rewards")) is not None:
        draft.map(("trl", "scale_rewards"), ("rl", "spread"), scale)
    else:
        draft.default("trl.scale_rewards: true", ("rl", "spread"), True)
    if (masked := draft.flag("trl", "mask_truncated_completions")) is not None:
        draft.map(("trl", "mask_truncated_completions"), ("rl", "mask_truncated"), masked)
    else:
        draft.default("trl.mask_truncated_completions: false", ("rl", "mask_truncated"), False)
    if (workers := draft.whole("trl", "reward_num_workers")) is not None:
        draft.map(("trl", "reward_num_workers"), ("rl", "reward_workers"), workers)


def _sampling(draft: Draft) -> None:
    for name in _SERVER:
        draft.skip(
            ("trl", name), "the engine samples, with the very weights that are trained; a server of vLLM: `rl.rollout`"
        ) if draft.get("trl", name) is not None else None
    for name, neutral in _SAMPLING.items():
        value: Any = draft.number("trl", name)
        if value is None:
            continue
        if value == neutral or (name == "top_k" and value < 0):
            draft.skip(("trl", name), "samples are of the policy itself")
        else:
            draft.refuse(("trl", name), "samples are of the policy itself: temperature 1, nothing cut off")
    corrected, mode = (
        draft.flag("trl", "vllm_importance_sampling_correction"),
        draft.get("trl", "vllm_importance_sampling_mode"),
    )
    if corrected is False:
        draft.map(("trl", "vllm_importance_sampling_correction"), ("rl", "mismatch"), "none")
    elif corrected:
        kind = "sequence" if str(mode).startswith("sequence") else "token"
        draft.map(("trl", "vllm_importance_sampling_correction"), ("rl", "mismatch"), kind)
    if mode in ("token_truncate", "sequence_truncate") and corrected is not False:
        draft.map(("trl", "vllm_importance_sampling_mode"), ("rl", "mismatch"), str(mode).partition("_")[0])
    elif mode is not None:
        draft.refuse(("trl", "vllm_importance_sampling_mode"), "`rl.mismatch` truncates weights, per token or sequence")
    if (cap := draft.number("trl", "vllm_importance_sampling_cap")) is not None:
        draft.map(("trl", "vllm_importance_sampling_cap"), ("rl", "mismatch_cap"), max(float(cap), 1.0))
    for name in ("log_completions", "num_completions_to_print"):
        draft.skip(("trl", name), "samples.jsonl in the run folder has every sample") if draft.get(
            "trl", name
        ) is not None else None
