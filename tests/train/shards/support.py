"""Ranks that train something tiny that is cut over them: real processes over gloo, real files, one function for all.

The tensors are flat and change elementwise, so that any number of ranks computes the same bits, and what a run of so
many steps should hold is known without running it.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard

from ossia.errors import UserError
from ossia.train.ranks import world as world_module
from ossia.train.ranks.launched import Launched
from ossia.train.ranks.world import World
from ossia.train.shards import form
from ossia.train.shards.find import find_start_together
from ossia.train.shards.form import parts_of, range_of
from ossia.train.shards.read import restore_parts
from ossia.train.shards.save import Saver
from ossia.train.state import checkpoint_path, entry_of, rng_state, seed_generators, write_manifest
from tests.train.ranks.support import _keep_store
from tests.train.small_run import forkserver

SHAPES = {
    "wide": (40, 30),
    "exp_avg.wide": (40, 30),
    "odd": (7,),
    "exp_avg.odd": (7,),
    "one": (1,),
    "half": (5, 3),
}
DTYPES = {"half": torch.bfloat16}
SAVE_EVERY = 2
Act = Callable[..., Any]


def whole_at(step: int) -> dict[str, Tensor]:
    """Every tensor as it is after `step` steps, flat."""
    return {name: _values(name, 0, torch.Size(shape).numel(), step) for name, shape in SHAPES.items()}


def _values(name: str, start: int, count: int, step: int) -> Tensor:
    where = torch.arange(start, start + count, dtype=torch.float32)
    tensor = (where * 0.37 + len(name)).sin()
    for number in range(1, step + 1):
        tensor = tensor * 0.9 + (where + number).cos() * 0.1
    return tensor.to(DTYPES.get(name, torch.float32))


def cut_at(world: World, step: int, mesh: Any) -> dict[str, Tensor]:
    """This rank's part of every tensor."""
    found: dict[str, Tensor] = {}
    for name, shape in SHAPES.items():
        total = torch.Size(shape).numel()
        local = _values(name, *range_of(total, world.rank, world.size), step)
        found[name] = DTensor.from_local(local, mesh, [Shard(0)], shape=(total,), stride=(1,), run_check=False)
    return found


def train(
    world: World,
    run: Path,
    steps: int,
    *,
    resume: bool = False,
    beside: bool = True,
    pause_s: float = 0.0,
    keep: int = 2,
) -> list[str]:
    """Go from where the run is to `steps`, saving every second step; what was said. Checks what is restored."""
    said: list[str] = []
    run.mkdir(exist_ok=True, parents=True)
    if world.leads:
        (run / "events.jsonl").touch()
    mesh = init_device_mesh("cpu", (world.size,))
    seed_generators(5)
    saved = find_start_together(world, run, resume=resume, say=said.append)
    step = saved.step if saved else 0
    saver = Saver(run, world, SHAPES, start=step, keep=keep, beside=beside)
    tensors = cut_at(world, 0, mesh)
    if saved:
        updates: list[int] = []
        restore_parts(world, run, saved, lambda num: updates.append(num) or parts_of(tensors), SHAPES)
        assert updates == [step] == [saved.progress["data"]]
        expected = cut_at(world, step, mesh)
        assert all(torch.equal(tensors[n].to_local(), expected[n].to_local()) for n in SHAPES)
        drawn = torch.Generator().manual_seed(5)
        torch.rand(step, generator=drawn)
        assert torch.equal(drawn.get_state(), torch.get_rng_state())
    while step < steps:
        saver.check()
        step += 1
        world.step = step
        for name, tensor in cut_at(world, step, mesh).items():
            tensors[name].to_local().copy_(tensor.to_local())
        time.sleep(pause_s)
        torch.rand(1)
        world.end_of_step(0)
        if step % SAVE_EVERY == 0:
            saver.save(step, parts_of(tensors), num_updates=step, progress={"data": step, "events_bytes": 0})
    saver.wait()
    world.gather(None)
    return said


