"""A job as every client gets it, and what it answers: files, so that a client may run under any Python.

Run by path: `python onnx_genai.py JOB.json FOUND.npz`, and no worker imports Ossia or torch unless its client does.
A job: {"model": a folder or file, "adapter": a folder, a file or null, "texts": [ids ...], "prompts": [ids ...],
"max_new": tokens, "stops": [id ...], "scratch": an empty folder}.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

Logits = Callable[[list[int]], np.ndarray]
Greedy = Callable[[list[list[int]]], list[list[int]]]


class Client(NamedTuple):
    """A loaded model.

    logits  ids -> (T, V) float32, one row a position
    greedy  prompts -> the ids that follow each, a stop included; all of them at once, for clients that batch
    """

    logits: Logits
    greedy: Greedy


def one_by_one(greedy: Callable[[list[int]], list[int]]) -> Greedy:
    """For a client that answers one prompt at a time."""
    return lambda prompts: [greedy(ids) for ids in prompts]


def run(packages: Sequence[str], load: Callable[[dict[str, Any]], Client]) -> None:
    """Do the job that the command line names: logits of every text, a greedy answer to every prompt."""
    job = json.loads(Path(sys.argv[1]).read_text())
    client = load(job)
    found = {f"logits_{n}": client.logits(ids).astype(np.float32) for n, ids in enumerate(job["texts"])}
    answers = client.greedy(job["prompts"]) if job["prompts"] else []
    found |= {f"answer_{n}": np.array(ids, np.int64) for n, ids in enumerate(answers)}
    versions = {name: metadata.version(name) for name in packages}
    np.savez(sys.argv[2], versions=np.array(json.dumps(versions)), **found)
