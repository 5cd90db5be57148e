"""Saving what is cut over ranks: every rank its own file, one rename that makes the checkpoint, training going on.

A save is in phases. What a rank did in one, or why it couldn't, it tells all others by words, and none begins the next
before all have said that they are done:

```text
1  the keeper of each run folder makes checkpoints/.partial-step-00000100 there
2  each rank writes its file into it and flushes it
3  each keeper writes the files that all hosts have: .metadata, state.json, and manifest.json over all ranks' files
4  rank 0 renames its folder: from here on the checkpoint is there
5  the keepers on other disks rename theirs
```
Whoever dies before 4 leaves the checkpoints that were there; between 4 and 5 a host can keep a hidden folder whose
files are those of the manifest, which is taken up on resume (`train.shards.find`).
The tensors are copied to the machine's memory first, and a thread saves the copy while training goes on. DCP's own
`async_save` would talk by collectives, which can neither say who is gone nor be left while a rank stands still.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import threading
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from ossia.disk import sync_to_disk
from ossia.errors import RunError, UserError
from ossia.train.shards.form import METADATA, Part, ranges_of, write_metadata, write_part
from ossia.train.shards.hosts import keepers
from ossia.train.state import (
    STATE,
    checkpoint_path,
    checkpoint_paths,
    entry_of,
    human_bytes,
    partial_path,
    prune,
    rng_state,
    set_aside,
    step_of,
    storage_error,
    sweep,
    verify,
    write_manifest,
)

if TYPE_CHECKING:
    from ossia.train.ranks.world import World

_POLL_S = 0.01
_OUR_FAULTS = (ValueError, LookupError, TypeError, AssertionError)


@dataclass(frozen=True, slots=True)
class _Save:
    """One checkpoint to be written: `state` is what state.json says, the same on all ranks but for rank 0's own."""

    step: int
    parts: Mapping[str, Part]
    state: dict[str, Any]


