"""Question: how fast does the engine generate on CPU against llama.cpp, batch 1, from the same weights?

Run: python -m benchmarks.decode_llamacpp --case demo-f32      Needs: 2 cores

llama.cpp is the prebuilt package of the extra `gguf-run`, compiled for any x86-64 (its authors say that a build for one
machine is faster), its server asked over loopback; its own timing of the decode steps is taken, which leaves HTTP and
the prompt out. Its threads wait as OpenMP does by default, which matters more than the rest: two that sleep instead
(OMP_WAIT_POLICY=PASSIVE) generate ten times slower on these small models. Ossia's side is measured from the first
sampled token to the last, and returns every token's logprob beside it. Both continue the same random prompt greedily,
in turn, after a warm-up; the first tokens have to agree: YaRN's range is rounded on both sides, because llama.cpp
always does.
"""

from __future__ import annotations

import json
import time
import urllib.request
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from benchmarks.common import ratio_of_medians, serve, side_by_side, take_turns, where

MODULE = "benchmarks.decode_llamacpp"
PACKAGES = ("torch", "numpy", "safetensors", "tokenizers", "gguf", "xllamacpp")
WORDS = "The quick brown fox jumps over the lazy dog."
# Tokens that have to agree; later ones may differ by rounding, and then go separate ways. A random model's likeliest
# tokens are near each other: in bf16 the second may be another already.
FIRST = {"float32": 8, "bfloat16": 1}


@dataclass(frozen=True)
class Case:
    """A bench shape, the type of its matrices on both sides, and how many tokens go in and come out."""

    shape: str
    dtype: str
    gguf_type: str
    prompt: int
    new: int


CASES = {
    "demo-f32": Case("demo", "float32", "f32", 64, 256),
    "demo-bf16": Case("demo", "bfloat16", "bf16", 64, 256),
    "b1-bf16": Case("B1", "bfloat16", "bf16", 64, 128),
}


def prompt_of(case: Case) -> list[int]:
    """What is continued."""
    return np.random.default_rng(0).integers(0, 256, case.prompt).tolist()


def make_models(case: Case, folder: Path) -> None:
    """The case's shape with few tokens and experts in bf16, as a checkpoint in `model` and as `model.gguf`."""
    from ossia.export import export_model
    from ossia.harmony.o200k import o200k_harmony_tokenizer_json, prune
    from ossia.model.arch import SHAPES
    from ossia.model.tiny import make_tiny

    folder.mkdir(parents=True, exist_ok=True)
    text, _ = prune(o200k_harmony_tokenizer_json(), [*map(chr, range(32, 127)), WORDS])
    (folder / "tokenizer.json").write_text(text, encoding="utf-8")
    arch = replace(SHAPES[case.shape], rope_truncate=True)
    make_tiny(folder / "model", arch, weights="bf16", tokenizer=folder / "tokenizer.json", vocab_rows=512)
    export_model(str(folder / "model"), to="gguf", output=folder / "model.gguf", gguf_type=case.gguf_type)


def ossia_worker(case: Case, folder: Path, threads: int) -> None:
    """Ossia's side."""
    from ossia.engine import Engine, Request, Sampling
    from ossia.model.open import open_model

    model, _ = open_model(str(folder / "model"), dtype=case.dtype, weights="bf16", device="cpu")
    engine, request = Engine(model, max_batch=1), Request(prompt_of(case), Sampling(0), case.new)

    def run() -> dict[str, Any]:
        ids, start = [], 0.0
        for token in engine.stream([request]):
            start = start or time.perf_counter()
            ids.append(token.id)
        return {"seconds": time.perf_counter() - start, "ids": ids}

    serve({"threads": threads}, run)


def llamacpp_worker(case: Case, folder: Path, threads: int) -> None:
    """llama.cpp's server in this process."""
    from ossia.web.gguf import LlamaOptions, start_llama

    size = case.prompt + case.new + 64
    server = start_llama(folder / "model.gguf", LlamaOptions(threads=threads, ctx_size=size, parallel=1))
    body = {
        "prompt": prompt_of(case),
        "n_predict": case.new,
        "temperature": 0,
        "ignore_eos": True,
        "cache_prompt": False,
        "return_tokens": True,
    }
    url, headers = f"{server.listening_address}/completion", {"Content-Type": "application/json"}

    def run() -> dict[str, Any]:
        with urllib.request.urlopen(urllib.request.Request(url, json.dumps(body).encode(), headers)) as answer:
            found = json.loads(answer.read())
        assert len(found["tokens"]) == case.new, len(found["tokens"])
        each_ms = found["timings"]["predicted_per_token_ms"]
        return {"seconds": each_ms * (case.new - 1) / 1000, "ids": found["tokens"]}

    serve({"threads": threads}, run)


SIDES = {"ossia": ossia_worker, "llamacpp": llamacpp_worker}


def compare(name: str, folder: Path, repeats: int, threads: int) -> dict[str, Any]:
    """Both sides in turn."""
    case = CASES[name]
    _, runs = take_turns(MODULE, name, folder, SIDES, repeats, threads)
    first = {side: found[0]["ids"] for side, found in runs.items()}
    seconds = {side: [run["seconds"] for run in found] for side, found in runs.items()}
    same = next((i for i, (a, b) in enumerate(zip(*first.values(), strict=True)) if a != b), case.new)
    assert same >= FIRST[case.dtype], f"only the first {same} tokens agree"
    counted = {side: found[1:] for side, found in seconds.items()}
    return {
        "question": (__doc__ or "").splitlines()[0],
        "case": name,
        "config": {**vars(case), "repeats": repeats, "threads": threads},
        "first_tokens_that_agree": same,
        "tokens_per_s": {side: (case.new - 1) / median(found) for side, found in counted.items()},
        "speedup": ratio_of_medians(counted["llamacpp"], counted["ossia"]),
        "raw_s": seconds,
        **where(PACKAGES),
    }


def tell(result: dict[str, Any]) -> str:
    """The result in a line."""
    rate = result["tokens_per_s"]
    return f"{rate['ossia']:.0f} against {rate['llamacpp']:.0f} tokens/s, {result['speedup']:.2f}x"


if __name__ == "__main__":
    side_by_side(MODULE, __doc__ or "", CASES, "demo-f32", make=make_models, sides=SIDES, compare=compare, tell=tell)
