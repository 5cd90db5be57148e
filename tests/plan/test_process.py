"""The plan against a process's own largest resident set."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from ossia.model.arch import SHAPES, alternating_layers
from tests.conftest import MakeTiny

SHAPE = dataclasses.replace(
    SHAPES["B1"], hidden_size=192, intermediate_size=256, num_layers=3, layer_types=alternating_layers(3), num_experts=8
)
STEPS = """
import json, sys
from pathlib import Path
import numpy as np, torch
from ossia.data.pack import Pack
from ossia.data.sample import Sample
from ossia.model.checkpoint import Checkpoint
from ossia.model.lora import Lora, LoraSpec
from ossia.model.transformer import Transformer
from ossia.model.weights import Weights
from ossia.ops.memory import peak_resident_bytes
from ossia.plan.memory import footprint
from ossia.train.optim import AdamW
from ossia.train.step import train_step, work_of

cpu, tokens = torch.device("cpu"), 3072
model = Transformer(Weights(Checkpoint.open(Path(sys.argv[1])), sys.argv[2], torch.float32, cpu))
ranks = dict.fromkeys(("q_proj", "o_proj", "gate_up_proj", "down_proj"), (8, 16.0))
model.use_adapter(Lora.fresh(model.arch, LoraSpec(ranks), seed=0, device=cpu))
optimizer = AdamW(model.trainable.tensors, betas=(0.9, 0.9), eps=1e-8, weight_decay=0.0)


def pack_of(tokens):
    ids, weights = np.arange(tokens, dtype=np.int32) % model.arch.vocab_size, np.ones(tokens, np.float32)
    return Pack.from_samples([Sample(ids, weights, None, "random:1", ())])


# a small step first: what a process needs once, for the code that runs and its threads
train_step(model, optimizer, [pack_of(160)], lr=1e-4, clip=1.0, recompute=True)
before, pack = peak_resident_bytes(), pack_of(tokens)
for _ in range(2):
    train_step(model, optimizer, [pack], lr=1e-4, clip=1.0, recompute=sys.argv[3] == "recompute")
used = footprint(work_of(model, pack=tokens, packs=1, recompute=sys.argv[3] == "recompute"), tokenizer=False).host
there = ("process", "weights", "trained, float32", "optimizer", "allocator")
planned = sum(size for part, size in used.items() if part not in there)
print(json.dumps({"measured": peak_resident_bytes() - before, "planned": planned, "kernels": model.kernels}))
"""


@pytest.mark.parametrize("how", ["recompute", "keep"])
def test_a_process_grows_by_what_the_plan_says(tiny: MakeTiny, how: str, tmp_path: Path) -> None:
    # every block that is larger than this comes from the system and goes back to it: no holes, which are noise
    env = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1"}
    words = [sys.executable, "-c", STEPS, str(tiny(SHAPE)), "bf16", how]
    done = subprocess.run(words, env=env, capture_output=True, text=True, check=True)
    found = json.loads(done.stdout)
    if found["kernels"] != "c":
        pytest.skip("the budget of a CPU is that of its passes in C")
    assert found["measured"] > 60e6
    assert found["planned"] == pytest.approx(found["measured"], rel=0.05)
