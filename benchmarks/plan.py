"""Question: how near is `ossia plan` to the memory that training takes?

Run: python -m benchmarks.plan      Needs: 1 core, 8 GiB      Quoted in: docs/plan.md

On a CPU each case is a process of its own that takes a few steps; compared is its largest resident set (VmHWM) with
what the plan says of it, all threads and the C library's allocator as they are. Of a GPU the recorded runs of
`benchmarks/gpu.py` are compared, in what torch had reserved at most: the plan is of today, with experts expanded all at
once, as they were then.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks.common import ATTENTION, EXPERTS, RESULTS, ROOT, peak_resident_bytes, where, write_result
from ossia.model.arch import SHAPES
from ossia.model.budget.weights import EMBEDDING
from ossia.model.budget.work import Work
from ossia.plan.memory import footprint

MODULE = "benchmarks.plan"
GPU_RESULTS = ("gpu-train", "gpu-peer", "gpu-stream", "gpu-120b")


@dataclass(frozen=True)
class Case:
    """A shape, the tokens of a step, and how it is trained."""

    shape: str
    tokens: int
    placement: str = "bf16"
    experts: bool = False
    all_weights: bool = False
    dtype: str = "bfloat16"
    steps: int = 4


CASES = {
    "b1-512": Case("B1", 512),
    "b1-2048": Case("B1", 2048),
    "b1-8192": Case("B1", 8192, steps=2),
    "b1-2048-experts": Case("B1", 2048, experts=True),
    "b1-2048-mmap": Case("B1", 2048, placement="mmap"),
    "b1-2048-resident": Case("B1", 2048, placement="resident"),
    "b2-2048": Case("B2", 2048, steps=3),
    "b2-2048-experts": Case("B2", 2048, experts=True, steps=3),
    "b2-2048-mmap": Case("B2", 2048, placement="mmap", experts=True, steps=3),
    "b1-1024-float32": Case("B1", 1024, dtype="float32"),
    "demo-2048-all": Case("demo", 2048, all_weights=True, dtype="float32"),
}


def worker(case: Case, folder: Path) -> None:
    """A few steps; prints the peak and the plan's parts."""
    import numpy as np
    import torch

    from ossia.data.pack import Pack
    from ossia.data.sample import Sample
    from ossia.model.checkpoint import Checkpoint
    from ossia.model.lora import Lora, LoraSpec
    from ossia.model.transformer import Transformer
    from ossia.model.weights import Weights
    from ossia.train.optim import AdamW
    from ossia.train.step import keeps_activations, train_step, work_of

    device = torch.device("cpu")
    model = Transformer(Weights(Checkpoint.open(folder), case.placement, vars(torch)[case.dtype], device))  # type: ignore[arg-type]
    if case.all_weights:
        model.train_all_weights()
    else:
        ranks = dict.fromkeys(ATTENTION, (16, 32.0)) | (dict.fromkeys(EXPERTS, (8, 16.0)) if case.experts else {})
        model.use_adapter(Lora.fresh(model.arch, LoraSpec(ranks), seed=0, device=device))
    optimizer = AdamW(model.trainable.tensors, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0)
    ids = np.random.default_rng(0).integers(0, min(model.arch.vocab_size, 199_998), case.tokens).astype(np.int32)
    weights = np.ones(case.tokens, np.float32)
    weights[0] = 0
    pack = Pack.from_samples([Sample(ids, weights, None, "random:1", ())])
    recompute = not keeps_activations(model, "auto", case.tokens, case.tokens)
    peaks: list[int] = []
    for _ in range(case.steps):
        train_step(model, optimizer, [pack], lr=1e-4, clip=1.0, recompute=recompute)
        peaks.append(peak_resident_bytes())
    work = work_of(model, pack=case.tokens, packs=1, recompute=recompute)
    print(json.dumps({"vocab": work.arch.vocab_size, "recompute": recompute, "peaks_by_step": peaks}))


def planned(case: Case, found: dict[str, Any]) -> dict[str, Any]:
    """What the plan says of a case that was measured, and how near it is."""
    arch = replace(SHAPES[case.shape], vocab_size=found["vocab"])
    ranks = dict.fromkeys(ATTENTION, 16) | (dict.fromkeys(EXPERTS, 8) if case.experts else {})
    work = Work(
        arch, "mxfp4", case.placement, "cpu", "c", case.dtype, None if case.all_weights else ranks,  # type: ignore[arg-type]
        pack=case.tokens, recompute=found["recompute"],
    )  # fmt: skip
    used, measured = footprint(work, tokenizer=False), found["peaks_by_step"][-1]
    sizes = {"measured_bytes": measured, "planned_bytes": used.resident_peak, "ratio": used.resident_peak / measured}
    return {"config": vars(case), **found, **sizes, "parts": dict(used.host), "file_pages": used.files}


