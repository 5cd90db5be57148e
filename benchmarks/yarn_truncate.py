"""Question: what does an answer lose where YaRN's range is rounded outwards, as llama.cpp and MLX do with any export?

Run: python -m benchmarks.yarn_truncate      Needs: 2 cores, minutes      Answer quoted in: docs/export.md

gpt-oss's config says `truncate: false`; those two read it as true, and no file can tell them otherwise. The model is
the demo's shape with the released models' rotary embedding (64 dimensions a head, theta, factor, range), trained on
documents of `--length` tokens, and computed by Ossia both ways on held-out ones of 4,096. What the rotations
themselves differ by depends on the config alone, so that table holds for the released models as it stands.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import sys
import tempfile
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import ossia
from benchmarks.common import where, write_result
from ossia.data.pack import Pack
from ossia.data.sample import Sample
from ossia.demo.conversations import Sizes, make_data
from ossia.demo.start import write_untrained
from ossia.demo.vocabulary import conversation_of, write_vocabulary
from ossia.harmony import Renderer, Vocabulary
from ossia.model.arch import SHAPES, Arch
from ossia.model.checkpoint import Checkpoint
from ossia.model.transformer import Transformer
from ossia.model.weights import Weights
from ossia.ops.rope import Yarn, yarn_frequencies

PACKAGES = ("torch", "tokenizers", "numpy", "safetensors")
LENGTH, HELD_OUT = 4096, 2
HEAD_DIM = SHAPES["20b"].head_dim
EDGES = (0, 128, 256, 512, 1024, 2048, 4096)
FAR = (128, 1024, 4096, 32_768, 131_072)


def documents(folder: Path, count: int, seed: int) -> tuple[Path, list[list[int]]]:
    """A tokenizer's file, and documents of `LENGTH` ids: the demo's conversations one after the other."""
    data = make_data(seed, Sizes(train_sorting=6000, train_chats=3000, heldout_sorting=0, heldout_chats=0))
    tokenizer = write_vocabulary(data.train, folder / "tokenizer.json")
    renderer, rng = Renderer(Vocabulary.from_file(tokenizer)), random.Random(seed)
    whole = [renderer.completion(conversation_of(row)) for row in data.train]
    made: list[list[int]] = []
    while len(made) < count:
        ids: list[int] = []
        while len(ids) < LENGTH:
            ids += rng.choice(whole)
        made.append(ids[:LENGTH])
    return tokenizer, made


def train(folder: Path, steps: int, length: int, seed: int) -> tuple[Path, list[list[int]]]:
    """The trained model, and documents that it hasn't seen."""
    tokenizer, made = documents(folder, steps + HELD_OUT, seed)
    write_untrained(folder / "start", tokenizer, seed=seed, head_dim=HEAD_DIM)
    rows = [{"ids": ids[:length], "weights": [0, *[1] * (length - 1)]} for ids in made[HELD_OUT:]]
    (folder / "documents.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe = {
        "model": str(folder / "start"),
        "dtype": "float32",
        "weights": "bf16",
        "data": str(folder / "documents.jsonl"),
        "max_length": length,
        "train": {"steps": steps, "tokens_per_step": length, "learning_rate": 3e-3, "warmup": 0.05, "save_every": 0},
        "output": str(folder / "run"),
    }
    return ossia.train(recipe).trained, made[:HELD_OUT]


def opened(model: Path, *, truncate: bool) -> Transformer:
    """The model in float32, its rope as the config says or rounded."""
    checkpoint = Checkpoint.open(model)
    checkpoint = replace(checkpoint, arch=replace(checkpoint.arch, rope_truncate=truncate))
    return Transformer(Weights(checkpoint, "mmap", torch.float32, torch.device("cpu")))


@torch.no_grad()
def differences(model: Path, texts: list[list[int]]) -> tuple[list[dict[str, Any]], float]:
    """Rounded against right, by position; and the mean loss of the right one, nats a token.

    Letters: T positions, V vocabulary.
    """
    right, rounded = (opened(model, truncate=truncate) for truncate in (False, True))
    columns: dict[str, list[Tensor]] = {"max_abs": [], "kl": [], "same": [], "loss": [], "loss_rounded": []}
    for ids in texts:
        pack = Pack.from_samples([Sample(np.array(ids, np.int32), np.ones(len(ids), np.float32), None, "", ())])
        a_TV, b_TV = (one.logits(pack).double() for one in (right, rounded))
        log_p, log_q = a_TV.log_softmax(-1), b_TV.log_softmax(-1)
        targets_T1 = torch.tensor([*ids[1:], ids[0]])[:, None]
        columns["max_abs"].append((a_TV - b_TV).abs().amax(-1))
        columns["kl"].append((log_p.exp() * (log_p - log_q)).sum(-1))
        columns["same"].append((a_TV.argmax(-1) == b_TV.argmax(-1)).double())
        for name, table in (("loss", log_p), ("loss_rounded", log_q)):
            columns[name].append(-table.gather(1, targets_T1)[:, 0])
    whole = {name: torch.stack(rows)[:, :-1] for name, rows in columns.items()}
    bins = []
    for low, high in pairwise(EDGES):
        part = {name: rows[:, low:high] for name, rows in whole.items()}
        means = {name: float(part[name].mean()) for name in ("kl", "loss", "loss_rounded")}
        bins.append(
            {
                "from": low,
                "to": high,
                "positions": part["kl"].numel(),
                "max_abs": float(part["max_abs"].max()),
                "top1": float(part["same"].mean()),
                **means,
            }
        )
    return bins, float(whole["loss"].mean())


def rotations(arch: Arch) -> dict[str, Any]:
    """By how much the two readings rotate a pair of dimensions differently, at most, in radians by distance."""
    kinds = [
        Yarn(
            arch.head_dim,
            arch.rope_theta,
            arch.rope_factor,
            arch.rope_beta_fast,
            arch.rope_beta_slow,
            arch.rope_original,
            truncate,
        )
        for truncate in (False, True)
    ]
    right_F, rounded_F = (yarn_frequencies(kind)[0].double() for kind in kinds)
    off_F = (right_F - rounded_F).abs()
    return {
        "frequencies_that_differ": int((off_F > 0).sum()),
        "of": len(off_F),
        "largest_relative": float((off_F / right_F).max()),
        "radians": {str(distance): float((off_F * distance).max()) for distance in FAR},
    }


def main() -> None:
    """Train, measure, write benchmarks/results/yarn_truncate.json, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--length", type=int, default=LENGTH, help="tokens of a document that is trained on")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as scratch:
        model, texts = train(Path(scratch), options.steps, options.length, options.seed)
        bins, loss = differences(model, texts)
    result = {
        "question": (__doc__ or "").splitlines()[0],
        "config": {**vars(options), "asked_length": LENGTH, "documents": HELD_OUT, "head_dim": HEAD_DIM},
        "held_out_loss": loss,
        "by_position": bins,
        "rotations": rotations(SHAPES["20b"]),
        **where(PACKAGES),
    }
    print(write_result("yarn_truncate", result))
    for one in bins:
        print({key: value if isinstance(value, int) else f"{value:.2e}" for key, value in one.items()})
    print(result["rotations"], file=sys.stderr)


if __name__ == "__main__":
    main()
