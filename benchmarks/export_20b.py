"""Question: what do exports of gpt-oss-20b take, in memory and time, verification included?

Run: python -m benchmarks.export_20b --to hf-bf16 (or gguf)      Needs: 70 GB of disk for hf-bf16, 30 for gguf
Answer quoted in: docs/export.md

With --killed: does an export of that size that is killed twice (`kill -9`, when a third and two thirds of its bytes are
noted as whole) end in the bytes of one that nothing stopped? Both are made one after the other, so the disk holds one.

The command itself, `ossia export`, on random weights of the shape and a random adapter on attention (r16) and experts
(r8). Its phases are told by its own words on stderr; its memory is read from /proc while it runs: `anonymous` is its
own, `resident` has the pages of mapped files beside it, which are the system's to take back.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import ROOT, where, write_result
from ossia.model.arch import SHAPES, alternating_layers
from ossia.model.checkpoint import Checkpoint
from ossia.model.lora import Lora, LoraSpec
from ossia.model.peft import save_adapter
from ossia.model.tiny import make_tiny

_ATTENTION = dict.fromkeys(("q_proj", "k_proj", "v_proj", "o_proj"), (16, 32.0))
_EXPERTS = dict.fromkeys(("gate_up_proj", "down_proj"), (8, 16.0))
_PHASES = {"it takes ": "writing", "written; ": "verifying", "read back and compared ": "ending"}


def random_adapter(base: Checkpoint, targets: dict[str, tuple[int, float]], folder: Path) -> None:
    """An adapter on every one of its targets whose sum with the weights bfloat16 nearly always holds.

    A random model's router is so undecided that any rounding sends tokens elsewhere, and the export would be refused,
    rightly. So experts move by the step of their MXFP4 grid, each input through one of the ranks, and attention in one
    output of each matrix. It takes as long as any other adapter.
    """
    lora = Lora.fresh(base.arch, LoraSpec(targets), seed=0, device=torch.device("cpu"))
    generator = torch.Generator().manual_seed(0)
    for module, site in lora.sites.items():
        a, b = (lora.trainable.tensors[f"{module}.lora_{side}"] for side in "AB")
        if site.num_experts is None:
            b[7] = torch.randn(b.shape[1:], generator=generator) * 0.1
            continue
        step = 2.0 ** (int(base.tensor(f"{module}_scales")[0].min()) - 128)
        a.copy_((torch.arange(a.shape[-1]) % a.shape[-2] == torch.arange(a.shape[-2])[:, None]).float())
        b.copy_(torch.randint(-1, 2, b.shape, generator=generator) * step / lora.spec.scale(site.target))
    save_adapter(folder, lora, base_model="random")


def cpu_seconds(pid: int) -> float:
    """Of all of a process's cores, so far."""
    try:
        words = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except FileNotFoundError:
        return 0.0
    return (int(words[11]) + int(words[12])) / os.sysconf("SC_CLK_TCK")


