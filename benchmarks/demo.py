"""Question: does the demo learn, whatever the seed, and how long does it take?

Run: python -m benchmarks.demo --seeds 3      Needs: 2 cores      Answer quoted in: README.md

Runs `ossia demo` as a person does, a process a seed, and reads what it left: the held-out losses from events.jsonl, the
answers to held-out questions, and how long the whole story took: wall time, and CPU time, which says more of a machine
that does other work as well.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.common import ROOT, where, write_result
from ossia.demo.run import ANSWERS, exact_match

PACKAGES = ("torch", "tokenizers", "numpy", "safetensors")


def tell(seed: int, folder: Path) -> dict[str, Any]:
    """One demo: its figures."""
    start, cpu_start = time.perf_counter(), _cpu_of_children()
    command = [sys.executable, "-m", "ossia", "demo", "--output", str(folder), "--seed", str(seed)]
    subprocess.run(command, cwd=ROOT, check=True, stdout=sys.stderr)
    seconds, cpu_seconds = time.perf_counter() - start, _cpu_of_children() - cpu_start
    events = [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]
    answers = {
        when: [json.loads(line) for line in (folder / ANSWERS / f"{when}.jsonl").read_text().splitlines()]
        for when in ("before", "after")
    }
    return {
        "seed": seed,
        "wall_s": seconds,
        "cpu_s": cpu_seconds,
        "peak_bytes": max(e["peak_bytes"] for e in events if e["event"] == "step"),
        "held_out_loss": {str(e["step"]): e["eval_loss"] for e in events if e["event"] == "eval"},
        "exact_match": {when: exact_match(rows) for when, rows in answers.items()},
        "questions": len(answers["after"]),
    }


def _cpu_of_children() -> float:
    """Seconds of CPU, user and system, of all processes that were started here and have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def main() -> None:
    """Measure, write benchmarks/results/demo.json, print a line a seed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    seeds = range(parser.parse_args().seeds)
    with tempfile.TemporaryDirectory() as scratch:
        runs = [tell(seed, Path(scratch) / str(seed)) for seed in seeds]
    result = {
        "question": (__doc__ or "").splitlines()[0],
        "config": {"seeds": len(runs), "threads": os.environ.get("OMP_NUM_THREADS", "torch's own choice")},
        "runs": runs,
        **where(PACKAGES),
    }
    print(write_result("demo", result))
    for run in runs:
        losses = [*run["held_out_loss"].values()]
        match = run["exact_match"]
        print(
            f"seed {run['seed']}: held-out loss {losses[0]:.2f} -> {losses[-1]:.3f}, exact match {match['before']:.2f} "
            f"-> {match['after']:.2f} of {run['questions']}, {run['cpu_s']:.0f} s of CPU, {run['wall_s']:.0f} s"
        )


if __name__ == "__main__":
    main()
