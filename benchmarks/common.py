"""What every benchmark shares: the record of where it ran, and workers that take turns.

A side-by-side comparison runs each side in a process of its own, loaded and warmed up; the parent then asks them for
one repeat each in turn (A B A B ...), so drift of the machine falls on both, and each process's peak memory is its own.
"""

from __future__ import annotations

import json
import os
import platform
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).parents[1]
RESULTS = Path(__file__).parent / "results"


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


def ratio_of_medians(a: list[float], b: list[float]) -> float:
    """median(a) / median(b)."""
    return median(a) / median(b)
