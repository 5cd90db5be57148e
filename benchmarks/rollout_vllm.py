"""Question: does a run learn from samples of a vLLM server, how far apart are the two, what does sampling ahead save?

Run: python -m benchmarks.rollout_vllm MODEL URL      Needs: 2 cores, a server      Quoted in: docs/rl.md

MODEL is one that sorts six digits now and then, as `first` in recipes/grpo-sort.yaml makes it; the server has it with
adapters on attention, which is all that vLLM's CPU build takes (docs/rl.md has the command). Runs are by `ossia train`,
as a person would type it: one batch after the other, and in float32 another one with `rl.async: 1`.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import fmean, median
from typing import Any
from urllib.request import urlopen

from benchmarks.common import ROOT, where, write_result
from ossia.remote import Server

PACKAGES = ("torch", "tokenizers", "numpy", "safetensors")
RECIPE = """
method: grpo
model: {model}
dtype: {dtype}
weights: bf16
adapter: {{rank: 8, targets: [attention]}}
env: sort
max_length: 256
rl: {{rollout: "{url}", async: {ahead}, prompts: 8, group: 8, max_new: 80, eval_tasks: 50}}
eval: {{every: {steps}}}
train: {{steps: {steps}, learning_rate: 2.0e-3, schedule: constant, warmup: 0, tokens_per_step: 8192,
  tokens_per_pack: 4096, save_every: 0, threads: 1}}
output: {output}
"""
KEPT = ("reward", "mismatch", "sample_s", "train_s", "waited_s", "step_s", "sampled_per_s", "rollout_retries")


def learn(folder: Path, name: str, **values: Any) -> dict[str, Any]:
    """One run: its steps, its held-out rewards, and which version of the policy sampled each step."""
    file = folder / f"{name}.yaml"
    file.write_text(RECIPE.format(output=folder / name, **values))
    begun = time.perf_counter()
    subprocess.run([sys.executable, "-m", "ossia", "train", str(file)], cwd=ROOT, check=True, stdout=sys.stderr)
    seconds = time.perf_counter() - begun
    read = [json.loads(line) for line in (folder / name / "events.jsonl").read_text().splitlines()]
    steps = [event for event in read if event["event"] == "step"]
    samples = [json.loads(line) for line in (folder / name / "samples.jsonl").read_text().splitlines()]
    versions = {(one["step"], one["version"]) for one in samples if one["split"] == "train"}
    return {
        "dtype": values["dtype"],
        "async": values["ahead"],
        "wall_s": seconds,
        "held_out": {str(event["step"]): event["eval_reward"] for event in read if event["event"] == "eval"},
        "version_of_step": {str(step): version for step, version in sorted(versions)},
        **{key: [event[key] for event in steps if key in event] for key in KEPT},
    }


def main() -> None:
    """Measure, write benchmarks/results/rollout_vllm-DTYPE.json, print a line a run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("url")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--steps", type=int, default=20)
    options = parser.parse_args()
    with urlopen(f"{Server(options.url).base.removesuffix('/v1')}/version") as answer:
        version = json.load(answer)["version"]
    told = {"model": options.model.resolve(), "url": options.url, "dtype": options.dtype, "steps": options.steps}
    ways = (0, 1) if options.dtype == "float32" else (0,)
    with tempfile.TemporaryDirectory() as scratch:
        runs = [learn(Path(scratch), f"async-{ahead}", ahead=ahead, **told) for ahead in ways]
    result = {
        "question": (__doc__ or "").splitlines()[0],
        "config": {"recipe": RECIPE, "steps": options.steps, "dtype": options.dtype},
        "vllm": version,
        **where(PACKAGES),
        "runs": runs,
    }
    print(write_result(f"rollout_vllm-{options.dtype}", result))
    for run in runs:
        first, last = fmean(run["reward"][:5]), fmean(run["reward"][-5:])
        print(
            f"{run['dtype']}, async {run['async']}: sampled {first:.2f} -> {last:.2f}, held out {run['held_out']}, "
            f"mismatch at most {max(run['mismatch']):.1e}, {median(run['step_s'][1:]):.2f} s a step"
        )


if __name__ == "__main__":
    main()
