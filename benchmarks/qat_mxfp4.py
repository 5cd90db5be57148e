"""Question: what does rounding a trained model's experts to MXFP4 cost, and does `qat: mxfp4` win it back?

Run: python -m benchmarks.qat_mxfp4      Needs: 2 cores, some minutes      Answer quoted in: docs/export.md

The demo's task, from the command line as a person would: train, export to hf-bf16 and to hf-mxfp4; then train on for a
short while with `qat: mxfp4` and export that. Once with adapters on MXFP4 experts, once with all weights. The same
steps without `qat` are beside it, so that what they teach isn't taken for what rounding in training does. Every loss is
of an exported folder, read back, over all held-out rows.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median
from typing import Any

import yaml

from benchmarks.common import RESULTS, ROOT, where, write_result
from ossia.demo.prepare import DATA, START, Plan, prepare

PACKAGES = ("torch", "tokenizers", "numpy", "safetensors")
ADAPTER = {"rank": 16, "targets": ["attention", "experts", "router", "lm_head"]}
RATES = {"adapters": 5e-3, "all weights": 3e-3}  # as recipes/demo-lora.yaml and recipes/demo.yaml


def ossia(*words: str) -> str:
    """One command; what it said, on both streams."""
    command = [sys.executable, "-m", "ossia", *words]
    done = subprocess.run(command, cwd=ROOT, check=False, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode:
        raise SystemExit(f"ossia {' '.join(words)}\n{done.stdout}")
    return done.stdout


def write_recipe(folder: Path, name: str, **keys: Any) -> Path:
    """A recipe on the demo's data; its run folder is `folder`/`name`."""
    recipe = {
        "dtype": "float32",
        "weights": "bf16",
        "data": {"path": str(folder / DATA / "train.jsonl")},
        "eval": {"data": {"path": str(folder / DATA / "heldout.jsonl")}, "answers": 0},
        "max_length": 512,
        "output": str(folder / name),
    }
    file = folder / f"{name}.yaml"
    file.write_text(yaml.safe_dump({**recipe, **keys}))
    return file


def train(folder: Path, name: str, steps: int, rate: float, **keys: Any) -> dict[str, Any]:
    """Train; where the run is, and how long the middle one of its steps took."""
    schedule = {"steps": steps, "tokens_per_step": 2048, "learning_rate": rate, "warmup": 0.05, "save_every": 0}
    ossia("train", str(write_recipe(folder, name, train=schedule, **keys)))
    events = [json.loads(line) for line in (folder / name / "events.jsonl").read_text().splitlines()]
    return {"run": folder / name, "step_s": median(e["step_s"] for e in events if e["event"] == "step")}


def export(folder: Path, run: Path, to: str) -> dict[str, Any]:
    """Export; held-out loss of what was written, and what was said of its distance from what was trained."""
    name = f"{run.name}-{to}"
    said = ossia("export", str(run), "--to", to, "--output", str(folder / name), "--max-kl", "100")
    recipe = write_recipe(folder, f"{name}-eval", model=str(folder / name))
    loss = json.loads(ossia("eval", str(recipe), "--json").splitlines()[-1])["loss"]
    errors = [float(share) / 100 for share in re.findall(r"_proj ([\d.]+)%", said)]
    kl = float(re.findall(r"KL ([\d.e+-]+) nats", said)[0])
    return {"held_out_loss": loss, "kl": kl, "weights_error": max(errors, default=0.0)}


def chain(folder: Path, kind: str, steps: int, further: int) -> dict[str, Any]:
    """One kind of training, from the untrained model to the last export."""
    name, rate = kind.split()[0], RATES[kind]
    lora: dict[str, Any] = {"adapter": ADAPTER} if kind == "adapters" else {}
    first = train(folder, name, steps, rate, model=str(folder / START), **lora)
    if lora:
        start = {"model": str(folder / START), "adapter": {**ADAPTER, "init_from": str(first["run"])}}
    else:
        start = {"model": str(first["run"] / "model")}
    plain = train(folder, f"{name}-further", further, rate / 10, **start)
    rounded = train(folder, f"{name}-qat", further, rate / 10, **start, qat="mxfp4")
    exports = {
        "trained, bf16": export(folder, first["run"], "hf-bf16"),
        "trained, mxfp4": export(folder, first["run"], "hf-mxfp4"),
        "trained further, bf16": export(folder, plain["run"], "hf-bf16"),
        "trained further, mxfp4": export(folder, plain["run"], "hf-mxfp4"),
        "qat, mxfp4": export(folder, rounded["run"], "hf-mxfp4"),
    }
    config = {"steps": steps, "further": further, "rate": rate, "further_rate": rate / 10, **lora}
    return {
        "config": {**config, "threads": os.environ.get("OMP_NUM_THREADS", "torch's own choice")},
        "exports": exports,
        "step_s": {"without qat": plain["step_s"], "with qat": rounded["step_s"]},
        **where(PACKAGES),
    }


def main() -> None:
    """Measure, write into benchmarks/results/qat_mxfp4.json, where another kind stays; print a line an export."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--further", type=int, default=60)
    parser.add_argument("--kinds", nargs="*", choices=RATES, default=list(RATES))
    options = parser.parse_args()
    for kind in options.kinds:
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch)
            prepare(folder, seed=0, plan=Plan())
            found = chain(folder, kind, options.steps, options.further)
        file = RESULTS / "qat_mxfp4.json"
        before = json.loads(file.read_text())["found"] if file.is_file() else {}
        result = {"question": (__doc__ or "").splitlines()[0], "found": {**before, kind: found}}
        print(write_result("qat_mxfp4", result))
        for name, one in found["exports"].items():
            print(f"{kind}: {name}: {one}")


if __name__ == "__main__":
    main()
