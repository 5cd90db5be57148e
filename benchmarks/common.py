"""What every benchmark shares: the record of where it ran, and workers that take turns.

A side-by-side comparison runs each side in a process of its own, loaded and warmed up; the parent then asks them for
one repeat each in turn (A B A B ...), so drift of the machine falls on both, and each process's peak memory is its own.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Mapping
from importlib import metadata
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).parents[1]
RESULTS = Path(__file__).parent / "results"
ATTENTION, EXPERTS = ("q_proj", "k_proj", "v_proj", "o_proj"), ("gate_up_proj", "down_proj")  # an adapter's targets


def commit() -> str | None:
    """The commit that was measured, with "+changes" if the tree differs from it; None outside a repository."""
    asked = [["git", "rev-parse", "HEAD"], ["git", "status", "--porcelain", "--", ".", ":!benchmarks/results"]]
    head, changes = (subprocess.run(line, cwd=ROOT, capture_output=True, text=True, check=False) for line in asked)
    if head.returncode:
        return None
    return head.stdout.strip() + ("+changes" if changes.stdout.strip() else "")


def where(packages: tuple[str, ...]) -> dict[str, Any]:
    """Device, cores, versions and commit: what a figure depends on besides its own configuration."""
    return {
        "device": re.findall(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())[0],
        "cores": len(os.sched_getaffinity(0)),
        "python": platform.python_version(),
        "versions": {name: metadata.version(name) for name in packages},
        "commit": commit(),
    }


def write_result(name: str, result: dict[str, Any]) -> Path:
    """Write benchmarks/results/NAME.json."""
    RESULTS.mkdir(exist_ok=True)
    file = RESULTS / f"{name}.json"
    file.write_text(json.dumps(result, indent=1) + "\n")
    return file


def peak_resident_bytes() -> int:
    """This process's own largest resident set so far (VmHWM)."""
    return int(re.findall(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[0]) * 1024


class Worker:
    """A side of a comparison in a process of its own: prints one JSON line when ready, then one per line of input."""

    def __init__(self, module: str, *arguments: str, threads: int) -> None:
        env = {**os.environ, "OMP_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "false"}
        env.pop("OMP_WAIT_POLICY", None)  # threads that sleep between a peer's many small operators would slow it down
        self._process = subprocess.Popen(
            [sys.executable, "-m", module, *arguments],
            cwd=ROOT,
            env=env,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.ready = self._read()

    def ask(self, question: str = "step") -> dict[str, Any]:
        """One repeat; what the worker measured."""
        assert self._process.stdin is not None
        self._process.stdin.write(question + "\n")
        self._process.stdin.flush()
        return self._read()

    def close(self) -> None:
        """Let the worker end."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(timeout=60)

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"a worker ended with code {self._process.wait()}; its last words are above")
        return json.loads(line)


def serve(ready: dict[str, Any], repeat: Any) -> None:
    """The worker's side: say that it is ready, then `repeat()` for every line of input, until there is none."""
    out = sys.stdout
    print(json.dumps(ready), file=out, flush=True)
    for _ in sys.stdin:
        print(json.dumps(repeat()), file=out, flush=True)


def take_turns(
    module: str, name: str, folder: Path, sides: Iterable[str], repeats: int, threads: int, *, alone: bool = False
) -> tuple[dict[str, Any], dict[str, list[dict[str, Any]]]]:
    """What each side said when it was ready, and its runs: one of each in turn, the first being the warm-up.

    alone  a process of its own for each run, one at a time and without a warm-up: where a side nearly fills the memory
    """

    def start(side: str) -> Worker:
        words = ("--case", name, "--model", str(folder), "--threads", str(threads))
        return Worker(module, "--worker", side, *words, threads=threads)

    workers = {} if alone else {side: start(side) for side in sides}
    ready: dict[str, Any] = {}
    runs: dict[str, list[dict[str, Any]]] = {side: [] for side in sides}
    for _ in range(repeats if alone else repeats + 1):
        for side in sides:
            worker = workers.get(side) or start(side)
            ready[side] = worker.ready
            runs[side].append(worker.ask())
            told = {key: value for key, value in runs[side][-1].items() if not isinstance(value, list)}
            print(name, side, told, file=sys.stderr, flush=True)
            if alone:
                worker.close()
    for worker in workers.values():
        worker.close()
    return ready, runs


def side_by_side(
    module: str,
    doc: str,
    cases: Mapping[str, Any],
    default: str,
    *,
    make: Callable[[Any, Path], None],
    sides: Mapping[str, Callable[[Any, Path, int], None]],
    compare: Callable[[str, Path, int, int], dict[str, Any]],
    tell: Callable[[dict[str, Any]], str],
) -> None:
    """A benchmark's `main`: measure one case, or be a worker of one.

    make     writes a case's model into a folder that doesn't exist yet
    sides    what a worker of each does, given case, model and number of threads
    compare  a case's result, from its name, the model, and the numbers of repeats and threads
    tell     a line about the result
    """
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", choices=cases, default=default)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument(
        "--model", type=Path, help="the case's model, made there if nothing is; instead of a scratch one"
    )
    parser.add_argument("--worker", choices=sides)
    options = parser.parse_args()
    case = cases[options.case]
    if options.worker:
        sides[options.worker](case, options.model, options.threads)
        return
    with tempfile.TemporaryDirectory() as scratch:
        folder = options.model or Path(scratch) / "model"
        if not folder.exists():
            make(case, folder)
        result = compare(options.case, folder, options.repeats, options.threads)
    print(write_result(f"{module.rpartition('.')[2]}-{options.case}", result))
    print(f"{options.case}: {tell(result)}")


def ratio_of_medians(a: list[float], b: list[float]) -> float:
    """median(a) / median(b)."""
    return median(a) / median(b)
