"""Question: what does a QLoRA step of the full 20b shape take on a machine with 24 GiB, and how does the peers' end?

Run: python -m benchmarks.step_20b --model DIR      Needs: 2 cores, 24 GiB, 14 GB of disk      Quoted in: docs/plan.md

The checkpoint is `ossia tiny --shape 20b`: random weights, everything else as released. LoRA r16 on attention and r8 on
the experts, every token of one document trained. Each placement runs in a process of its own: a whole step that is
timed, then one under the profiler, from which the shares are. The peers, transformers and peft, get as much address
space as the machine has memory, so that they end and not the machine; what they said last is in the result.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import resource
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.common import ATTENTION, EXPERTS, ROOT, peak_resident_bytes, where, write_result

MODULE = "benchmarks.step_20b"
RANKS = {**dict.fromkeys(ATTENTION, 16), **dict.fromkeys(EXPERTS, 8)}
PLACEMENTS = ("resident", "mmap")
# Which part of a step an operation belongs to: by its nearest caller among these, and products apart inside of experts
_PARTS = {
    "_InParts": "experts",
    "_InPartsBackward": "experts",
    "_GroupedMm": "experts' adapters",
    "_GroupedMmBackward": "experts' adapters",
    "_CpuSink": "attention",
    "_CpuSinkBackward": "attention",
    "_LinearLogprob": "head",
    "_LinearLogprobBackward": "head",
    "Optimizer.step#AdamW.step": "optimizer",
}


def status(key: str) -> int:
    """Bytes of a line of /proc/self/status."""
    return int(re.findall(rf"{key}:\s+(\d+) kB", Path("/proc/self/status").read_text())[0]) * 1024


@contextmanager
def watched() -> Iterator[dict[str, int]]:
    """The most anonymous and file pages at once, looked at a hundred times a second."""
    most, done = {"RssAnon": 0, "RssFile": 0}, threading.Event()

    def watch() -> None:
        while not done.wait(0.01):
            for key in most:
                most[key] = max(most[key], status(key))

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield most
    finally:
        done.set()
        thread.join()


def ossia_step(model_folder: Path, placement: str, tokens: int, threads: int) -> dict[str, Any]:
    """A step that is timed, and another under the profiler."""
    import numpy as np
    import torch

    from ossia.data.pack import Pack
    from ossia.data.sample import Sample
    from ossia.model.checkpoint import Checkpoint
    from ossia.model.lora import Lora, LoraSpec
    from ossia.model.transformer import Transformer
    from ossia.model.weights import Weights
    from ossia.plan.memory import footprint
    from ossia.train.optim import AdamW
    from ossia.train.step import train_step, work_of

    torch.set_num_threads(threads)
    ids = np.random.default_rng(0).integers(0, 199_998, tokens).astype(np.int32)
    weights = np.ones(tokens, np.float32)
    weights[0] = 0
    pack = Pack.from_samples([Sample(ids, weights, None, "random:1", ())])
    start = time.perf_counter()
    with watched() as opening:
        model = Transformer(Weights(Checkpoint.open(model_folder), placement, torch.bfloat16, torch.device("cpu")))
        spec = LoraSpec({target: (rank, 2.0 * rank) for target, rank in RANKS.items()})
        model.use_adapter(Lora.fresh(model.arch, spec, seed=0, device=model.device))
    open_s = time.perf_counter() - start
    optimizer = AdamW(model.trainable.tensors, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0)

    def step() -> float:
        return train_step(model, optimizer, [pack], lr=1e-4, clip=1.0, recompute=True).loss

    read_before, start = _read_bytes(), time.perf_counter()
    with watched() as most:
        first_loss = step()
    first_s, read = time.perf_counter() - start, _read_bytes() - read_before
    start, cpu_before = time.perf_counter(), time.process_time()
    with watched() as most_later:
        loss = step()
    later_s, later_cpu_s = time.perf_counter() - start, time.process_time() - cpu_before
    peak = peak_resident_bytes()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        start = time.perf_counter()
        step()
        profiled_s = time.perf_counter() - start
    planned = footprint(work_of(model, pack=tokens, packs=1, recompute=True), tokenizer=False)
    return {
        "open_s": open_s,
        "first_step_s": first_s,
        "step_s": later_s,
        "step_cpu_s": later_cpu_s,  # of all threads: with one, what the step takes where nothing else runs
        "tokens_per_s": (tokens - 1) / later_s,
        "losses": [first_loss, loss],
        "read_bytes_in_first_step": read,
        "peak_resident_bytes": peak,
        "peak_anonymous_bytes": max(m["RssAnon"] for m in (opening, most, most_later)),
        "peak_file_bytes": max(m["RssFile"] for m in (opening, most, most_later)),
        "planned_anonymous_bytes": planned.host_peak,
        "planned": asdict(planned),
        "profiled_step_s": profiled_s,
        "share": _shares(profiler.events(), profiled_s),
    }


def _read_bytes() -> int:
    return int(re.findall(r"read_bytes: (\d+)", Path("/proc/self/io").read_text())[0])


def _shares(events: Any, step_s: float) -> dict[str, float]:
    """Share of the step's time by part; what no operation was running in is Python's and the passes' in C."""
    found: dict[str, float] = {}
    for event in events:
        callers = [event.name]
        above = event.cpu_parent
        while above is not None:
            callers.append(above.name)
            above = above.cpu_parent
        parts = [_PARTS[name] for name in callers if name in _PARTS]
        product = event.name in ("aten::mm", "aten::addmm", "aten::bmm")
        if "experts" in parts:
            part = "experts' products" if product else "expanding experts"
        else:
            part = parts[0] if parts else ("projections" if product else "rest")
        found[part] = found.get(part, 0.0) + event.self_cpu_time_total / 1e6
    return {part: round(seconds / step_s, 4) for part, seconds in sorted(found.items(), key=lambda item: -item[1])}