class Saver:
    """Saves this rank's part of a run's checkpoints, together with the other ranks' savers."""

    def __init__(
        self,
        run: Path,
        world: World,
        shapes: Mapping[str, tuple[int, ...]],
        *,
        start: int,
        keep: int,
        beside: bool,
    ) -> None:
        """All ranks make theirs together, before anything of a checkpoint is restored.

        shapes  of the tensors that will be saved, by name, before they were made flat
        start   the step that the run goes on from; 0: it begins
        keep    checkpoints kept
        beside  save a copy in a thread while the caller goes on; else the caller waits and nothing is copied
        Raises  RunError if the run folder can't be written here, or holds checkpoints that rank 0 doesn't go on from
        """
        self._run, self._world, self._keep, self._beside = run, world, keep, beside
        self._shapes = {name: list(shape) for name, shape in shapes.items()}
        self._keepers = keepers(world, run)
        self._keeps = self._keepers[world.rank] == world.rank
        if self._keeps and not world.leads:
            _settle(run, start)
        self._thread: threading.Thread | None = None
        self._error: Exception | None = None
        self._done = True

    def save(self, step: int, parts: Mapping[str, Part], *, num_updates: int, progress: Mapping[str, Any]) -> None:
        """Save what decides the step after `step`; the caller may change the tensors when this is back.

        parts        this rank's of each tensor, by name
        num_updates  of the optimizer
        progress     what else decides the next step, rank 0's; anything JSON can hold
        Raises       RunError for this save or the one before, as `check`
        """
        self.wait()
        parts = dict(sorted(parts.items()))
        if self._beside:
            parts = {name: Part(part.total, part.start, _copied(part.local)) for name, part in parts.items()}
        state = {
            "step": step,
            "progress": dict(progress),
            "rng": rng_state(),
            "num_updates": num_updates,
            "shapes": self._shapes,
            "ranks": self._world.size,
        }
        one = _Save(step, parts, state)
        if not self._beside:
            with self._world.busy("saving"):
                self._write(one)
            return
        self._done = False
        self._thread = threading.Thread(target=self._write_beside, args=(one,), daemon=True)
        self._thread.start()

    def check_room(self, parts: Mapping[str, Part]) -> None:
        """Raises RunError where a disk couldn't hold even one checkpoint of the ranks that write there.

        What a save that was killed left behind is removed first.
        """
        if self._keeps:
            sweep(self._run)
        need: Counter[int] = Counter()
        for rank, num_bytes in enumerate(self._world.gather_beside(_num_bytes(parts))):
            need[self._keepers[rank]] += num_bytes
        if self._keeps and (free := shutil.disk_usage(self._run).free) < need[self._world.rank]:
            raise RunError(
                f"{self._run}: this host's part of a checkpoint needs {human_bytes(need[self._world.rank])} and the "
                f"disk has {human_bytes(free)} free; free some space or choose another `output`"
            )

    def check(self) -> None:
        """Raises RunError if a save has failed meanwhile: PeerError where it was another rank's."""
        if self._error is not None:
            error, self._error = self._error, None
            raise error
        if self._thread is not None and not self._done and not self._thread.is_alive():
            raise RunError("the thread that saved the checkpoint has ended; it has said why")

    def wait(self) -> None:
        """Back when nothing is being saved any more. Raises as `check`."""
        if self._thread is not None:
            with self._world.busy("saving"):
                while self._thread.is_alive():  # a wait without an end would not hear a second Ctrl-C
                    self._thread.join(_POLL_S)
        self.check()
        self._thread = None

    def _write_beside(self, one: _Save) -> None:
        try:
            self._write(one)
            self._done = True
        except (UserError, OSError, RuntimeError, *_OUR_FAULTS) as error:  # `check` raises it where it is heard
            self._error = error

    def _write(self, one: _Save) -> None:
        place = checkpoint_path(self._run, one.step)
        partial = partial_path(place)
        try:
            ranges = self._all(one, lambda: self._begin(place, ranges_of(one.parts)))
            files = self._all(one, lambda: self._own_file(partial, one, ranges))
            state = json.dumps(one.state, allow_nan=False)
            state = self._world.gather_beside(state if self._world.leads else None)[0]
            self._all(one, lambda: self._complete(partial, one, ranges, files, state))
        except RunError:
            # rank 0 may have renamed its folder by now: what is whole on another disk is taken up on resume
            if self._keeps and (self._world.leads or verify(partial, ()) is not None):
                shutil.rmtree(partial, ignore_errors=True)
            raise
        self._all(one, lambda: self._commit(place, self._world.leads))
        self._all(one, lambda: self._commit(place, self._keeps and not self._world.leads))

    def _all(self, one: _Save, act: Callable[[], Any]) -> list[Any]:
        """What `act` (JSON) gave on every rank. Raises RunError on all of them where it failed on one."""
        problem, mine = None, None
        try:
            mine = act()
        except (OSError, RuntimeError) as error:
            problem = str(self._failure(one, error))
        said = self._world.gather_beside([problem, mine])
        if problem is not None:
            raise RunError(problem)
        for rank, (theirs, _) in enumerate(said):
            if theirs is not None:
                raise self._world.because_of(rank, theirs)
        return [found for _, found in said]

    def _failure(self, one: _Save, error: OSError | RuntimeError) -> RunError:
        cause = next((e for e in (error, error.__cause__, error.__context__) if isinstance(e, OSError)), error)
        place = checkpoint_path(self._run, one.step)
        what, need = f"its part of the checkpoint {place}", _num_bytes(one.parts)
        return storage_error(cause, saving=what, need=need, safe=checkpoint_paths(self._run))

    def _begin(self, place: Path, ranges: list[tuple[int, int]]) -> list[tuple[int, int]]:
        if self._keeps:
            place.parent.mkdir(parents=True, exist_ok=True)
            sweep(self._run)
            partial_path(place).mkdir()
        return ranges

    def _own_file(self, partial: Path, one: _Save, ranges: list[Any]) -> Any:
        """Which pieces are where in this rank's file; the file's name, size and sha256."""
        written = write_part(partial, self._world.rank, one.parts, ranges)
        names = sorted({file for _, _, file, _, _ in written})
        host = socket.gethostname()
        return [written, {n: entry_of(partial / n) | {"rank": self._world.rank, "host": host} for n in names}]

    def _complete(self, partial: Path, one: _Save, ranges: list[Any], files: list[Any], state: str) -> None:
        if not self._keeps:
            return
        form = {name: (part.total, part.local.dtype) for name, part in one.parts.items()}
        write_metadata(partial, form, ranges, [written for written, _ in files])
        (partial / STATE).write_text(state)
        sync_to_disk(partial / STATE)
        first = {"rank": 0, "host": files[0][1].get("__0_0.distcp", {}).get("host", "rank 0's host")}
        entries = {name: entry_of(partial / name) | first for name in (METADATA, STATE)}
        for _, of_rank in files:
            entries |= of_rank
        write_manifest(partial, one.step, entries, ranks=self._world.size)

    def _commit(self, place: Path, mine: bool) -> None:
        if mine:
            os.rename(partial_path(place), place)
            sync_to_disk(place.parent)
            prune(self._run, self._keep)


def _settle(run: Path, start: int) -> None:
    """On another disk than rank 0's: what is there of steps after the one that the run goes on from is of no use."""
    beyond = [path for path in checkpoint_paths(run) if step_of(path) > start]
    if beyond and not start:
        raise RunError(
            f"{run}: rank 0 begins at step 0, and the folder on this host holds {beyond[-1].name} of a run\n"
            "  next: choose another `output`, or move it away; to go on with that run, start rank 0 on the host that "
            "has the whole run folder"
        )
    for path in beyond:
        set_aside(path)


def _num_bytes(parts: Mapping[str, Part]) -> int:
    return sum(part.local.nbytes for part in parts.values())


def _copied(local: Tensor) -> Tensor:
    """A copy in the machine's memory."""
    return local.cpu() if local.is_cuda else local.clone()
