"""The model card of a pushed export: what it is, what it was trained from and how, and how to load it.

It is made of a short list of facts that may be public. Of a recipe only the keys named here go in, which hold numbers,
switches and words of the schema; folders, addresses, prompts and rewards never do.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml

from ossia.config import RECIPE_IN_RUN, Recipe, load_recipe
from ossia.errors import UserError
from ossia.train.events import ENV, EVENTS, read_events

Kind = Literal["hf-bf16", "hf-mxfp4", "peft", "gguf", "gguf-lora"]
WRITTEN_BY = "<!-- written by ossia; leave this line out and a later push leaves this card alone -->"
_LIBRARIES: Mapping[Kind, str] = {
    "hf-bf16": "transformers",
    "hf-mxfp4": "transformers",
    "peft": "peft",
    "gguf": "gguf",
    "gguf-lora": "gguf",
}
_WHAT: Mapping[Kind, str] = {
    "hf-bf16": "the whole model, merged, in bfloat16",
    "hf-mxfp4": "the whole model, merged, its experts in MXFP4 as in the released checkpoints",
    "peft": "a LoRA adapter, in PEFT's format",
    "gguf": "the whole model as a GGUF file, for llama.cpp",
    "gguf-lora": "a LoRA adapter as a GGUF file, for llama.cpp",
}
# What of a recipe may be public, by section; "" is its top. None of these keys takes free text.
_PUBLIC: Mapping[str, tuple[str, ...]] = {
    "": ("method", "dtype", "weights", "max_length", "qat"),
    "adapter": ("rank", "alpha", "targets", "dropout", "rslora"),
    "train": (
        *("steps", "epochs", "tokens_per_step", "learning_rate", "schedule", "min_lr_ratio", "warmup"),
        *("weight_decay", "eps", "clip", "seed"),
    ),
    "eval": ("split", "every"),
    "rl": (
        *("prompts", "group", "max_new", "loss", "clip_low", "clip_high", "spread", "iterations", "kl"),
        *("kl_estimator", "mismatch", "router_replay", "overlong"),
    ),
}


@dataclass(frozen=True, slots=True)
class Run:
    """What a run folder tells a card."""

    recipe: Recipe
    events: Sequence[Mapping[str, Any]]
    env: Mapping[str, Any]

    @classmethod
    def open(cls, folder: Path) -> Run:
        """Raises UserError for a folder that is no run's, RecipeError for a recipe that can't be read."""
        if not (folder / RECIPE_IN_RUN).is_file():
            raise UserError(
                f"{folder}: no {RECIPE_IN_RUN} in it; name a run folder of `ossia train`, or leave --run out"
            )
        events = read_events(folder / EVENTS) if (folder / EVENTS).is_file() else []
        try:
            env = json.loads((folder / ENV).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            env = {}
        return cls(load_recipe(folder / RECIPE_IN_RUN), events, env if isinstance(env, dict) else {})


def model_card(
    kind: Kind, repo: str, *, file: str | None, base: str | None, datasets: Sequence[str], run: Run | None
) -> str:
    """README.md of a repository: front matter that the hub reads, then words.

    file      of GGUF: its name in the repository
    base      hub name of the model that it was made from; None: not on the hub
    datasets  those of the run that are public on the hub, by name
    """
    alone = kind in ("peft", "gguf-lora")
    front: dict[str, Any] = {}
    if base is not None:
        relation = "adapter" if alone else "finetune" if run is not None else "quantized"
        front |= {"base_model": base, "base_model_relation": relation}
    front |= {"library_name": _LIBRARIES[kind], "pipeline_tag": "text-generation"}
    if license_of(base) is not None:
        front["license"] = license_of(base)
    if datasets:
        front["datasets"] = list(datasets)
    method = [] if run is None else [run.recipe.method]
    front["tags"] = ["gpt-oss", "ossia", *(["lora"] if alone else []), *method]
    parts = [
        "---\n" + yaml.safe_dump(front, sort_keys=False, allow_unicode=True) + "---",
        WRITTEN_BY,
        f"# {repo.partition('/')[2]}",
        _what(kind, base, run),
        *(["## Training", *_training(run, datasets)] if run is not None else []),
        "## Use",
        _use(kind, repo, file, base),
    ]
    return "\n\n".join(parts) + "\n"


def license_of(base: str | None) -> str | None:
    """The licence of the released models; of others, nothing that could be wrong."""
    return "apache-2.0" if base is not None and base.startswith("openai/gpt-oss-") else None


def _what(kind: Kind, base: str | None, run: Run | None) -> str:
    of = "a gpt-oss model" if base is None else f"[{base}](https://huggingface.co/{base})"
    how = "" if run is None else f", fine-tuned ({run.recipe.method.upper()})"
    return f"{of[0].upper()}{of[1:]}{how}: {_WHAT[kind]}. Written by `ossia export`."


def _training(run: Run, datasets: Sequence[str]) -> Iterator[str]:
    facts = list(_facts(run, datasets))
    yield "| | |\n|---|---|\n" + "\n".join(f"| {name} | {value} |" for name, value in facts)
    yield "```yaml\n" + yaml.safe_dump(public_recipe(run.recipe), sort_keys=False) + "```"


def _facts(run: Run, datasets: Sequence[str]) -> Iterator[tuple[str, str]]:
    steps = [event for event in run.events if event.get("event") == "step"]
    evals = [event for event in run.events if event.get("event") == "eval"]
    if steps:
        yield "steps", f"{steps[-1]['step']:,}"
        yield "tokens", f"{sum(event.get('tokens', 0) for event in steps):,}"
        if "loss" in steps[-1]:
            yield "loss, first and last step", f"{steps[0]['loss']:.4g}, {steps[-1]['loss']:.4g}"
    for key, name in (("eval_loss", "held-out loss"), ("eval_reward", "held-out reward")):
        found = [event for event in evals if isinstance(event.get(key), int | float)]
        if found:
            first = f"{found[0][key]:.4g} at step {found[0]['step']:,}, " if len(found) > 1 else ""
            yield name, f"{first}{found[-1][key]:.4g} at step {found[-1]['step']:,}"
    if run.recipe.data is not None:
        private = len(run.recipe.data) - len(datasets)
        rest = [f"{private} that {'is' if private == 1 else 'are'} not public"] if private > 0 else []
        yield "data", ", ".join([*datasets, *rest])
    if isinstance(run.env.get("device"), str):
        yield "device", run.env["device"]
    versions = [
        f"{name} {run.env[name]}" for name in ("ossia", "torch", "python") if isinstance(run.env.get(name), str)
    ]
    if versions:
        yield "versions", ", ".join(versions)


def public_recipe(recipe: Recipe) -> dict[str, Any]:
    """The part of a recipe that says how it was trained and nothing of the machine or the data."""
    given = recipe.model_dump(mode="json")
    found: dict[str, Any] = {}
    for section, keys in _PUBLIC.items():
        if section == "rl" and recipe.method == "sft":
            continue
        values = given if section == "" else given.get(section) or {}
        kept = {key: values[key] for key in keys if values.get(key) is not None}
        found |= kept if section == "" else {section: kept} if kept else {}
    return found


def _use(kind: Kind, repo: str, file: str | None, base: str | None) -> str:
    of = base or "BASE_MODEL"
    if kind in ("hf-bf16", "hf-mxfp4"):
        lines = f"vllm serve {repo}            # an OpenAI-compatible server\nossia chat {repo}"
        return f"```sh\n{lines}\n```\n\n```python\n{_TRANSFORMERS.format(repo=repo)}```"
    if kind == "peft":
        code = _PEFT.format(repo=repo, base=of)
        local = repo.partition("/")[2]
        lines = f"hf download {repo} --local-dir {local}\nossia chat {of} --adapter {local}"
        return f"```python\n{code}```\n\n```sh\n{lines}\n```"
    download = f"hf download {repo} {file} --local-dir ."
    if kind == "gguf":
        return f"```sh\n{download}\nllama-server -m {file}      # or: ossia serve {file}\n```"
    return (
        f"```sh\n{download}\nllama-server -m BASE.gguf --lora {file}\n```\n\n"
        f"`BASE.gguf` is {of} as a GGUF file, whatever its matrices are stored as."
    )


_TRANSFORMERS = """from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("{repo}")
model = AutoModelForCausalLM.from_pretrained("{repo}", dtype="auto", device_map="auto")
"""
_PEFT = """from peft import PeftModel
from transformers import AutoModelForCausalLM, Mxfp4Config

expanded = Mxfp4Config(dequantize=True)  # an adapter on experts needs them in bfloat16
model = AutoModelForCausalLM.from_pretrained("{base}", quantization_config=expanded, dtype="auto", device_map="auto")
model = PeftModel.from_pretrained(model, "{repo}")
"""