def watched(command: list[str], threads: int, until: Callable[[], bool] = lambda: False) -> dict[str, Any]:
    """Run it, and kill it when `until` says so; seconds of each phase, and its peaks of memory."""
    env = {**os.environ, "OMP_NUM_THREADS": str(threads), "PYTHONUNBUFFERED": "1"}
    begun = time.monotonic()
    process = subprocess.Popen(command, cwd=ROOT, env=env, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
    phases, said = [("opening", begun, 0.0)], list[str]()
    peaks: dict[str, dict[str, int]] = {}

    cpu_s = [0.0]

    def look() -> None:
        while process.poll() is None:
            try:
                status = Path(f"/proc/{process.pid}/status").read_text()
            except FileNotFoundError:
                break
            cpu_s[0] = cpu_seconds(process.pid) or cpu_s[0]
            found = {key: int(size) * 1024 for key, size in re.findall(r"(RssAnon|VmHWM|VmRSS):\s+(\d+) kB", status)}
            peak = peaks.setdefault(phases[-1][0], dict.fromkeys(("RssAnon", "VmHWM", "VmRSS"), 0))
            peak |= {key: max(peak[key], size) for key, size in found.items()}
            if until():
                process.kill()
                break
            time.sleep(0.01)

    watcher = threading.Thread(target=look)
    watcher.start()
    assert process.stderr is not None
    for line in process.stderr:
        said.append(line.rstrip())
        print(f"{time.monotonic() - begun:7.1f} s  {line}", end="", file=sys.stderr)
        phases += [(name, time.monotonic(), cpu_s[0]) for words, name in _PHASES.items() if line.startswith(words)]
    code = process.wait()
    watcher.join()
    phases.append(("end", time.monotonic(), cpu_s[0]))
    if code not in (0, -signal.SIGKILL):
        raise SystemExit(f"the export ended with code {code}")
    return {
        "seconds": {name: end - start for (name, start, _), (_, end, _) in pairwise(phases)},
        "cpu_seconds": {name: end - start for (name, _, start), (_, _, end) in pairwise(phases)},
        "total_s": phases[-1][1] - begun,
        "peak_anonymous_bytes": {name: peak["RssAnon"] for name, peak in peaks.items()},
        "peak_resident_bytes": {name: peak["VmRSS"] for name, peak in peaks.items()},
        "peak_resident_bytes_of_all": max(peak["VmHWM"] for peak in peaks.values()),
        "killed": code == -signal.SIGKILL,
        "kept": next((line.partition(": ")[2] for line in said if line.startswith("going on with ")), None),
        "compared": next((line for line in said if line.startswith("read back ")), None),
    }


def noted_bytes(journal: Path) -> int:
    """Of the tensors that are whole, by an export's journal."""
    if not journal.is_file():
        return 0
    whole = journal.read_bytes().rpartition(b"\n")[0]
    return sum(line["region"][2] for line in map(json.loads, whole.splitlines()) if "region" in line)


def files_of(output: Path) -> list[Path]:
    """What an export wrote."""
    return [output] if output.is_file() else sorted(output.iterdir())


def killed_and_ended(command: list[str], output: Path, threads: int, num_bytes: int) -> dict[str, Any]:
    """The same export once more, killed twice: what each try took, and whether its files are those that are there."""
    wanted = sums_of(output)
    remove(output)
    journal, tries = output.with_name(f".{output.name}.unverified.journal"), []
    for share in (1 / 3, 2 / 3, None):
        at = num_bytes + 1 if share is None else share * num_bytes
        one = watched(command, threads, lambda at=at: noted_bytes(journal) >= at)
        assert one["killed"] == (share is not None), "it ended before it was killed, or was killed by somebody else"
        tries.append(one | {"noted_bytes": noted_bytes(journal)})
    found = sums_of(output)
    return {"tries": tries, "files": len(wanted), "same": found == wanted, "sha256": found}


def sums_of(output: Path) -> dict[str, str]:
    """The sha256 of each file."""
    found = {}
    for file in files_of(output):
        with file.open("rb") as handle:
            found[file.name] = hashlib.file_digest(handle, "sha256").hexdigest()
    return found


def remove(output: Path) -> None:
    """A folder or a file."""
    shutil.rmtree(output) if output.is_dir() else output.unlink()


def main() -> None:
    """Measure one format."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--to", choices=("hf-bf16", "gguf"), default="hf-bf16")
    parser.add_argument(
        "--adapter", choices=("all", "attention"), default="all", help="gguf keeps MXFP4 without experts"
    )
    parser.add_argument("--layers", type=int, default=24, help="fewer where there is no room for all")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--model", type=Path, help="the random model, made there if nothing is")
    parser.add_argument("--scratch", type=Path, help="where the export is written, and removed")
    parser.add_argument("--killed", action="store_true", help="then killed twice, and the bytes compared")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.scratch) as scratch:
        folder = options.model or Path(scratch) / "model"
        if not folder.exists():
            layers = {"num_layers": options.layers, "layer_types": alternating_layers(options.layers)}
            make_tiny(folder, dataclasses.replace(SHAPES["20b"], **layers))
        base = Checkpoint.open(folder)
        targets = _ATTENTION if options.adapter == "attention" else _ATTENTION | _EXPERTS
        random_adapter(base, targets, Path(scratch) / "adapter")
        output = Path(scratch) / ("out.gguf" if options.to == "gguf" else "out")
        command = [sys.executable, "-m", "ossia", "export", str(folder), "--adapter", str(Path(scratch) / "adapter")]
        command += ["--to", options.to, "--output", str(output)]
        found = watched(command, options.threads)
        found["written_bytes"] = sum(file.stat().st_size for file in files_of(output))
        if options.killed:
            found = {"undisturbed": found}
            whole = found["undisturbed"]["written_bytes"]
            found |= killed_and_ended(command, output, options.threads, whole)
        layer_bytes = sum(
            spec.num_bytes
            for name, spec in base.arch.tensor_specs("bf16").items()
            if name.startswith("model.layers.0.")
        )
        result = {
            "where": where(("torch", "safetensors", "gguf")),
            "config": {
                "to": options.to,
                "layers": base.arch.num_layers,
                "adapter": {name: rank for name, (rank, _) in targets.items()},
                "threads": options.threads,
                "vocab_size": base.arch.vocab_size,
                "base_bytes": base.num_bytes,
                "bf16_layer_bytes": layer_bytes,
            },
            **found,
        }
        remove(output)
    print({key: value for key, value in result.items() if key != "where"})
    depth = base.arch.num_layers
    name = f"export_20b-{options.to}-{options.adapter}{'-killed' if options.killed else ''}"
    write_result(name if depth == SHAPES["20b"].num_layers else f"{name}-{depth}", result)


if __name__ == "__main__":
    main()
