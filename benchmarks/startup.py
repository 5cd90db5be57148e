"""Question: how long do `import ossia` and `ossia --help` take, from the start of the process to its end?

Run: python -m benchmarks.startup      Needs: CPU only      Answer quoted in: README.md

Each figure is the wall time of a fresh interpreter, the cases in turn (A B C A B C ...) after one round of warm-up,
`python -c pass` among them for what Python itself takes.
The goals: `import ossia` under 0.3 s, `ossia --help` under 0.5 s.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time

from benchmarks.common import ROOT, where, write_result

CASES = {
    "python -c pass": ("-c", "pass"),
    "import ossia": ("-c", "import ossia"),
    "import ossia.config": ("-c", "import ossia.config"),
    "ossia --help": ("-m", "ossia", "--help"),
}
PACKAGES = ("typer", "pydantic", "pyyaml", "torch")


def measure(repeats: int) -> dict[str, list[float]]:
    """Wall times in seconds of every case, `repeats` of each, interleaved; the first round is thrown away."""
    times_s: dict[str, list[float]] = {name: [] for name in CASES}
    for _ in range(repeats + 1):
        for name, arguments in CASES.items():
            begin = time.perf_counter()
            subprocess.run([sys.executable, *arguments], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
            times_s[name].append(time.perf_counter() - begin)
    return {name: times[1:] for name, times in times_s.items()}


def main() -> None:
    """Measures, writes benchmarks/results/startup.json, prints a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=11)
    repeats = parser.parse_args().repeats
    times_s = measure(repeats)
    medians_s = {name: statistics.median(times) for name, times in times_s.items()}
    result = {
        "question": (__doc__ or "").splitlines()[0],
        "config": {"repeats": repeats, "cases": CASES},
        **where(PACKAGES),
        "median_s": medians_s,
        "raw_s": times_s,
    }
    write_result("startup", result)
    for name, median_s in medians_s.items():
        print(f"{name:<22}{median_s:7.3f} s   ({min(times_s[name]):.3f} to {max(times_s[name]):.3f})")


if __name__ == "__main__":
    main()
