"""What a client computes beside what Ossia computes from the same files: logits of texts, greedy answers to prompts.

Letters: T tokens, V vocabulary.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ossia.data.pack import Pack
from ossia.data.sample import Sample
from ossia.engine import Engine, Request, Sampling
from ossia.model.checkpoint import Checkpoint
from ossia.model.peft import load_adapter
from ossia.model.transformer import Transformer
from ossia.model.weights import Weights

WORKERS = Path(__file__).parent / "workers"
CPU = torch.device("cpu")


@dataclass(frozen=True, slots=True)
class Questions:
    """What every client is asked.

    texts    ids whose logits are compared at every position
    prompts  ids that are answered greedily, with at most `max_new` more
    stops    ids that end an answer
    """

    texts: Sequence[list[int]]
    prompts: Sequence[list[int]]
    max_new: int
    stops: Sequence[int]


@dataclass(frozen=True, slots=True)
class Answers:
    """What was made of them: float32 logits (T, V) of each text, the ids that follow each prompt; by whom."""

    logits: list[np.ndarray]
    answers: list[list[int]]
    versions: dict[str, str]


@dataclass(frozen=True, slots=True)
class Difference:
    """Of a client's answers from Ossia's.

    positions  whose logits were compared
    max_abs    largest difference of two logits
    kl         mean KL divergence of the client's next-token distribution from Ossia's, nats
    top1       share of positions with the same likeliest token
    prompts    answered; `same` of them with the same tokens to the last
    """

    positions: int
    max_abs: float
    kl: float
    top1: float
    prompts: int
    same: int

    @classmethod
    def between(cls, found: Answers, expected: Answers) -> Difference:
        """Raises AssertionError where one has more texts, prompts or positions."""
        largest, kl, top1 = 0.0, [], []
        for have, want in zip(found.logits, expected.logits, strict=True):
            assert have.shape == want.shape, f"logits of {have.shape}, to be {want.shape}"
            have_TV, want_TV = torch.from_numpy(have), torch.from_numpy(want)
            largest = max(largest, float((have_TV - want_TV).abs().max()))
            log_p, log_q = want_TV.double().log_softmax(-1), have_TV.double().log_softmax(-1)
            kl += (log_p.exp() * (log_p - log_q)).sum(-1).tolist()
            top1 += (have_TV.argmax(-1) == want_TV.argmax(-1)).tolist()
        same = sum(a == b for a, b in zip(found.answers, expected.answers, strict=True))
        mean = [sum(values) / max(1, len(values)) for values in (kl, top1)]
        return cls(len(kl), largest, *mean, len(expected.answers), same)


def ossias_model(model: Path, *, adapter: Path | None = None, truncate: bool) -> Transformer:
    """What clients are compared with, in float32.

    truncate  YaRN's range rounded outwards, as llama.cpp and MLX compute it whatever the config says
    """
    opened = Checkpoint.open(model)
    checkpoint = replace(opened, arch=replace(opened.arch, rope_truncate=truncate))
    lora = None if adapter is None else load_adapter(adapter, checkpoint.arch, CPU, base=checkpoint)
    return Transformer(Weights(checkpoint, "mmap", torch.float32, CPU), lora=lora)


def ossias_answers(transformer: Transformer, questions: Questions) -> Answers:
    """Ossia's own."""
    with torch.no_grad():
        logits = [transformer.logits(_pack(ids)).numpy() for ids in questions.texts]
    stops = frozenset(questions.stops)
    asked = [Request(ids, Sampling(0), questions.max_new, stops) for ids in questions.prompts]
    return Answers(logits, [one.ids for one in Engine(transformer).generate(asked)], {})


def _pack(ids: list[int]) -> Pack:
    weights = np.ones(len(ids), np.float32)
    return Pack.from_samples([Sample(np.array(ids, np.int32), weights, None, "text", ())])


def clients_answers(
    worker: str,
    model: Path,
    questions: Questions,
    *,
    adapter: Path | None = None,
    python: Path | str = sys.executable,
    path: Path | None = None,
    timeout_s: float = 600,
) -> Answers:
    """Those of a client, which runs in a process of its own.

    worker  file of `workers/`
    python  that has the client; `path` is put before its packages
    Raises  subprocess.CalledProcessError where it fails; its words are on stderr
    """
    with tempfile.TemporaryDirectory(prefix="ossia-client-") as scratch:
        job: dict[str, Any] = {"model": str(model), "adapter": None if adapter is None else str(adapter)}
        job |= {"texts": questions.texts, "prompts": questions.prompts, "max_new": questions.max_new}
        job |= {"stops": list(questions.stops), "scratch": scratch}
        asked, found = Path(scratch) / "job.json", Path(scratch) / "found.npz"
        asked.write_text(json.dumps(job))
        env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        # On so small a model threads mostly wait for each other; spinning they took five times the processor's time.
        env |= {"HF_HUB_OFFLINE": "1", "OMP_WAIT_POLICY": "PASSIVE"}
        env |= {} if path is None else {"PYTHONPATH": str(path)}
        command = [str(python), str(WORKERS / worker), str(asked), str(found)]
        subprocess.run(command, check=True, env=env, timeout=timeout_s, stdout=sys.stderr)
        with np.load(found) as read:
            logits = [read[f"logits_{n}"] for n in range(len(questions.texts))]
            answers = [read[f"answer_{n}"].tolist() for n in range(len(questions.prompts))]
            return Answers(logits, answers, json.loads(str(read["versions"])))
