"""Question: how fast and how frugal is a LoRA step on CPU against transformers + peft, on the same ids and weights?

Run: python -m benchmarks.sft_cpu --case b1-2048      Needs: 2 cores, 24 GiB for b1-8192      Quoted in: README.md

Both sides load the same checkpoint (experts in MXFP4, expanded to bfloat16), put LoRA r16 on attention, in the cases
named so r8 on the experts too, and take whole optimizer steps over the same pack, in turn, after a warm-up.
transformers runs with its default grouped experts, gradient checkpointing, and adapters in bfloat16 (peft's
`target_parameters` on experts); packed documents are kept apart by `position_ids`. The first step's losses and the
number of trained numbers have to agree. tokens/s counts trained tokens; peak memory is each process's own VmHWM.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from benchmarks.common import ATTENTION, EXPERTS, peak_resident_bytes, serve, side_by_side, take_turns, where

MODULE = "benchmarks.sft_cpu"
PACKAGES = ("torch", "transformers", "peft", "numpy", "safetensors", "tokenizers")
RANK, EXPERT_RANK, LEARNING_RATE = 16, 8, 1e-4  # alpha is twice the rank
TURNS = 8  # questions in a chat
LOSS_TOLERANCE = 2e-3  # relative, of the first step: bfloat16 on both sides


@dataclass(frozen=True)
class Case:
    """A bench shape, the tokens of a step, whether experts are adapted, and whether rows are real conversations."""

    shape: str
    tokens: int
    experts: bool = False
    conversations: bool = False
    alone: bool = False  # the peer nearly fills the memory: a fresh process a repeat, one at a time, no warm-up


CASES = {
    "b1-512": Case("B1", 512),
    "b1-2048": Case("B1", 2048),
    "b1-2048-chats": Case("B1", 2048, conversations=True),
    "b1-8192": Case("B1", 8192, alone=True),
    "b1-512-experts": Case("B1", 512, experts=True),
    "b1-2048-experts": Case("B1", 2048, experts=True),
    "b2-512": Case("B2", 512),
    "b2-2048": Case("B2", 2048),
    "b2-512-experts": Case("B2", 512, experts=True),
    "b2-2048-experts": Case("B2", 2048, experts=True),
}


def samples_of(case: Case, folder: Path) -> list[Any]:
    """What a step trains on: one random document, every token trained; or conversations that fill the pack."""
    from ossia.data.sample import Sample

    if not case.conversations:
        ids = np.random.default_rng(0).integers(0, 199_998, case.tokens).astype(np.int32)
        weights = np.ones(case.tokens, np.float32)
        weights[0] = 0
        return [Sample(ids, weights, None, "random:1", ())]
    import random

    from ossia.demo.rows.chats import chat_rows
    from ossia.harmony import Renderer, TrainOn, Vocabulary, conversation_from_messages

    # chats of several questions, answered without thinking, as in data where about half of the tokens is trained
    rows = [row for row in chat_rows(2000, random.Random(0)) if "tools" not in row]
    rows.sort(key=_surplus, reverse=True)
    renderer, found, room = Renderer(Vocabulary.from_file(folder)), [], case.tokens
    for first in range(0, len(rows) - TURNS, TURNS):
        messages = [
            {key: value for key, value in message.items() if key != "thinking"}
            for row in rows[first : first + TURNS]
            for message in row["messages"]
        ]
        (rendered,) = renderer.samples(conversation_from_messages(messages), TrainOn())
        sample = Sample.from_rendered(rendered, f"chats:{first}")
        if len(sample) <= room:
            # transformers can't be told that a target differs from its id: both sides train on the ids
            found.append(replace(sample, targets=None))
            room -= len(sample)
    return found


def _surplus(row: dict[str, Any]) -> int:
    """By how many characters the assistant says more than all others."""
    return sum(len(m["content"]) * (1 if m["role"] == "assistant" else -1) for m in row["messages"])


def ossia_worker(case: Case, folder: Path, threads: int) -> None:
    """Ossia's side."""
    import torch

    from ossia.data.pack import Pack
    from ossia.model.checkpoint import Checkpoint
    from ossia.model.lora import Lora, LoraSpec
    from ossia.model.transformer import Transformer
    from ossia.model.weights import Weights
    from ossia.train.optim import AdamW
    from ossia.train.step import how_to_step, train_step

    pack = Pack.from_samples(samples_of(case, folder))
    model = Transformer(Weights(Checkpoint.open(folder), "bf16", torch.bfloat16, torch.device("cpu")))
    targets = dict.fromkeys(ATTENTION, (RANK, 2.0 * RANK))
    targets |= dict.fromkeys(EXPERTS if case.experts else (), (EXPERT_RANK, 2.0 * EXPERT_RANK))
    model.use_adapter(Lora.fresh(model.arch, LoraSpec(targets), seed=0, device=model.device))
    optimizer = AdamW(model.trainable.tensors, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0)
    how = how_to_step(model, "auto", *[pack.num_tokens] * 2, int(pack.starts.diff().max()))

    def step() -> dict[str, float]:
        start = time.perf_counter()
        result = train_step(model, optimizer, [pack], lr=LEARNING_RATE, clip=1.0, **how._asdict())
        return {"loss": result.loss, "step_s": time.perf_counter() - start, "peak_bytes": peak_resident_bytes()}

    size = sum(tensor.numel() for tensor in model.trainable.tensors.values())
    ready = {"trained": pack.num_trained, "tokens": pack.num_tokens, "documents": len(pack.starts) - 1}
    serve(ready | {"adapter_numbers": size}, step)


