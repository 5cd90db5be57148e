"""Question: what does an answer lose where YaRN's range is rounded outwards, as llama.cpp and MLX do with any export?

Run: python -m benchmarks.yarn_truncate      Needs: 2 cores, 20 minutes      Answer quoted in: docs/export.md

gpt-oss's config says `truncate: false`; those two read it as true, and no file can tell them otherwise. The model is
the demo's shape with the released models' rotary embedding (64 dimensions a head, theta, factor, range), trained on
documents of 256, of 2,048 and then of 8,192 tokens, twice as many as YaRN starts from, and computed by Ossia both ways
on held-out ones of 8,192. A document is conversations and notes, random ids that no model can guess; notes come again
later, and what is asked there is whether the model still finds them (this training teaches it that within 512 tokens
alone). What the rotations themselves differ by depends on the config alone, so that holds for the released models.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

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
LENGTH, HELD_OUT = 8192, 8
HEAD_DIM = SHAPES["20b"].head_dim
EDGES = (0, 512, 1024, 2048, 4096, 8192)
FAR = (128, 1024, 4096, 32_768, 131_072)
NOTE, KNOWN = 24, 4  # ids of a note; those after which it is clear which one comes again
NOTE_IDS = 64  # of which notes are made


class Stage(NamedTuple):
    """Steps of training on documents of a length."""

    length: int
    steps: int
    tokens_per_step: int
    learning_rate: float


STAGES = (Stage(256, 1500, 2048, 4e-3), Stage(2048, 150, 4096, 1.5e-3), Stage(LENGTH, 60, LENGTH, 1e-3))


class Document(NamedTuple):
    """Ids, and where a note comes again: (position of its first id, ids since it stood there the last time)."""

    ids: list[int]
    repeats: list[tuple[int, int]]


def document(rng: random.Random, conversations: Sequence[list[int]], length: int) -> Document:
    """One of `length` ids: each piece a conversation, a new note, or any of the notes before."""
    ids: list[int] = []
    last: dict[tuple[int, ...], int] = {}
    repeats = []
    while len(ids) < length:
        kind = rng.random()
        if kind < 0.1:
            ids += rng.choice(conversations)
            continue
        again = kind < 0.7 and bool(last)
        note = rng.choice([*last]) if again else tuple(rng.randrange(NOTE_IDS) for _ in range(NOTE))
        if again and len(ids) + NOTE <= length:
            repeats.append((len(ids), len(ids) - last[note]))
        last[note] = len(ids)
        ids += note
    return Document(ids[:length], repeats)


def train(folder: Path, stages: Sequence[Stage], seed: int) -> tuple[Path, list[Document]]:
    """The trained model, and documents that it hasn't seen."""
    data = make_data(seed, Sizes(train_sorting=6000, train_chats=3000, heldout_sorting=500, heldout_chats=500))
    tokenizer = write_vocabulary((*data.train, *data.heldout), folder / "tokenizer.json")
    renderer, rng = Renderer(Vocabulary.from_file(tokenizer)), random.Random(seed)
    seen, unseen = ([renderer.completion(conversation_of(row)) for row in rows] for rows in (data.train, data.heldout))
    model = folder / "start"
    write_untrained(model, tokenizer, seed=seed, head_dim=HEAD_DIM)
    for number, stage in enumerate(stages):
        rows = [
            document(rng, seen, stage.length).ids for _ in range(stage.steps * stage.tokens_per_step // stage.length)
        ]
        lines = [json.dumps({"ids": ids, "weights": [0, *[1] * (len(ids) - 1)]}) for ids in rows]
        (folder / f"documents-{number}.jsonl").write_text("\n".join(lines) + "\n")
        recipe = {
            "model": str(model),
            "dtype": "float32",
            "weights": "bf16",
            "data": str(folder / f"documents-{number}.jsonl"),
            "max_length": stage.length,
            "train": {
                "steps": stage.steps,
                "tokens_per_step": stage.tokens_per_step,
                "learning_rate": stage.learning_rate,
                "warmup": 0.05,
                "save_every": 0,
            },
            "output": str(folder / f"run-{number}"),
        }
        model = ossia.train(recipe).trained
    return model, [document(rng, unseen, LENGTH) for _ in range(HELD_OUT)]


def opened(model: Path, *, truncate: bool) -> Transformer:
    """The model in float32, its rope as the config says or rounded."""
    checkpoint = Checkpoint.open(model)
    checkpoint = replace(checkpoint, arch=replace(checkpoint.arch, rope_truncate=truncate))
    return Transformer(Weights(checkpoint, "mmap", torch.float32, torch.device("cpu")))


@torch.no_grad()
def differences(model: Path, documents: Sequence[Document]) -> dict[str, Any]:
    """Rounded against right, by position; by how far back the note stands that comes again, on its ids alone.

    Letters: T positions, V vocabulary.
    """
    right, rounded = (opened(model, truncate=truncate) for truncate in (False, True))
    columns: dict[str, list[Tensor]] = {name: [] for name in ("max_abs", "kl", "same", *_SIDES)}
    columns |= {f"hit{side.removeprefix('loss')}": [] for side in _SIDES}
    for ids, _ in documents:
        pack = Pack.from_samples([Sample(np.array(ids, np.int32), np.ones(len(ids), np.float32), None, "", ())])
        a_TV, b_TV = (one.logits(pack).double() for one in (right, rounded))
        log_p, log_q = a_TV.log_softmax(-1), b_TV.log_softmax(-1)
        targets_T1 = torch.tensor([*ids[1:], ids[0]])[:, None]
        columns["max_abs"].append((a_TV - b_TV).abs().amax(-1))
        columns["kl"].append((log_p.exp() * (log_p - log_q)).sum(-1))
        columns["same"].append((a_TV.argmax(-1) == b_TV.argmax(-1)).double())
        for side, table in zip(_SIDES, (log_p, log_q), strict=True):
            columns[side].append(-table.gather(1, targets_T1)[:, 0])
            columns[f"hit{side.removeprefix('loss')}"].append((table.argmax(-1) == targets_T1[:, 0]).double())
    whole = {name: torch.stack(rows) for name, rows in columns.items()}
    place = torch.arange(LENGTH).expand(len(documents), -1)
    distance = torch.zeros(len(documents), LENGTH, dtype=torch.int64)
    for row, (_, repeats) in enumerate(documents):
        for start, back in repeats:  # the position before an id says it
            distance[row, start + KNOWN - 1 : start + NOTE - 1] = back
    place = place.masked_fill(place == LENGTH - 1, -1)  # what comes after the last isn't there
    return {"by_position": _binned(whole, place, 0), "by_distance": _binned(whole, distance, 1)}


_SIDES = ("loss", "loss_rounded")


def _binned(whole: dict[str, Tensor], of: Tensor, least: int) -> list[dict[str, Any]]:
    """Means and the largest over what lies between two edges, by `of`; from `least` on."""
    found = []
    for low, high in pairwise(EDGES):
        chosen = (of >= max(low, least)) & (of < high)
        part = {name: rows[chosen] for name, rows in whole.items()}
        means = {name: float(part[name].mean()) for name in ("kl", *_SIDES, "hit", "hit_rounded")}
        largest, same = float(part["max_abs"].max()), float(part["same"].mean())
        found.append(
            {"from": low, "to": high, "positions": int(chosen.sum()), "max_abs": largest, "top1": same, **means}
        )
    return found


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
    """Train, measure, write benchmarks/results/yarn_truncate.json, print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as scratch:
        model, documents = train(Path(scratch), STAGES, options.seed)
        found = differences(model, documents)
    stages = [stage._asdict() for stage in STAGES]
    config = {**vars(options), "stages": stages, "asked_length": LENGTH, "documents": HELD_OUT, "head_dim": HEAD_DIM}
    result = {
        "question": (__doc__ or "").splitlines()[0],
        "config": config | {"note": NOTE, "known": KNOWN, "note_ids": NOTE_IDS},
        **found,
        "rotations": rotations(SHAPES["20b"]),
        **where(PACKAGES),
    }
    print(write_result("yarn_truncate", result))
    for table in found.values():
        for one in table:
            print({key: value if isinstance(value, int) else f"{value:.2e}" for key, value in one.items()})
    print(result["rotations"], file=sys.stderr)


if __name__ == "__main__":
    main()