def peer_step(model_folder: Path, tokens: int, threads: int, limit: int) -> None:
    """The same with transformers and peft, at their documented best for this machine, within `limit` bytes."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))  # anonymous memory; files may be mapped beside it
    torch.set_num_threads(threads)
    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.bfloat16)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    config = LoraConfig(
        r=16, lora_alpha=32, target_modules=list(ATTENTION), target_parameters=[f"experts.{t}" for t in EXPERTS]
    )
    model = get_peft_model(model, config, autocast_adapter_dtype=False)
    model.enable_input_require_grads()
    ids = torch.randint(0, 199_998, (1, tokens))
    model(input_ids=ids, labels=ids).loss.backward()
    print(json.dumps({"peak_resident_bytes": peak_resident_bytes()}))


def run_peer(options: argparse.Namespace, limit: int) -> dict[str, Any]:
    """How the peers' attempt ends: exit code, the last lines they said, the largest size they got to."""
    start = time.perf_counter()
    with tempfile.TemporaryFile("w+") as said:
        process = subprocess.Popen(
            _worker(options, "peer", str(limit)), cwd=ROOT, stdout=said, stderr=subprocess.STDOUT, text=True
        )
        _, waited, usage = os.wait4(process.pid, 0)
        said.seek(0)
        lines = [line for line in said.read().splitlines() if line.strip()]
    return {
        "limit_bytes": limit,
        "exit_code": os.waitstatus_to_exitcode(waited),
        "seconds": time.perf_counter() - start,
        "peak_resident_bytes": usage.ru_maxrss * 1024,
        "last_words": [re.sub(r'"/.*/(?=site-packages/)', '"', line) for line in lines[-3:]],
    }


def _worker(options: argparse.Namespace, *words: str) -> list[str]:
    shared = ("--model", str(options.model), "--tokens", str(options.tokens), "--threads", str(options.threads))
    return [sys.executable, "-m", MODULE, *shared, "--worker", *words]


def main() -> None:
    """Each placement, then the peers."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="the checkpoint; made where there is none")
    parser.add_argument("--shape", default="20b", help="of the checkpoint that is made")
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--only", choices=(*PLACEMENTS, "peer"), action="append")
    parser.add_argument("--peer-limit-gib", type=float, default=20.0)
    parser.add_argument("--name", default="step_20b", help="of the result's file; what is in it of other runs stays")
    parser.add_argument("--worker", nargs="+")
    options = parser.parse_args()
    if options.worker:
        side, *rest = options.worker
        if side == "peer":
            peer_step(options.model, options.tokens, options.threads, int(rest[0]))
        else:
            print(json.dumps(ossia_step(options.model, side, options.tokens, options.threads)))
        return
    if not options.model.exists():
        from ossia.model.arch import SHAPES
        from ossia.model.tiny import make_tiny

        make_tiny(options.model, SHAPES[options.shape])
    file = ROOT / "benchmarks" / "results" / f"{options.name}.json"
    result = json.loads(file.read_text()) if file.is_file() else {}
    result |= {
        "question": (__doc__ or "").splitlines()[0],
        "config": {"shape": options.shape, "tokens": options.tokens},
    }
    result["config"] |= {"ranks": RANKS, "threads": options.threads}
    for side in options.only or (*PLACEMENTS, "peer"):
        if side == "peer":
            result[side] = run_peer(options, int(options.peer_limit_gib * 2**30))
        else:
            done = subprocess.run(_worker(options, side), cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
            result[side] = json.loads(done.stdout.splitlines()[-1])
        result |= where(("torch", "transformers", "peft", "numpy", "safetensors"))
        write_result(options.name, result)
        print(side, {k: v for k, v in result[side].items() if k != "planned"}, flush=True)


if __name__ == "__main__":
    main()
