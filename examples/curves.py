"""What a run's events.jsonl says: loss curve, held-out losses, speed and memory. Works while the run goes on.

Run: python examples/curves.py runs/my-run [--csv losses.csv]
"""

import argparse
import csv
import json
import math
from pathlib import Path
from statistics import fmean, median

BARS = "▁▂▃▄▅▆▇█"

options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
options.add_argument("run", type=Path, help="a run folder")
options.add_argument("--csv", type=Path, help="write step, loss, learning rate and speed there")
options.add_argument("--width", type=int, default=60, help="of the curve, in characters")
given = options.parse_args()

lines = (given.run / "events.jsonl").read_bytes().splitlines(keepends=True)
events = [json.loads(line) for line in lines if line.endswith(b"\n")]  # the last one may be half written
steps = [event for event in events if event["event"] == "step"]
if not steps:
    raise SystemExit(f"{given.run}: no step has been taken yet")

losses = [step["loss"] for step in steps]
width = min(given.width, len(losses))
means = [fmean(losses[len(losses) * i // width : len(losses) * (i + 1) // width]) for i in range(width)]
logs = [math.log(max(mean, 1e-9)) for mean in means]  # else the first steps leave the others no height
spread = max(logs) - min(logs) or 1.0
curve = "".join(BARS[round((log - min(logs)) / spread * (len(BARS) - 1))] for log in logs)
held_out = [f"{event['eval_loss']:.3f} at step {event['step']}" for event in events if event["event"] == "eval"]
rate = median(step["tokens_per_s"] for step in steps)
print(f"loss      {curve}  {losses[0]:.3f} -> {losses[-1]:.3f}")
print(f"held out  {', '.join(held_out) or 'nothing was'}")
print(f"speed     {rate:,.0f} trained tokens/s, the median of {len(steps):,} steps")
print(f"memory    {max(step['peak_bytes'] for step in steps) / 2**30:.2f} GiB at the most")

if given.csv:
    with given.csv.open("w", newline="", encoding="utf-8") as file:
        table = csv.DictWriter(file, ("step", "loss", "lr", "tokens_per_s"), extrasaction="ignore")
        table.writeheader()
        table.writerows(steps)
