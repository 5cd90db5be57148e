"""Question: how fast does the engine generate on CPU against transformers' `generate`, from the same checkpoint?

Run: python -m benchmarks.decode_cpu --case demo-16      Needs: 2 cores      Quoted in: README.md

Both sides load the same checkpoint and continue the same random prompts greedily, in turn, after a warm-up; the first
repeat's tokens have to agree. Where all requests are alike the peer's `generate` has nothing to pad. The rollout case
is TRL's default way (`GRPOTrainer` without vLLM): prompts padded on the left, one `generate` until the last answer
ends; the lengths of answers follow a lognormal distribution, forced on both sides. tokens/s counts sampled tokens
that somebody wants: up to each answer's end. Ossia's side also returns a logprob for every token.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from benchmarks.common import ratio_of_medians, serve, side_by_side, take_turns, where

MODULE = "benchmarks.decode_cpu"
PACKAGES = ("torch", "transformers", "numpy", "safetensors", "tokenizers")
SMALL_VOCABULARY = 512
AGREE = {"float32": 0.99, "bfloat16": 0.9}  # of the tokens before a row's first difference is counted


@dataclass(frozen=True)
class Case:
    """A bench shape, how many prompts of which length, and how many tokens each is answered with."""

    shape: str
    dtype: str
    batch: int
    prompt: int
    new: int
    rollout: bool = False  # lengths of prompts and answers differ


CASES = {
    "b1-1": Case("B1", "bfloat16", 1, 64, 64),
    "b1-16": Case("B1", "bfloat16", 16, 64, 48),
    "demo-1": Case("demo", "float32", 1, 64, 256),
    "demo-16": Case("demo", "float32", 16, 64, 192),
    "demo-64": Case("demo", "float32", 64, 64, 128),
    "rollout": Case("demo", "float32", 64, 64, 128, rollout=True),
}


def prompts_and_lengths(case: Case) -> tuple[list[list[int]], list[int]]:
    """What is continued, and by how many tokens: `case.prompt` and `case.new` are the medians of a rollout's."""
    rng = np.random.default_rng(0)
    prompt_lengths, new = [case.prompt] * case.batch, [case.new] * case.batch
    if case.rollout:
        spread = np.exp(rng.normal(0, 0.8, (2, case.batch)))
        prompt_lengths = np.clip(case.prompt * spread[0], 8, 4 * case.prompt).astype(int).tolist()
        new = np.clip(case.new * spread[1], 8, 8 * case.new).astype(int).tolist()
    return [rng.integers(0, 256, length).tolist() for length in prompt_lengths], new


def make_checkpoint(case: Case, folder: Path) -> None:
    """The case's shape: B1 with the full vocabulary, the demo's with 512 rows."""
    from ossia.harmony.o200k import o200k_harmony_tokenizer_json, prune
    from ossia.model.arch import SHAPES
    from ossia.model.tiny import make_tiny

    if case.shape != "demo":
        make_tiny(folder, SHAPES[case.shape])
        return
    text, _ = prune(o200k_harmony_tokenizer_json(), [chr(code) for code in range(32, 127)])
    tokenizer = folder.with_suffix(".tokenizer") / "tokenizer.json"
    tokenizer.parent.mkdir(parents=True)
    tokenizer.write_text(text, encoding="utf-8")
    make_tiny(folder, SHAPES["demo"], tokenizer=tokenizer, vocab_rows=SMALL_VOCABULARY)


def ossia_worker(case: Case, folder: Path, threads: int) -> None:
    """Ossia's side."""
    from ossia.engine import Engine, Request, Sampling
    from ossia.model.open import open_model

    model, _ = open_model(str(folder), dtype=case.dtype, weights="bf16")
    prompts, new = prompts_and_lengths(case)
    requests = [Request(ids, Sampling(0), length) for ids, length in zip(prompts, new, strict=True)]
    engine = Engine(model, max_batch=case.batch)

    def run() -> dict[str, Any]:
        start = time.perf_counter()
        found = engine.generate(requests)
        return {"seconds": time.perf_counter() - start, "ids": [one.ids for one in found]}

    serve({"tokens": sum(new), "prompt_tokens": sum(map(len, prompts))}, run)


def peer_worker(case: Case, folder: Path, threads: int) -> None:
    """transformers' generate with a dynamic cache, as TRL calls it."""
    import torch
    from transformers import AutoModelForCausalLM, GenerationConfig

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, case.dtype)).eval()
    prompts, new = prompts_and_lengths(case)
    longest = max(map(len, prompts))
    ids = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    config = GenerationConfig(
        do_sample=False, max_new_tokens=max(new), min_new_tokens=max(new), eos_token_id=None, pad_token_id=0
    )  # fmt: skip

    @torch.no_grad()
    def run() -> dict[str, Any]:
        start = time.perf_counter()
        found = model.generate(input_ids=ids, attention_mask=mask, generation_config=config)
        answers = found[:, longest:].tolist()
        seconds = time.perf_counter() - start
        return {"seconds": seconds, "ids": [one[:length] for one, length in zip(answers, new, strict=True)]}

    serve({"tokens": sum(new), "prompt_tokens": sum(map(len, prompts))}, run)


SIDES = {"ossia": ossia_worker, "peer": peer_worker}


def agreement(mine: list[list[int]], theirs: list[list[int]]) -> float:
    """The share of tokens up to each row's first difference, which may come from rounding and changes all after it."""
    same = total = 0
    for a, b in zip(mine, theirs, strict=True):
        first = next((i for i, (x, y) in enumerate(zip(a, b, strict=True)) if x != y), len(a))
        same += first
        total += min(first + 1, len(a))
    return same / total


def compare(name: str, folder: Path, repeats: int, threads: int) -> dict[str, Any]:
    """Both sides in turn."""
    case = CASES[name]
    ready, runs = take_turns(MODULE, name, folder, SIDES, repeats, threads)
    assert ready["ossia"] == ready["peer"], ready
    first = {side: found[0]["ids"] for side, found in runs.items()}
    seconds = {side: [run["seconds"] for run in found] for side, found in runs.items()}
    agreed = agreement(first["ossia"], first["peer"])
    assert agreed >= AGREE[case.dtype], f"only {agreed:.3f} of the tokens agree"
    counted = {side: found[1:] for side, found in seconds.items()}
    tokens = ready["ossia"]["tokens"]
    return {
        "question": (__doc__ or "").splitlines()[0],
        "case": name,
        "config": {**vars(case), "repeats": repeats, "threads": threads, **ready["ossia"]},
        "agreement": agreed,
        "tokens_per_s": {side: tokens / median(found) for side, found in counted.items()},
        "speedup": ratio_of_medians(counted["peer"], counted["ossia"]),
        "raw_s": seconds,
        **where(PACKAGES),
    }


def tell(result: dict[str, Any]) -> str:
    """The result in a line."""
    rate = result["tokens_per_s"]
    return f"{rate['ossia']:.0f} against {rate['peer']:.0f} tokens/s, {result['speedup']:.2f}x"


if __name__ == "__main__":
    side_by_side(MODULE, __doc__ or "", CASES, "demo-16", make=make_checkpoint, sides=SIDES, compare=compare, tell=tell)
