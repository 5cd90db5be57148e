"""Question: does a tiny model learn to sort from rewards alone, whatever the seed, and how long does it take?

Run: python -m benchmarks.grpo_sort      Needs: 2 cores      Answer quoted in: docs/rl.md
     python -m benchmarks.grpo_sort --width 128 --threads 2 --steps 200 --start 240 --start 420 --start 240 \\
         train.learning_rate=1.5e-4 rl.prompts=16

The demo's shape, 3.7 million parameters, or with `--width 128` for its experts 6.9 million. For each seed: the
untrained model is fine-tuned for 200 steps, or `--start` of each seed, until it sorts six digits now and then; then
`ossia train` with `method: grpo` goes on with nothing but the reward of the exact answer. Both are the commands that a
person would type, each in a process of its own; the curves are read from what they left.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.common import ROOT, where, write_result

PACKAGES = ("torch", "tokenizers", "numpy", "safetensors")
GOAL = 0.85
RECIPE = ROOT / "recipes" / "grpo-sort.yaml"


def ossia(*arguments: str) -> float:
    """Run a command of Ossia's; its seconds."""
    started = time.perf_counter()
    subprocess.run([sys.executable, "-m", "ossia", *arguments], cwd=ROOT, check=True, stdout=sys.stderr)
    return time.perf_counter() - started


def learn(seed: int, start_steps: int, folder: Path, given: argparse.Namespace) -> dict[str, Any]:
    """One seed: its start, its curve, and how long each took."""
    made, start, run = folder / "made", folder / "start", folder / "run"
    code = (
        "from pathlib import Path; import sys; from ossia.demo.prepare import Plan, prepare; "
        "prepare(Path(sys.argv[1]), seed=int(sys.argv[2]), plan=Plan(width=int(sys.argv[3])))"
    )
    subprocess.run([sys.executable, "-c", code, str(made), str(seed), str(given.width)], cwd=ROOT, check=True)
    sft_s = ossia(
        "train", str(made / "demo.yaml"), f"train.steps={start_steps}", f"train.threads={given.threads}",
        f"output={start}",
    )  # fmt: skip
    rl_s = ossia(
        "train", str(RECIPE), f"model={start / 'model'}", f"train.seed={seed}",
        f"train.steps={given.steps}", f"train.threads={given.threads}", f"output={run}", *given.changes,
    )  # fmt: skip
    events = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
    steps = [event for event in events if event["event"] == "step"]
    spent_s, reached_s = 0.0, None
    for place, event in enumerate(steps):
        spent_s += event["step_s"]
        last = [one["reward"] for one in steps[max(0, place - 4) : place + 1]]
        if reached_s is None and place >= 4 and sum(last) / len(last) >= GOAL:
            reached_s = spent_s
    return {
        "seed": seed,
        "start_steps": start_steps,
        "reward": [event["reward"] for event in steps],
        "held_out": {str(event["step"]): event["eval_reward"] for event in events if event["event"] == "eval"},
        "mismatch": max(event.get("mismatch", 0.0) for event in steps),
        "start_s": sft_s,
        "rl_s": rl_s,
        "reached_s": reached_s,
        "sample_s": sum(event["sample_s"] for event in steps),
        "train_s": sum(event["train_s"] for event in steps),
        "peak_bytes": max(event["peak_bytes"] for event in steps),
    }


def main() -> None:
    """Measure, write benchmarks/results/grpo_sort.json, print a line a seed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--width", type=int, default=64, help="of an expert")
    parser.add_argument("--start", type=int, action="append", help="steps of fine-tuning before, of each seed in turn")
    parser.add_argument("--steps", type=int, default=320, help="from the reward")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("changes", nargs="*", metavar="key=value", help="of the recipe")
    given = parser.parse_args()
    starts = given.start or [200] * given.seeds
    if len(starts) != given.seeds:
        parser.error(f"--start is given {len(starts)} times, for {given.seeds} seeds")
    with tempfile.TemporaryDirectory() as scratch:
        runs = [learn(seed, starts[seed], Path(scratch) / str(seed), given) for seed in range(given.seeds)]
    result = {
        "question": (__doc__ or "").splitlines()[0],
        "config": {**vars(given), "recipe": RECIPE.read_text()},
        "goal": GOAL,
        "runs": runs,
        **where(PACKAGES),
    }
    print(write_result("grpo_sort" if given.width == 64 else f"grpo_sort-{given.width}", result))
    for run in runs:
        first, last = sum(run["reward"][:3]) / 3, sum(run["reward"][-5:]) / 5
        reached = "not reached" if run["reached_s"] is None else f"after {run['reached_s']:.0f} s of steps"
        print(f"seed {run['seed']}: sampled {first:.2f} -> {last:.2f}, {GOAL} {reached}, {run['rl_s']:.0f} s in all")


if __name__ == "__main__":
    main()
