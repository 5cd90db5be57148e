"""A real, small training run for the tests of the loop: a two-layer network with dropout on a shuffled stream.

Its clock and memory meter are made up, so that two runs with the same steps leave the same bytes, times included.
`Death` ends the process by SIGKILL at a chosen call of a chosen kind.
"""

from __future__ import annotations

import itertools
import multiprocessing
import os
import shutil
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from ossia.train.events import EventLog
from ossia.train.loop import Job, LoopResult, find_start, run_loop
from ossia.train.optim import AdamW, lr_at
from ossia.train.state import seed_generators

STEPS = 6


class ShuffledStream:
    """Batches of 4 rows of a fixed table, in a new seeded order every epoch; its position is epoch and offset."""

    def __init__(self, rows: int = 18, seed: int = 5, epochs: int | None = None) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.rows = torch.randn(rows, 6, generator=generator)
        self.targets = self.rows.square().sum(1, keepdim=True)
        self.seed, self.epochs, self.epoch, self.offset = seed, epochs, 0, 0

    def next_step(self) -> list[tuple[Tensor, Tensor]]:
        if self.offset + 4 > len(self.rows):
            self.epoch, self.offset = self.epoch + 1, 0
        if self.epochs is not None and self.epoch >= self.epochs:
            return []
        order = torch.randperm(len(self.rows), generator=torch.Generator().manual_seed(self.seed + self.epoch))
        chosen = order[self.offset : self.offset + 4]
        self.offset += 4
        return [(self.rows[half], self.targets[half]) for half in chosen.split(2)]

    def state(self) -> dict[str, Any]:
        return {"epoch": self.epoch, "offset": self.offset}

    def load_state(self, state: dict[str, Any]) -> None:
        self.epoch, self.offset = state["epoch"], state["offset"]


def small_job(run: Path, *, pause_s: float = 0.0, **changes: Any) -> Job:
    """A job of 6 steps, each at least `pause_s` long; from the same saved state it always does the same."""
    seed_generators(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.GELU(), nn.Dropout(0.2), nn.Linear(8, 1)).to(torch.bfloat16)
    params: dict[str, Tensor] = dict(model.named_parameters())
    optimizer = AdamW(params, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.01)
    data = changes.pop("data", None) or ShuffledStream()
    ticks = itertools.count()

    def step(packs: list[tuple[Tensor, Tensor]], lr: float) -> dict[str, float]:
        loss = torch.zeros(())
        time.sleep(pause_s)
        for x_BD, y_B1 in packs:
            part = (model(x_BD.to(torch.bfloat16)).float() - y_B1).square().sum() / 4
            part.backward()
            loss += part.detach()
        norm = optimizer.update(loss=float(loss), lr=lr, clip=1.0)
        return {"loss": float(loss), "tokens": 24, "trained": 12, "grad_norm": norm}

    def evaluate() -> dict[str, float]:
        model.eval()
        with torch.no_grad():
            stream = ShuffledStream(seed=77)
            loss = (model(stream.rows.to(torch.bfloat16)).float() - stream.targets).square().mean()
        model.train()
        return {"eval_loss": float(loss), "eval_trained": len(stream.rows)}

    return Job(
        **{
            "run": run,
            "steps": STEPS,
            "data": data,
            "params": params,
            "optimizer": optimizer,
            "lr_at": lambda n: lr_at(n, steps=STEPS, peak=0.05, schedule="cosine", warmup=0.2, min_lr_ratio=0.0),
            "step": step,
            "evaluate": evaluate,
            "eval_every": 3,
            "save_every": 2,
            "keep": 2,
            "counts": lambda: {"rows_skipped": data.epoch},
            "about": {"trainable": sum(p.numel() for p in params.values())},
            "resume_with": "ossia train small.yaml --resume",
            "clock": lambda: 0.25 * next(ticks),
            "memory": lambda: 64 * 2**20,
            **changes,
        }
    )


