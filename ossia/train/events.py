"""What a run reports: RUN/events.jsonl, one JSON object a line, and RUN/env.json.

Every line has `event` and `step`; within a file steps never fall. The kinds and their keys:

```text
start  steps, and what the story that starts the run adds (counts of parameters, of rows)
step   loss, tokens, trained, tokens_per_s, step_s, lr, grad_norm, peak_bytes, and running counts of the data; of
       several ranks rank_peak_bytes, each one's
eval   eval_loss, eval_s, and what else the evaluation counted
```
`tokens` are real tokens (there is no padding), `trained` those whose prediction counts, `tokens_per_s` is trained
tokens by `step_s`, the seconds of reading and training that step; sizes are bytes, `grad_norm` is before clipping.

A line is written at once, so a kill tears at most the last one. A checkpoint holds the file's length, and on resume the
file is cut back to it, so that it reads as one uninterrupted run.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
from collections.abc import Callable, Mapping
from datetime import datetime
from importlib import metadata
from pathlib import Path
from typing import Any, Protocol, Self

import torch

from ossia.disk import locked
from ossia.errors import RunError
from ossia.ops.memory import machine_memory, peak_resident_bytes
from ossia.sizes import num_cores
from ossia.train.state import checkpoint_paths, storage_error, write_file

EVENTS, ENV = "events.jsonl", "env.json"
Event = Mapping[str, Any]


class Sink(Protocol):
    """Where events go besides the file."""

    def write(self, event: Event) -> None:
        """Take one event; it must not be changed."""

    def close(self) -> None:
        """Nothing more will come."""


class Log(Protocol):
    """What the loop needs of an event log; `EventLog` is the one that writes."""

    def write(self, event: Event) -> None:
        """Take one event."""

    def sync(self) -> int:
        """Bytes that are safe on the disk."""

    def cut(self, length: int) -> None:
        """Forget what came after these bytes."""


class NoLog:
    """The log of a rank that doesn't write the run folder."""

    def write(self, event: Event) -> None:
        """Nothing."""

    def sync(self) -> int:
        return 0

    def cut(self, length: int) -> None:
        """Nothing."""


class EventLog:
    """events.jsonl of one run, open for appending by this process alone, and sinks that hear the same."""

    def __init__(self, run: Path) -> None:
        """Open RUN/events.jsonl, creating it and the folder if need be.

        Raises RunError if another process is writing it, or it can't be written.
        """
        self._run = run
        self._sinks: list[Sink] = []
        try:
            run.mkdir(parents=True, exist_ok=True)
            # Unbuffered: what a full disk refused must not be tried again when the file is closed.
            self._file = (run / EVENTS).open("ab", buffering=0)
        except OSError as error:
            if not run.is_dir():
                raise RunError(
                    f"{run}: can't be written: {error.strerror}\n"
                    "  next: mend that, or choose another `output`; nothing had begun"
                ) from error
            raise self._broken(error) from error
        try:
            free = locked(self._file.fileno())
        except OSError:
            self._file.close()
            raise
        if not free:
            self._file.close()
            raise RunError(f"{run}: another process is training into this folder; choose another `output`")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def add(self, *sinks: Sink) -> None:
        """Have these hear every event from now on; they are closed with the log."""
        self._sinks += sinks

    def write(self, event: Event) -> None:
        """Append one event and hand it to every sink. Raises RunError if the disk is full."""
        line = json.dumps(event, allow_nan=False).encode() + b"\n"
        written = 0
        try:
            while written < len(line):
                written += self._file.write(line[written:])
        except OSError as error:
            raise self._broken(error, len(line)) from error
        for sink in self._sinks:
            sink.write(event)

    def sync(self) -> int:
        """Have the system put on the disk what was written so far; the file's length in bytes. RunError if it can't."""
        try:
            os.fsync(self._file.fileno())
        except OSError as error:
            raise self._broken(error) from error
        return os.fstat(self._file.fileno()).st_size

    def cut(self, length: int) -> None:
        """Go back to what the file held when `sync` gave `length`; a line that this would tear is dropped whole."""
        path = self._run / EVENTS
        with path.open("rb") as file:
            os.truncate(path, file.read(length).rfind(b"\n") + 1)

    def close(self) -> None:
        """Close the file, which lets go of its lock, and the sinks."""
        self._file.close()
        for sink in self._sinks:
            sink.close()

    def _broken(self, error: OSError, need: int = 0) -> RunError:
        return storage_error(error, saving=str(self._run / EVENTS), need=need, safe=checkpoint_paths(self._run))


