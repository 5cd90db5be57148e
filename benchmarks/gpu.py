"""Question: how fast and how frugal are training and decoding of the real shapes on a GPU?

Run: python -m benchmarks.gpu --all      Needs: a CUDA GPU, for the 20b shape 24 GB or more      Quoted in: docs/gpu.md

Weights are random, in the released layout, and made on the device; ids are random, every token is trained. A training
case takes whole optimizer steps; tokens/s counts trained tokens. A decoding case takes steps of a batch in which every
sequence has its whole context in the cache. Times are of CUDA events, medians; memory is torch's own reserved peak.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import time
import zlib
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from itertools import count
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from benchmarks.common import ROOT, where, write_result
from ossia.config import load_recipe
from ossia.data.pack import Pack
from ossia.data.sample import Sample
from ossia.engine import Engine
from ossia.engine.cache import Cache
from ossia.errors import UserError
from ossia.harmony.o200k import write_o200k_harmony
from ossia.harmony.vocab import Vocabulary
from ossia.model.arch import SHAPES, Arch
from ossia.model.lora import Lora, LoraSpec
from ossia.model.open import DTYPES, DtypeName
from ossia.model.tiny import _distribution  # the same spread of values as `ossia tiny` draws
from ossia.model.transformer import Transformer
from ossia.model.weights import EMBEDDING, HEAD, Placement, Weights
from ossia.ops.attention import Backend
from ossia.ops.mxfp4 import dequantize_mxfp4
from ossia.rl.env import OneStep, Split, Task
from ossia.rl.policy import Policy
from ossia.rl.tasks import NamedEnv
from ossia.run.start import adamw_of
from ossia.run.trained import make_trainable
from ossia.train.optim import AdamW
from ossia.train.step import train_step

DEVICE = torch.device("cuda")
ATTENTION = dict.fromkeys(("q_proj", "k_proj", "v_proj", "o_proj"), (16, 32.0))
EXPERTS = {**ATTENTION, "gate_up_proj": (8, 16.0), "down_proj": (8, 16.0)}
_UNIFORM_CODE_RMS = math.sqrt((0.25 + 1 + 2.25 + 4 + 9 + 16 + 36) / 8)


@dataclass(frozen=True)
class Train:
    """A step: the tokens of each pack, of each document in it, and how many packs.

    on_host         embedding, or embedding and head, in the machine's memory: as where a GPU is full
    offload         layers' inputs too
    tokens_at_once  that go through a layer's experts together; None: all
    whole           a layer's experts expanded together, whatever the number of tokens
    attention       its backend; None: the default
    keep_attention  full attention over long documents is computed once
    """

    shape: str
    pack: int
    document: int
    packs: int
    placement: Placement
    experts: bool = False
    recompute: bool = True
    steps: int = 3
    peer: bool = False
    on_host: tuple[str, ...] = ()
    offload: bool = False
    tokens_at_once: int | None = None
    whole: bool = False
    attention: Backend | None = None
    dtype: DtypeName = "bfloat16"
    keep_attention: bool = False


@dataclass(frozen=True)
class Decode:
    """Steps of a batch over a context."""

    shape: str
    batch: int
    context: int
    placement: Placement
    adapter: bool = False
    steps: int = 32


@dataclass(frozen=True)
class Grpo:
    """Whole steps of a policy as `ossia train` makes it: samples of a full length, a reward that means nothing."""

    shape: str
    prompts: int
    group: int
    new: int
    placement: Placement
    steps: int = 2
    pack: int = 16384
    on_host: tuple[str, ...] = ()


# a case of the peer has the weights, ids and settings of the one before it
CASES: dict[str, Train | Decode | Grpo] = {
    "decode-1": Decode("20b", 1, 4096, "resident"),
    "decode-64": Decode("20b", 64, 4096, "resident"),
    "decode-256": Decode("20b", 256, 4096, "resident"),
    "decode-1-adapter": Decode("20b", 1, 4096, "resident", adapter=True),
    "decode-1-bf16": Decode("20b", 1, 4096, "bf16"),
    "decode-64-bf16": Decode("20b", 64, 4096, "bf16"),
    "train-4k-keep": Train("20b", 16384, 4096, 1, "resident", recompute=False),
    "train-4k": Train("20b", 16384, 4096, 1, "resident"),
    "train-4k-packs": Train("20b", 4096, 4096, 4, "resident"),
    "train-4k-packs-keep": Train("20b", 4096, 4096, 4, "resident", recompute=False),
    "train-4k-transformers": Train("20b", 4096, 4096, 4, "bf16", peer=True),
    "train-4k-experts": Train("20b", 16384, 4096, 1, "resident", experts=True),
    "train-16k-stream": Train("20b", 16384, 4096, 1, "stream"),
    "train-2k-stream": Train("20b", 2048, 2048, 1, "stream"),
    "train-2k": Train("20b", 2048, 2048, 1, "resident"),
    "train-64k": Train("20b", 65536, 65536, 1, "resident", steps=1),
    "train-120b": Train("120b", 4096, 4096, 1, "resident", steps=2),
    # not yet measured
    "train-2k-whole": Train("20b", 2048, 2048, 1, "resident", whole=True),
    "train-2k-host": Train("20b", 2048, 2048, 1, "resident", on_host=(EMBEDDING,)),
    "train-2k-stream-host": Train("20b", 2048, 2048, 1, "stream", on_host=(EMBEDDING, HEAD)),
    "train-16k-stream-host": Train("20b", 16384, 4096, 1, "stream", on_host=(EMBEDDING, HEAD), tokens_at_once=4096),
    "train-64k-chunks": Train("20b", 65536, 65536, 1, "resident", steps=1, tokens_at_once=16384),
    "train-64k-offload": Train("20b", 65536, 65536, 1, "resident", steps=1, tokens_at_once=16384, offload=True),
    "train-64k-attention": Train("20b", 65536, 65536, 1, "resident", steps=1, keep_attention=True),
    "train-300k": Train("20b", 307200, 307200, 1, "resident", steps=1, tokens_at_once=16384, offload=True),
    "train-4k-triton": Train("20b", 16384, 4096, 1, "resident", attention="triton"),
    "train-4k-fa3": Train("20b", 16384, 4096, 1, "resident", attention="fa3"),
    "train-4k-float16": Train("20b", 16384, 4096, 1, "resident", dtype="float16"),
    "train-120b-host": Train("120b", 2048, 2048, 1, "resident", steps=2, on_host=(EMBEDDING,)),
    "train-120b-stream": Train("120b", 8192, 4096, 1, "stream", steps=2, tokens_at_once=4096),
    "grpo": Grpo("20b", 8, 8, 1024, "resident"),
    "grpo-lean": Grpo("20b", 8, 8, 1024, "resident", pack=4096, on_host=(EMBEDDING,)),  # with --memory-gb 16
}


class RandomCheckpoint:
    """What `Weights` reads, with tensors made on the device when they are asked for; the same every time."""

    layout = "mxfp4"

    def __init__(self, arch: Arch, device: torch.device) -> None:
        self.arch, self.device, self.specs = arch, device, arch.tensor_specs("mxfp4")
        self.num_bytes = sum(spec.num_bytes for spec in self.specs.values())

    def tensor(self, name: str) -> Tensor:
        spec = self.specs[name]
        drawn = torch.Generator(device=self.device).manual_seed(zlib.crc32(name.encode()))
        if name.endswith("_blocks"):
            return torch.randint(256, spec.shape, dtype=torch.uint8, device=self.device, generator=drawn)
        if name.endswith("_scales"):
            middle = 127 + round(math.log2(1 / (math.sqrt(32 * spec.shape[2]) * _UNIFORM_CODE_RMS)))
            wanted = torch.randint(middle - 1, middle + 2, spec.shape, device=self.device, generator=drawn)
            return wanted.to(torch.uint8)
        mean, std = _distribution(name, spec)
        return torch.empty(spec.shape, dtype=torch.bfloat16, device=self.device).normal_(mean, std, generator=drawn)


def build(
    shape: str,
    placement: Placement,
    targets: dict[str, tuple[int, float]] | None,
    *,
    on_host: tuple[str, ...] = (),
    attention: Backend | None = None,
    dtype: DtypeName = "bfloat16",
) -> Transformer:
    """A model of random weights on the GPU, with a fresh adapter where targets are given."""
    device = DEVICE
    source = RandomCheckpoint(SHAPES[shape], device)
    weights = Weights(source, placement, DTYPES[dtype], device, frozenset(on_host))  # type: ignore[arg-type]
    if targets is None:
        return Transformer(weights, backend=attention)
    lora = Lora.fresh(weights.arch, LoraSpec(targets), seed=0, device=device)
    return Transformer(weights, lora=lora, backend=attention)


def packs_of(case: Train) -> list[Pack]:
    """Random documents, every token trained but the first."""
    import numpy as np

    drawn, packs = np.random.default_rng(0), []
    for _ in range(case.packs):
        samples = []
        for index in range(case.pack // case.document):
            weights = np.ones(case.document, np.float32)
            weights[0] = 0
            ids = drawn.integers(0, 199_998, case.document).astype(np.int32)
            samples.append(Sample(ids, weights, None, f"random:{index}", ()))
        packs.append(Pack.from_samples(samples))
    return packs


def seconds(call: Callable[[], Any], repeats: int) -> list[float]:
    """GPU seconds of each of `repeats` calls, by events."""
    found = []
    for _ in range(repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        torch.cuda.synchronize()
        found.append(start.elapsed_time(end) / 1000)
    return found


def stepper(case: Train, packs: list[Pack]) -> Callable[[], float]:
    """What takes an optimizer step and returns its loss."""
    model = build(
        case.shape, case.placement, EXPERTS if case.experts else ATTENTION, on_host=case.on_host,
        attention=case.attention, dtype=case.dtype,
    )  # fmt: skip
    if case.whole:
        model.experts_at_once = lambda tokens: None
    optimizer = AdamW(model.trainable.tensors, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0)
    how = {"recompute": case.recompute, "offload": case.offload, "tokens_at_once": case.tokens_at_once}
    how["keep_attention"] = case.keep_attention
    return lambda: train_step(model, optimizer, packs, lr=1e-4, clip=1.0, **how).loss


def peer_stepper(case: Train, packs: list[Pack]) -> Callable[[], float]:
    """The same with transformers + peft: the weights in bfloat16, gradient checkpointing, a document at a time."""
    from peft import LoraConfig, get_peft_model
    from transformers import GptOssConfig, GptOssForCausalLM

    device, arch = DEVICE, SHAPES[case.shape]
    config = GptOssConfig(**arch.to_config("bf16"))
    with device:
        torch.set_default_dtype(torch.bfloat16)
        model = GptOssForCausalLM(config)
        torch.set_default_dtype(torch.float32)
    source = RandomCheckpoint(arch, device)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("gate_up_proj", "down_proj")):
                packed = source.tensor(f"{name}_blocks"), source.tensor(f"{name}_scales")
                parameter.copy_(dequantize_mxfp4(*packed, torch.bfloat16).transpose(1, 2))
            else:
                parameter.copy_(source.tensor(name))
    wanted = LoraConfig(r=16, lora_alpha=32, target_modules=list(ATTENTION), task_type="CAUSAL_LM")
    model = get_peft_model(model, wanted)
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, weight_decay=0.0, fused=True)

    def step() -> float:
        total = 0.0
        for pack in packs:
            ids = pack.ids.to(device)[None]
            loss = model(input_ids=ids, labels=ids, use_cache=False).loss / len(packs)
            loss.backward()
            total += float(loss.detach())
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return total

    return step


def train(case: Train, profile: Path | None) -> dict[str, Any]:
    """Whole steps: tokens/s, and the reserved peak beside what was there before the first."""
    packs = packs_of(case)
    take = (peer_stepper if case.peer else stepper)(case, packs)
    weights_bytes = torch.cuda.memory_allocated()
    losses: list[float] = []

    def step() -> None:
        losses.append(take())

    step()
    torch.cuda.reset_peak_memory_stats()
    times = seconds(step, case.steps)
    peak = torch.cuda.max_memory_reserved(), torch.cuda.max_memory_allocated()
    if profile is not None:
        write_profile(step, profile)
    trained = sum(pack.num_trained for pack in packs)
    return {
        "seconds": times,
        "tokens_per_second": trained / median(times),
        "losses": losses,
        "peak_reserved_bytes": peak[0],
        "peak_allocated_bytes": peak[1],
        "weights_bytes": weights_bytes,
    }


def decode(case: Decode, profile: Path | None) -> dict[str, Any]:
    """Steps of the decoder that the engine picks, over caches of random keys and values."""
    model = build(case.shape, case.placement, EXPERTS if case.adapter else None)
    engine = Engine(model)
    cache = Cache(model.arch, model.dtype, model.device, 1 << 40)
    decoder = engine._make_decoder(cache)
    for row in range(case.batch):
        holding = cache.new()
        cache.extend(holding, case.context + 64)
        cache.set_row(row, holding)
    for layer, lane in enumerate(cache.of_layer):
        lane.pool(layer).normal_(generator=torch.Generator(device=model.device).manual_seed(layer))
    x_BD = torch.randn(case.batch, model.arch.hidden_size, device=model.device, dtype=model.dtype)
    position_B = torch.full((case.batch,), case.context, device=model.device)
    head = model.head().weight

    def step() -> None:
        hidden = decoder.forward(x_BD, position_B, [0] * case.batch)
        (model.final_norm(hidden) @ head.t()).argmax(-1)

    with torch.inference_mode():
        for _ in range(3):
            step()
        times = seconds(step, case.steps)
        if profile is not None:
            write_profile(step, profile)
    return {
        "decoder": type(decoder).__name__,
        "seconds": times,
        "tokens_per_second": case.batch / median(times),
        "peak_reserved_bytes": torch.cuda.max_memory_reserved(),
    }


class Noise:
    """Prompts of a sentence; a reward that two samples rarely share."""

    def tasks(self, split: Split, seed: int) -> Iterator[Task]:
        """See `rl.env.Env`."""
        for number in count(seed):
            text = f"Write down what comes to your mind when you hear the number {number}, and why."
            yield Task({"messages": [{"role": "user", "content": text}]}, {}, str(number))

    def open(self, task: Task, seed: int) -> OneStep:
        """See `rl.env.Env`."""
        return OneStep(lambda turn: (zlib.crc32(repr(turn.messages).encode()) / 2**32, {}))

    def examples(self, task: Task) -> None:
        """See `rl.env.Env`."""


def grpo(case: Grpo, profile: Path | None) -> dict[str, Any]:
    """Steps from prompts to the update; seconds of sampling, the reward beside it, and of training."""
    model = build(case.shape, case.placement, None, on_host=case.on_host)
    with TemporaryDirectory() as scratch:
        vocab = Vocabulary.from_file(write_o200k_harmony(Path(scratch)))
        changes = (
            "model=openai/gpt-oss-20b", "dtype=bfloat16", "weights=resident", f"rl.prompts={case.prompts}",
            f"rl.group={case.group}", f"rl.max_new={case.new}", "rl.mask_truncated=false", "rl.max_mismatch=1",
            "rl.eval_tasks=0", "eval.every=0", f"max_length={case.new + 256}", f"adapter.targets={[*ATTENTION]}",
            "adapter.rank=16", f"output={scratch}/run", f"train.tokens_per_pack={case.pack}",
            f"train.tokens_per_step={case.pack}",
        )  # fmt: skip
        recipe = load_recipe(ROOT / "recipes" / "grpo-sort.yaml", changes)
        recipe.output.mkdir()
        make_trainable(model, recipe)
        policy = Policy(recipe, model, vocab, adamw_of(recipe, model), [NamedEnv("noise", Noise(), 1.0)])  # type: ignore[arg-type]
        steps = []
        for _ in range(case.steps):
            torch.cuda.reset_peak_memory_stats()
            found = policy.step(policy.next_step(), 1e-5)
            names = ("sample_s", "train_s", "sampled_per_s", "answer_tokens", "mismatch", "tokens")
            steps.append({name: found[name] for name in names})
            steps[-1]["peak_reserved_bytes"] = torch.cuda.max_memory_reserved()
    return {"seconds": [one["sample_s"] + one["train_s"] for one in steps], "steps": steps}


def write_profile(step: Callable[[], None], file: Path) -> None:
    """Which kernels a step spends its time in."""
    with torch.profiler.profile(activities=list(torch.profiler.supported_activities())) as profiler:
        step()
        torch.cuda.synchronize()
    table = profiler.key_averages().table(sort_by="self_device_time_total", row_limit=30, max_name_column_width=70)
    file.write_text(table)


def main() -> None:
    """Run the named cases, or all, each from an empty device; write what was found after every one."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--case", action="append", choices=CASES, default=[])
    parser.add_argument("--all", action="store_true")
    parser.add_argument("--profiles", type=Path, help="a folder for a table of kernels of each case")
    parser.add_argument("--name", default="gpu", help="of the result's file")
    parser.add_argument("--memory-gb", type=float, help="as on a GPU of so much: all else of this one is left alone")
    options = parser.parse_args()
    if options.memory_gb is not None:
        share = options.memory_gb * 1e9 / torch.cuda.mem_get_info()[1]
        torch.cuda.set_per_process_memory_fraction(share)
    result: dict[str, Any] = {
        "where": where(("torch", "numpy")) | {"gpu": torch.cuda.get_device_name(), "memory_gb": options.memory_gb},
        "cases": {},
    }
    for name in CASES if options.all else options.case:
        case, began = CASES[name], time.monotonic()
        profile = None if options.profiles is None else options.profiles / f"{name}.txt"
        torch.cuda.reset_peak_memory_stats()
        try:
            run = {Train: train, Decode: decode, Grpo: grpo}[type(case)]
            measured = run(case, profile)
        except (torch.OutOfMemoryError, UserError) as error:
            measured = {"failed": str(error).partition("\n")[0]}
        gc.collect()
        result["cases"][name] = {"config": asdict(case), **measured}
        write_result(options.name, result)
        torch.cuda.empty_cache()
        shown = {key: value for key, value in measured.items() if key not in ("seconds",)}
        print(f"{name} ({time.monotonic() - began:.0f} s): {json.dumps(shown)}", flush=True)


if __name__ == "__main__":
    main()