def train(run: Path, *, resume: bool = False, said: list[str] | None = None, **changes: Any) -> LoopResult:
    """Run the small job to its end in this process."""
    torch.set_num_threads(1)
    with EventLog(run) as log:
        saved = find_start(run, resume=resume, say=[].append if said is None else said.append)
        return run_loop(small_job(run, **changes), log, saved)


def left_behind(run: Path) -> dict[str, bytes]:
    """Every file of a run folder that a reader may see, by its path; the lock and hidden leftovers don't count."""
    files = (path for path in run.rglob("*") if path.is_file())
    inside = {str(path.relative_to(run)): path for path in files}
    return {name: path.read_bytes() for name, path in inside.items() if not name.startswith("checkpoints/.")}


@dataclass
class Death:
    """Kills this process at the `number`-th call of `kind` (from 1); kind "" only counts the calls.

    how  the signal: SIGKILL, or SIGSTOP to hang
    """

    kind: str
    number: int
    how: int = signal.SIGKILL
    calls: Counter[str] = field(default_factory=Counter)

    def maybe(self, kind: str, before: Callable[[], object] = lambda: None) -> None:
        self.calls[kind] += 1
        if kind == self.kind and self.calls[kind] == self.number:
            before()
            os.kill(os.getpid(), self.how)

    @contextmanager
    def lurking(self) -> Iterator[None]:
        """While entered: every call of the system that changes a disk, and every update, is a place to die."""
        fsync, rename, rmtree, truncate = os.fsync, os.rename, shutil.rmtree, os.truncate
        save_file, update, write = safetensors.torch.save_file, AdamW.update, EventLog.write

        def dying_save_file(tensors: dict[str, Tensor], path: Path) -> None:
            save_file(tensors, path)
            self.maybe("half a tensor file", lambda: truncate(path, path.stat().st_size // 2))

        def dying_rmtree(path: Path, **how: Any) -> None:
            self.maybe("half a removal", next(iter(Path(path).glob("*.safetensors")), Path(path, "none")).unlink)
            rmtree(path, **how)

        def dying_update(optimizer: AdamW, **how: Any) -> float:
            self.maybe("before an update")
            norm = update(optimizer, **how)
            self.maybe("after an update")
            return norm

        def dying_write(log: EventLog, event: dict[str, Any]) -> None:
            write(log, event)
            path = log._run / "events.jsonl"
            self.maybe("half an event", lambda: truncate(path, path.stat().st_size - 9))

        def dying_fsync(handle: int) -> None:
            self.maybe("before a flush")
            fsync(handle)

        def dying_rename(old: Path, new: Path) -> None:
            self.maybe("before a rename")
            rename(old, new)
            self.maybe("after a rename")

        os.fsync, os.rename, shutil.rmtree = dying_fsync, dying_rename, dying_rmtree
        safetensors.torch.save_file, AdamW.update, EventLog.write = dying_save_file, dying_update, dying_write
        try:
            yield
        finally:
            os.fsync, os.rename, shutil.rmtree = fsync, rename, rmtree
            safetensors.torch.save_file, AdamW.update, EventLog.write = save_file, update, write


def forkserver() -> Any:
    """Where all tests get new processes from: what takes seconds to import is imported there, once."""
    context = multiprocessing.get_context("forkserver")
    # torch imports _dynamo at the first use of an optimizer
    context.set_forkserver_preload(
        [
            "torch._dynamo",
            "torch.distributed.device_mesh",
            "safetensors.torch",
            "rich.progress",
            "pydantic",
            "tokenizers",
            "ossia.api",
            "ossia.cli",
            "ossia.train.shards.find",
            "ossia.train.shards.read",
            "ossia.train.shards.save",
        ]
    )
    return context


def _train_to_death(run: Path, kind: str, number: int, resume: bool, changes: dict[str, Any]) -> None:
    with Death(kind, number).lurking():
        train(run, resume=resume, **changes)


def train_in_process(run: Path, *, kind: str = "", number: int = 0, resume: bool = False, **changes: Any) -> Any:
    """Start the small run in a process of its own, which may be killed at a chosen place; the process."""
    process = forkserver().Process(target=_train_to_death, args=(run, kind, number, resume, changes))
    process.start()
    return process
