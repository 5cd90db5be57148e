"""Real ranks for tests: processes that run `ossia train` over gloo on 127.0.0.1, as a launcher would start them.

They are forked from a process that has imported everything, so that many can be started and killed; the launcher's
part (the store, the variables, a signal to all once one has failed) is played by the test. `test_launch.py` has
PyTorch's own launcher play it.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from ossia.cli import main
from ossia.train.ranks import world
from ossia.train.ranks.world import World
from tests.train.small_run import Death, forkserver

GONE_S = 2.0
Trouble = Callable[[int], Any]  # (rank) -> a context in which the rank runs


class Ranks:
    """The ranks of one job, started by the constructor.

    folder   where each leaves what it says: rank-0.txt, ...
    trouble  picklable: what one of them is to suffer
    """

    def __init__(self, size: int, folder: Path, *arguments: str, trouble: Trouble = nullcontext) -> None:
        here, there = forkserver().Pipe()
        self.store = forkserver().Process(target=_keep_store, args=(there,), daemon=True)
        self.store.start()
        port = here.recv()
        self._folder = folder
        folder.mkdir(exist_ok=True)
        self.processes = []
        for rank in range(size):
            given = {
                "RANK": rank,
                "WORLD_SIZE": size,
                "LOCAL_RANK": rank,
                "LOCAL_WORLD_SIZE": size,
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": port,
                "TORCHELASTIC_USE_AGENT_STORE": True,
                "TORCHELASTIC_RESTART_COUNT": 0,
                "GLOO_SOCKET_IFNAME": "lo",
            }
            environment = {name: str(value) for name, value in given.items()}
            process = forkserver().Process(target=_be_rank, args=(environment, folder, list(arguments), trouble))
            process.start()
            self.processes.append(process)

    def said(self, rank: int) -> str:
        """Everything that a rank has written, to stdout and stderr."""
        return (self._folder / f"rank-{rank}.txt").read_text()

    def wait(self, *, asks: bool = True) -> list[int | None]:
        """The exit codes. asks: once one has failed the others are asked to end, as PyTorch's launcher does."""
        end, asked = time.monotonic() + 120.0, not asks
        while any(process.is_alive() for process in self.processes):
            assert time.monotonic() < end, [self.said(rank) for rank in range(len(self.processes))]
            if not asked and any(process.exitcode for process in self.processes):
                asked = True
                self.signal(signal.SIGTERM)
            time.sleep(0.02)
        self.store.kill()
        return [process.exitcode for process in self.processes]

    def signal(self, number: int, ranks: Sequence[int] | None = None) -> None:
        """Send a signal to some ranks, or to all that live."""
        for rank in range(len(self.processes)) if ranks is None else ranks:
            if self.processes[rank].is_alive():
                os.kill(self.processes[rank].pid, number)

    def kill(self) -> None:
        """End them all at once."""
        for process in (self.store, *self.processes):
            process.kill()
        for process in self.processes:
            process.join()


def _keep_store(answer: Any) -> None:
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    answer.send(store.port)
    signal.pause()


def _be_rank(environment: dict[str, str], folder: Path, arguments: list[str], trouble: Trouble) -> None:
    os.environ.update(environment)
    rank = int(environment["RANK"])
    out = os.open(folder / f"rank-{rank}.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(out, 1)
    os.dup2(out, 2)
    sys.stdout, sys.stderr = os.fdopen(1, "w", buffering=1), os.fdopen(2, "w", buffering=1)
    torch.set_num_threads(1)
    world._GONE_S = GONE_S
    sys.argv = ["ossia", *arguments]
    with trouble(rank):
        main()


class Suffers:
    """Trouble for one rank: SIGKILL or SIGSTOP at the chosen call of a chosen kind, in `Death`'s kinds and two more."""

    def __init__(self, rank: int, kind: str, number: int, how: int = signal.SIGKILL) -> None:
        self.rank, self.kind, self.number, self.how = rank, kind, number, how

    @contextmanager
    def __call__(self, rank: int) -> Iterator[None]:
        if rank != self.rank:
            yield
            return
        death = Death(self.kind, self.number, how=self.how)
        together, gather = World._together, World.gather

        def dying_together(self: World, tensors: Any, act: Any) -> None:
            death.maybe("before a sum")
            together(self, tensors, act)
            death.maybe("after a sum")

        def dying_gather(self: World, value: Any) -> list[Any]:
            death.maybe("before words")
            return gather(self, value)

        World._together, World.gather = dying_together, dying_gather
        with death.lurking():
            yield


def events_of(run: Path, kind: str) -> list[dict[str, Any]]:
    return [e for e in map(json.loads, (run / "events.jsonl").read_text().splitlines()) if e["event"] == kind]


def losses(run: Path) -> list[float]:
    return [e["loss"] for e in events_of(run, "step")] + [e["eval_loss"] for e in events_of(run, "eval")]


def train(size: int, folder: Path, arguments: list[str], **how: Any) -> Ranks:
    ranks = Ranks(size, folder, *arguments, **how)
    codes = ranks.wait()
    assert codes == [0] * size, [ranks.said(rank) for rank in range(size)]
    return ranks


def farthest(one: list[float], other: list[float]) -> float:
    return max(abs(a - b) / abs(a) for a, b in zip(one, other, strict=True))