def read_events(path: Path) -> list[dict[str, Any]]:
    """All events of a file, oldest first; a torn last line (a kill, or a writer at work) is left out.

    Raises RunError with file:line for any other line that isn't an event.
    """
    found = []
    for number, line in enumerate(path.read_bytes().splitlines(keepends=True), 1):
        if not line.endswith(b"\n"):
            break
        try:
            event = json.loads(line)
        except ValueError as error:
            raise RunError(f"{path}:{number}: not JSON ({error}); remove the line to read the rest") from error
        if not isinstance(event, dict) or not {"event", "step"} <= event.keys():
            raise RunError(f"{path}:{number}: not an event (an object with `event` and `step`); remove the line")
        found.append(event)
    return found


def fullest(step: Event) -> tuple[int, str]:
    """The most bytes that a process of the run has used by a step, and whose they are: "" where there is one alone."""
    ranks = step.get("rank_peak_bytes")
    if ranks is None:
        return step["peak_bytes"], ""
    return max(ranks), f"rank {ranks.index(max(ranks))}, the most of {len(ranks)}"


def peak_bytes(device: torch.device) -> int:
    """The most memory used so far, in bytes: reserved by torch on a GPU, resident in this process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_reserved(device)
    return peak_resident_bytes()


def environment(device: torch.device) -> dict[str, Any]:
    """What a result depends on besides the recipe: versions, device, cores. No names of hosts, users or folders."""
    versions = {name: _version(name) for name in ("ossia", "torch", "numpy", "safetensors", "tokenizers")}
    versions["torch"] = str(torch.__version__)  # the build too (+cpu, +cu130), which the package index doesn't tell
    return {
        **versions,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "cpu": _cpu_model(),
        "cores": num_cores(),
        "threads": torch.get_num_threads(),
        "memory_bytes": machine_memory()[0],
        **_commit(Path(__file__).parent),
    }


def write_env(
    run: Path, env: Mapping[str, Any], *, now: datetime, resumed_from: int | None = None, say: Callable[[str], None]
) -> None:
    """Write RUN/env.json: `env` and when the run started; for a resumed run, its own `resumed` entry is added.

    A resumed run keeps what it was started with; an entry holds the step, the time and what differs since. Where the
    file is damaged `say` is told, and `env` takes its place with `started` null: nothing but a reader depends on it.
    """
    path, at = run / ENV, now.isoformat(timespec="seconds")
    content: dict[str, Any] = {**env, "started": at, "resumed": []}
    if resumed_from is not None and path.exists():
        try:
            content = _read_env(path)
        except (ValueError, TypeError) as error:
            say(f"{path}: can't be read ({error}); written anew, so with what the run was started is lost")
            content["started"] = None
        changed = {key: value for key, value in env.items() if content.get(key) != value}
        content["resumed"].append({"step": resumed_from, "at": at, **changed})
    write_file(path, json.dumps(content, indent=2) + "\n")


def _read_env(path: Path) -> dict[str, Any]:
    """An env.json as `write_env` wrote it; ValueError or TypeError for anything else."""
    content = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(content, dict) or not isinstance(content.get("resumed"), list):
        raise TypeError("no object with a list `resumed`")
    return content


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _cpu_model() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def _commit(package: Path) -> dict[str, Any]:
    """`commit` and `modified` if this code runs from a git checkout that tracks it, else nothing.

    modified  whether any file of the whole package (the folder above this one) differs from the commit
    """

    def git(*args: str) -> str | None:
        done = subprocess.run(["git", "-C", str(package), *args], capture_output=True, text=True, check=False)
        return done.stdout.strip() if done.returncode == 0 else None

    try:
        if git("ls-files", "--error-unmatch", Path(__file__).name) is None:
            return {}
        return {"commit": git("rev-parse", "HEAD"), "modified": bool(git("status", "--porcelain", "--", ".."))}
    except FileNotFoundError:
        return {}