def save_as_ranks(run: Path, step: int, whole: Mapping[str, Tensor], size: int, *, num_updates: int = 1) -> Path:
    """The checkpoint that so many ranks would write of these tensors, without the processes; its folder."""
    place = checkpoint_path(run, step)
    place.mkdir(parents=True)
    names = sorted(whole)
    parts = []
    for rank in range(size):
        ranges = {name: range_of(whole[name].numel(), rank, size) for name in names}
        flat = {name: whole[name].detach().reshape(-1) for name in names}
        parts.append({n: form.Part(len(flat[n]), at, flat[n][at : at + num]) for n, (at, num) in ranges.items()})
    ranges = [form.ranges_of(of_rank) for of_rank in parts]
    written = [form.write_part(place, rank, of_rank, ranges) for rank, of_rank in enumerate(parts)]
    form.write_metadata(place, {n: (whole[n].numel(), whole[n].dtype) for n in names}, ranges, written)
    shapes = {name: list(tensor.shape) for name, tensor in whole.items()}
    state = {"step": step, "progress": {}, "rng": rng_state(), "num_updates": num_updates, "shapes": shapes}
    (place / "state.json").write_text(json.dumps(state))
    files = {file.name: entry_of(file) | {"rank": 0, "host": "here"} for file in place.iterdir()}
    write_manifest(place, step, files, ranks=size)
    return place


class Group:
    """The processes of `act(world, *arguments)`.

    folders  the working folder of each: hosts whose disks differ, where `run` is a relative path
    trouble  picklable: (rank) -> a context in which that rank runs
    """

    def __init__(
        self,
        size: int,
        out: Path,
        act: Act,
        *arguments: Any,
        folders: Sequence[Path] | None = None,
        trouble: Callable[[int], Any] = nullcontext,
        timeout_s: float = 20.0,
        **named: Any,
    ) -> None:
        here, there = forkserver().Pipe()
        self.store = forkserver().Process(target=_keep_store, args=(there,), daemon=True)
        self.store.start()
        given = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(here.recv()), "GLOO_SOCKET_IFNAME": "lo"}
        given |= {"TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": "0"}
        out.mkdir(exist_ok=True, parents=True)
        self._out = out
        self.processes = []
        for rank in range(size):
            where = out if folders is None else folders[rank]
            where.mkdir(exist_ok=True, parents=True)
            what = (given, Launched(rank, size, rank, size), out, where, act, arguments, named, trouble, timeout_s)
            self.processes.append(forkserver().Process(target=_be_rank, args=what))
            self.processes[-1].start()

    def said(self, rank: int) -> str:
        return (self._out / f"rank-{rank}.txt").read_text()

    def errors(self) -> list[str]:
        """The last line of each rank."""
        return [(self.said(rank).splitlines() or [""])[-1] for rank in range(len(self.processes))]

    def wait(self, seconds: float = 60.0) -> list[int | None]:
        """The exit codes."""
        end = time.monotonic() + seconds
        for process in self.processes:
            process.join(max(0.0, end - time.monotonic()))
        codes = [process.exitcode for process in self.processes]
        self.kill()
        return codes

    def kill(self) -> None:
        for process in (self.store, *self.processes):
            if process.is_alive():
                process.kill()
        for process in self.processes:
            process.join()


def _be_rank(
    given: Mapping[str, str],
    place: Launched,
    out: Path,
    where: Path,
    act: Act,
    arguments: Sequence[Any],
    named: Mapping[str, Any],
    trouble: Callable[[int], Any],
    timeout_s: float,
) -> None:
    os.environ.update(given | {"RANK": str(place.rank), "WORLD_SIZE": str(place.size)})
    handle = os.open(out / f"rank-{place.rank}.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    sys.stdout, sys.stderr = os.fdopen(1, "w", buffering=1), os.fdopen(2, "w", buffering=1)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    os.chdir(where)
    torch.set_num_threads(1)
    world_module._GONE_S, form.PIECE = 2.0, 100
    try:
        with trouble(place.rank), World(place, torch.device("cpu"), timeout_s) as world:
            found = act(world, *arguments, **named)
        os.write(1, "".join(f"{line}\n" for line in found or ()).encode())
    except UserError as error:
        os.write(2, f"{error}\n".encode())
        os._exit(2)
    except (AssertionError, RuntimeError, OSError, ValueError, LookupError, TypeError):
        traceback.print_exc()
        os._exit(1)
    os._exit(0)