def measure(name: str, models: Path, threads: int) -> dict[str, Any]:
    """A case's figures, from a process of its own."""
    case = CASES[name]
    folder = models / case.shape
    if not folder.exists():
        make(case.shape, folder)
    env = {**os.environ, "OMP_NUM_THREADS": str(threads), "OMP_WAIT_POLICY": "PASSIVE"}
    words = [sys.executable, "-m", MODULE, "--worker", name, "--models", str(models)]
    done = subprocess.run(words, cwd=ROOT, env=env, stdout=subprocess.PIPE, text=True, check=True)
    return planned(case, json.loads(done.stdout.splitlines()[-1]))


def make(shape: str, folder: Path) -> None:
    """A shape with the full vocabulary; of the demo, the demo's own model."""
    from ossia.demo.prepare import START, Plan, prepare
    from ossia.model.tiny import make_tiny

    if shape != "demo":
        make_tiny(folder, SHAPES[shape])
        return
    prepare(folder.parent / "made", seed=0, plan=Plan())
    (folder.parent / "made" / START).rename(folder)


def measured_work(config: dict[str, Any]) -> Work | None:
    """The step of a case that was measured with a GPU. None: another's step, or one that the plan doesn't know: float16
    is computed by passes of torch there."""
    if config["peer"] or config["dtype"] == "float16":
        return None
    ranks = dict.fromkeys(ATTENTION, 16) | (dict.fromkeys(EXPERTS, 8) if config["experts"] else {})
    # `stream` leaves the embedding in the machine's memory by itself
    on_host = frozenset(config["on_host"]) | ({EMBEDDING} if config["placement"] == "stream" else set())
    return Work(
        SHAPES[config["shape"]], "mxfp4", config["placement"], "cuda", "triton", config["dtype"], ranks,
        pack=config["pack"], packs=config["packs"], longest=config["document"], recompute=config["recompute"],
        on_host=on_host, offload=config["offload"], chunk=config["tokens_at_once"],
    )  # fmt: skip


def recorded() -> dict[str, Any]:
    """Of a GPU: what was recorded, and the plan of it."""
    found: dict[str, Any] = {}
    for result in GPU_RESULTS:
        content = json.loads((RESULTS / f"{result}.json").read_text())
        for name, case in content["cases"].items():
            if (work := measured_work(case["config"])) is None:
                continue
            planned = sum(size for part, size in footprint(work).device.items() if part != "CUDA context")
            measured = case["peak_reserved_bytes"]
            about = {"config": case["config"], "commit": content["where"]["commit"], "gpu": content["where"]["gpu"]}
            found[name] = {**about, "measured_bytes": measured, "planned_bytes": planned, "ratio": planned / measured}
    return found


def main() -> None:
    """Every case, or those that are named; what is in the result of other cases stays."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", action="append", choices=CASES)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--models", type=Path, help="where the models are, or are made; instead of a scratch folder")
    parser.add_argument("--plan-anew", action="store_true", help="measure nothing; compare what was measured before")
    parser.add_argument("--worker", choices=CASES)
    options = parser.parse_args()
    if options.worker:
        worker(CASES[options.worker], options.models / CASES[options.worker].shape)
        return
    file = RESULTS / "plan.json"
    cases = json.loads(file.read_text())["cpu"] if file.is_file() else {}
    with tempfile.TemporaryDirectory() as scratch:
        for name in (cases if options.plan_anew else options.case) or CASES:
            if options.plan_anew:
                before = {key: cases[name][key] for key in ("vocab", "recompute", "peaks_by_step")}
                found = cases[name] = planned(CASES[name], before)
            else:
                found = cases[name] = measure(name, options.models or Path(scratch), options.threads)
            print(f"{name}: planned {found['planned_bytes'] / 1e9:.3f} GB, {found['ratio']:.3f} of what was measured")
            result = {"question": (__doc__ or "").splitlines()[0], "threads": options.threads, "cpu": cases}
            write_result("plan", {**result, "gpu": recorded(), **where(("torch", "numpy"))})


if __name__ == "__main__":
    main()
