"""Adapters of runs that go on training: a newer checkpoint is taken up while the server runs.

```text
RUN/checkpoints/step-* --every 2 s: a newer one?--> manifest, sha256, tensors, finite --> Worker.replace
```
A checkpoint appears whole, by one rename (train/state.py), so what can be seen can be read. One that is bad all the
same (a failing disk, a copy that broke off) leaves what is served as it is, and is told once; so is one whose numbers
aren't finite. An older one that is whole and still newer than what is served is taken instead.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from safetensors import SafetensorError

from ossia.errors import AdapterError, UserError
from ossia.model.lora import Lora
from ossia.model.peft import ADAPTER_IN_RUN, find_adapter
from ossia.train.state import MANIFEST, TRAINABLE, checkpoint_paths, step_of, verify
from ossia.web.metrics import Metrics
from ossia.web.worker import Worker

log = logging.getLogger("ossia.web")
EVERY_S = 2.0
_NONE_YET = "the run has saved no checkpoint yet; until the first one the model answers without an adapter"


class _Stamp(NamedTuple):
    """What tells a checkpoint from another one in its place: a run that was begun again has the same steps."""

    step: int
    written_ns: int


class RunAdapter:
    """The adapter of a run folder, as its checkpoints come.

    load     reads an adapter from a folder that `find_adapter` gives, into the CPU's memory; raises AdapterError
    step     of the checkpoint that was read last; None: none yet, or the final adapter of a run without checkpoints
    problem  why the newest checkpoint is not the one that was read, or that there is none; None: all is well
    """

    def __init__(self, name: str, run: Path, load: Callable[[Path], Lora]) -> None:
        self.name, self.run, self._load = name, run, load
        self.step: int | None = None
        self.problem: str | None = None
        self._read_stamp: _Stamp | None = None
        self._bad: dict[_Stamp, str] = {}
        self._has_none = False

    @property
    def num_bad(self) -> int:
        """Checkpoints that could not be used, so far."""
        return len(self._bad)

    def first(self) -> Lora | None:
        """The newest checkpoint's that can be used, or else the run's final adapter; None: the run has neither yet.

        Raises  AdapterError if there are checkpoints and none of them can be used
        """
        lora = self.newer()
        if lora is not None:
            return lora
        if (self.run / ADAPTER_IN_RUN).is_dir():
            return self._load(find_adapter(self.run))
        if self.num_bad:
            raise AdapterError(f"{self.problem}\n  next: mend or remove it; there is no other checkpoint in {self.run}")
        self._has_none = True
        self.problem = _NONE_YET
        log.info("adapter %s: %s: %s", self.name, self.run, self.problem)
        return None

    def newer(self) -> Lora | None:
        """A newer one than was read last, or None. A checkpoint that can't be used is told once."""
        lora, problem = self._newer()
        self._has_none = self._has_none and lora is None
        self.problem = _NONE_YET if self._has_none and problem is None else problem
        return lora

    def _newer(self) -> tuple[Lora | None, str | None]:
        """The newer one, if there is any, and why it isn't the newest of all."""
        found = checkpoint_paths(self.run)
        newest = max(map(step_of, found), default=0)
        why: str | None = None
        for path in reversed(found):
            stamp = _stamp_of(path)
            is_older = self.step is not None and step_of(path) < self.step <= newest
            if stamp is None or stamp == self._read_stamp or is_older:
                break
            if stamp not in self._bad:
                lora, problem = self._try(path)
                if lora is not None:
                    self.step, self._read_stamp = stamp.step, stamp
                    return lora, why
                if not path.is_dir():
                    return None, why  # the run has removed it meanwhile: there is a newer one
                self._bad[stamp] = f"{path}: {problem}"
                stays = "" if self.step is None else f"; step {self.step} stays"
                log.warning("adapter %s: %s%s", self.name, self._bad[stamp], stays)
            why = why or self._bad[stamp]
        return None, why

    def _try(self, path: Path) -> tuple[Lora | None, str | None]:
        """The adapter of a checkpoint, or what is wrong with it."""
        try:
            problem = verify(path, (TRAINABLE,))
            if problem is not None:
                return None, problem
            lora = self._load(path)
        except (UserError, OSError, SafetensorError, MemoryError) as error:
            return None, str(error)
        if not all(bool(tensor.isfinite().all()) for tensor in lora.trainable.tensors.values()):
            return None, "not all of its numbers are finite"
        return lora, None


def _stamp_of(path: Path) -> _Stamp | None:
    """None for a folder that is gone; one without a manifest has a stamp too, and is found to be bad."""
    try:
        manifest = path / MANIFEST
        return _Stamp(step_of(path), (manifest if manifest.exists() else path).stat().st_mtime_ns)
    except FileNotFoundError:
        return None


class Follower:
    """A thread that looks for newer checkpoints, and hands them to the engines that serve them."""

    def __init__(
        self, followed: Sequence[tuple[RunAdapter, Worker]], metrics: Metrics, *, every_s: float = EVERY_S
    ) -> None:
        self._followed, self._metrics, self._every_s = list(followed), metrics, every_s
        self._ending = threading.Event()
        self._thread = threading.Thread(target=self._main, name="ossia-follow", daemon=True)

    def start(self) -> None:
        """Start the thread, if there is anything to follow."""
        if self._followed:
            self._thread.start()

    def stop(self) -> None:
        """End it, and wait for it."""
        self._ending.set()
        if self._followed:
            self._thread.join()

    def _main(self) -> None:
        while not self._ending.wait(self._every_s):
            for run, worker in self._followed:
                before = run.num_bad
                lora = run.newer()
                for _ in range(run.num_bad - before):
                    self._metrics.bad_checkpoint(run.name)
                if lora is not None:
                    assert run.step is not None
                    worker.replace(run.name, lora, run.step)