def peer_worker(case: Case, folder: Path, threads: int) -> None:
    """transformers and peft, at their documented best for this machine."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    samples = samples_of(case, folder)
    ids = torch.from_numpy(np.concatenate([sample.ids for sample in samples])).long()[None]
    positions = torch.cat([torch.arange(len(sample)) for sample in samples])[None]
    trained = torch.from_numpy(np.concatenate([sample.weights for sample in samples]))[None] > 0
    labels = ids.masked_fill(~trained, -100)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    model.config.use_cache = False
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    experts = [f"mlp.experts.{name}" for name in EXPERTS] if case.experts else []
    config = LoraConfig(
        r=RANK,
        lora_alpha=2 * RANK,
        target_modules=list(ATTENTION),
        target_parameters=experts or None,
        rank_pattern=dict.fromkeys(experts, EXPERT_RANK),
        alpha_pattern=dict.fromkeys(experts, 2 * EXPERT_RANK),
    )
    model = get_peft_model(model, config, autocast_adapter_dtype=False)
    model.enable_input_require_grads()
    model.train()
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=LEARNING_RATE, weight_decay=0.0)

    def step() -> dict[str, float]:
        start = time.perf_counter()
        loss = model(input_ids=ids, position_ids=positions, labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        seconds = time.perf_counter() - start
        return {"loss": float(loss.detach()), "step_s": seconds, "peak_bytes": peak_resident_bytes()}

    size = sum(p.numel() for p in parameters)
    ready = {"trained": int(trained.sum()), "tokens": ids.shape[1], "documents": len(samples)}
    serve(ready | {"adapter_numbers": size}, step)


SIDES = {"ossia": ossia_worker, "peer": peer_worker}


def make_checkpoint(case: Case, folder: Path) -> None:
    """The case's shape, with the full vocabulary."""
    from ossia.model.arch import SHAPES
    from ossia.model.tiny import make_tiny

    make_tiny(folder, SHAPES[case.shape])


def compare(name: str, folder: Path, repeats: int, threads: int) -> dict[str, Any]:
    """Run the case, check that both sides did the same, and put the figures together."""
    ready, runs = take_turns(MODULE, name, folder, SIDES, repeats, threads, alone=CASES[name].alone)
    assert ready["ossia"] == ready["peer"], f"the sides don't train on the same: {ready}"
    first = {side: found[0]["loss"] for side, found in runs.items()}
    apart = abs(first["ossia"] - first["peer"]) / abs(first["peer"])
    assert apart <= LOSS_TOLERANCE, f"the sides' first losses differ by {apart:.1e}: {first}"
    counted = {side: found[-repeats:] for side, found in runs.items()}
    step_s = {side: median(run["step_s"] for run in found) for side, found in counted.items()}
    peak = {side: max(run["peak_bytes"] for run in found) for side, found in runs.items()}
    trained = ready["ossia"]["trained"]
    return {
        "question": (__doc__ or "").splitlines()[0],
        "case": name,
        "config": {**vars(CASES[name]), "rank": RANK, "repeats": repeats, "threads": threads, **ready["ossia"]},
        "first_loss": first,
        "median_step_s": step_s,
        "trained_tokens_per_s": {side: trained / seconds for side, seconds in step_s.items()},
        "peak_bytes": peak,
        "speedup": step_s["peer"] / step_s["ossia"],
        "memory_ratio": peak["ossia"] / peak["peer"],
        "raw": runs,
        **where(PACKAGES),
    }


def tell(result: dict[str, Any]) -> str:
    """The result in a line."""
    rate = result["trained_tokens_per_s"]
    return (
        f"{rate['ossia']:.0f} against {rate['peer']:.0f} trained tokens/s, {result['speedup']:.2f}x, "
        f"at {result['memory_ratio']:.2f}x the memory"
    )


if __name__ == "__main__":
    side_by_side(MODULE, __doc__ or "", CASES, "b1-2048", make=make_checkpoint, sides=SIDES, compare=compare, tell=tell)
