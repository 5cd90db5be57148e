"""The loop around the step: data, step, events, held-out loss, checkpoints, until all is done or someone stops it.

It knows no algorithm. A story (SFT, RL) brings a `Job`: how to get data, how to take a step, what to save. Nothing but
the saved state (trained tensors, optimizer, data position, random generators) decides step n + 1; the clock and the
memory meter are arguments and only reported. So a run that was killed at any moment and resumed ends in the same bits.

```python
with EventLog(run) as log:                                   # also the lock on the run folder
    saved = find_start(run, resume=resume, say=say)
    log.add(TerminalSink(steps, step=saved.step if saved else 0))
    result = run_loop(job, log, saved)
```
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, Protocol, Self

from torch import Tensor

from ossia.errors import Interrupted, RunError
from ossia.train.events import EVENTS, Log, read_events
from ossia.train.optim import AdamW
from ossia.train.ranks.agree import agree, restore, tensors_identity
from ossia.train.shards.run import CutRun
from ossia.train.state import (
    SavedState,
    check_room,
    checkpoint_path,
    checkpoint_paths,
    newest_checkpoint,
    prune,
    save_checkpoint,
    step_of,
)

if TYPE_CHECKING:
    from ossia.train.ranks.world import World

_STDERR = 2


class Stream(Protocol):
    """An endless or finite source of steps whose position can be saved."""

    def next_step(self) -> list[Any]:
        """What the next step trains on; empty once there is nothing left."""

    def state(self) -> dict[str, Any]:
        """The position, as JSON."""

    def load_state(self, state: dict[str, Any]) -> None:
        """Go on from a position that `state` gave."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """Everything that the loop drives.

    run         the run folder
    steps       updates in all
    data        where each step's packs come from
    params      the trained tensors by name
    optimizer   of these parameters; `step` updates it
    lr_at       learning rate of step number 1..steps
    step        (packs, lr) -> the metrics of the step it took: loss, tokens, trained, grad_norm and whatever else
    evaluate    () -> metrics of the held-out data, at least eval_loss; None: there is none. Must not change any state.
    eval_every  steps between evaluations, the first one before step 1; 0: once, at the end
    save_every  steps between checkpoints; 0: once, at the end
    keep        checkpoints kept
    counts      () -> running counts of the data (rows skipped, samples dropped, ...), added to every step event
    about       what the start event says besides the number of steps
    resume_with the command that goes on with this run, told to whoever interrupts it
    clock       () -> seconds, never falling
    memory      () -> most bytes used so far
    world       the ranks that drive this job together, each with its own Job; rank 0 writes. None: this process alone
    shapes      of the trained tensors where `params` are parts of them, which are cut over the ranks
    async_save  such parts are copied and saved while training goes on
    """

    run: Path
    steps: int
    data: Stream
    params: Mapping[str, Tensor]
    optimizer: AdamW
    lr_at: Callable[[int], float]
    step: Callable[[list[Any], float], Mapping[str, float]]
    evaluate: Callable[[], Mapping[str, float]] | None
    eval_every: int
    save_every: int
    keep: int
    counts: Callable[[], Mapping[str, int]]
    about: Mapping[str, Any]
    resume_with: str
    clock: Callable[[], float]
    memory: Callable[[], int]
    world: World | None = None
    shapes: Mapping[str, Sequence[int]] | None = None
    async_save: bool = True

    @property
    def leads(self) -> bool:
        """Whether this process writes the run folder."""
        return self.world is None or self.world.leads


@dataclass(frozen=True, slots=True)
class LoopResult:
    """How far the run got (less than its steps where the data ended first) and its last checkpoint."""

    step: int
    checkpoint: Path


Newest = Callable[[Path, Callable[[str], None]], SavedState | None]


def find_start(
    run: Path, *, resume: bool, say: Callable[[str], None], newest: Newest = newest_checkpoint
) -> SavedState | None:
    """The checkpoint to go on from, or None to begin at step 0; call it with the run's EventLog open.

    With `resume`, the newest checkpoint that is whole; a run that was stopped before its first one begins again.
    Raises RunError if there are checkpoints but no whole one, or if, without `resume`, the folder holds a run already:
    one that took a step. What a run left that was refused before its first is written over.
    """
    if resume:
        saved = newest(run, say)
        if saved is None:
            say(f"{run}: no checkpoint yet, starting from step 0")
            return None
        say(f"{run}: going on from step {saved.step}")
        there, written = (run / EVENTS).stat().st_size, saved.progress["events_bytes"]
        if there < written:
            say(
                f"{run / EVENTS}: {there:,} bytes, where the checkpoint of step {saved.step} was saved with "
                f"{written:,}: events before it are missing, and the report's curves with them"
            )
        return saved
    if checkpoint_paths(run) or any(event["event"] == "step" for event in read_events(run / EVENTS)):
        raise RunError(f"{run} already holds a run; add --resume to go on with it, or choose another `output`")
    return None


def run_loop(job: Job, log: Log, saved: SavedState | None) -> LoopResult:
    """Train from `saved` (None: from the start) to the last step, evaluating and saving on the way.

    SIGINT or SIGTERM lets the step at hand finish and saves; a second one stops at once.
    Raises Interrupted after either, with the command to go on; RunError from a step that can't be taken (see `AdamW`),
           from a full disk, or from a checkpoint that isn't of this run
    """
    cut = _cut_run(job, saved)
    step, evaluated, saved_at = _begin(job, log, saved, cut)
    last = job.steps
    with StopRequests(job.world) as stop:
        try:
            while True:
                if cut is not None:
                    cut.check()
                eval_due = job.evaluate is not None and _due(step, job.eval_every, last) and evaluated != step
                if eval_due and not stop.asked:
                    _evaluate(job, log, step)
                    evaluated, eval_due = step, False
                save_due = step > 0 and _due(step, job.save_every, last)
                if (save_due or stop.asked) and saved_at != step:
                    _save(job, log, step, evaluated, cut)
                    saved_at = step
                if cut is not None and (stop.asked or (step == last and not eval_due)):
                    cut.wait()
                if step == last and not eval_due:
                    return LoopResult(step, checkpoint_path(job.run, step))
                if stop.asked:
                    raise Interrupted(f"stopped after step {step}, saved; to go on: {job.resume_with}")
                if _take_step(job, log, step + 1):
                    step += 1
                else:
                    last = step
        except KeyboardInterrupt as error:
            if cut is not None:  # which may have been saving
                saved_at = next((step_of(path) for path in reversed(checkpoint_paths(job.run))), None)
            safe = f"the checkpoint of step {saved_at} is whole" if saved_at is not None else "nothing had been saved"
            todo = f"to go on: {job.resume_with}"
            raise Interrupted(f"stopped at once, during step {step + 1}; {safe}; {todo}") from error


def _cut_run(job: Job, saved: SavedState | None) -> CutRun | None:
    """What saves a job whose trained tensors are cut over the ranks; None of any other."""
    if job.shapes is None:
        return None
    assert job.world is not None
    start = 0 if saved is None else saved.step
    how = {"start": start, "keep": job.keep, "beside": job.async_save}
    return CutRun(job.run, job.world, job.params, job.optimizer, job.shapes, **how)


def _begin(job: Job, log: Log, saved: SavedState | None, cut: CutRun | None) -> tuple[int, int | None, int | None]:
    """Put everything where the run starts or goes on; the step done, the step evaluated last, the step saved last."""
    if job.leads and cut is None:
        check_room(job.run, job.params, job.optimizer)
    if saved is None:
        log.cut(0)
        log.write({"event": "start", "step": 0, "steps": job.steps, **job.about})
        return 0, None, None
    if saved.step > job.steps:
        raise RunError(
            f"{saved.path} is past train.steps ({job.steps}); a run keeps its length: put it back, or start another run"
        )
    if cut is not None:
        cut.restore(saved)
    elif job.world is None:
        saved.restore(job.params, job.optimizer)
    else:
        restore(job.world, saved, job.params, job.optimizer)
    job.data.load_state(saved.progress["data"])
    log.cut(saved.progress["events_bytes"])
    if job.leads:
        prune(job.run, job.keep)
    return saved.step, saved.progress["evaluated"], saved.step


def _due(step: int, every: int, last: int) -> bool:
    return step == last or (every > 0 and step % every == 0)


def _take_step(job: Job, log: Log, step: int) -> bool:
    """Take step number `step` and write its event; False if the data has ended."""
    if job.world is not None:
        job.world.step = step
    started = job.clock()
    packs = job.data.next_step()
    if not packs:
        return False
    lr = job.lr_at(step)
    metrics = job.step(packs, lr)
    of_ranks = {} if job.world is None else {"rank_peak_bytes": job.world.end_of_step(job.memory())}
    step_s = job.clock() - started
    log.write(
        {
            "event": "step",
            "step": step,
            **metrics,
            "tokens_per_s": metrics["trained"] / step_s if step_s > 0 else 0.0,
            "step_s": step_s,
            "lr": lr,
            "peak_bytes": job.memory(),
            **of_ranks,
            **job.counts(),
        }
    )
    return True


def _evaluate(job: Job, log: Log, step: int) -> None:
    assert job.evaluate is not None
    started = job.clock()
    metrics = job.evaluate()
    log.write({"event": "eval", "step": step, **metrics, "eval_s": job.clock() - started})


def _save(job: Job, log: Log, step: int, evaluated: int | None, cut: CutRun | None) -> None:
    if cut is not None:  # of each tensor there is one copy, so that none can drift apart
        agree(job.world, {"number of updates": str(job.optimizer.num_updates)})
        cut.save(step, _progress(job, log, evaluated))
        return
    if job.world is not None:
        agree(job.world, {"trained tensors (a checksum)": tensors_identity(job.params)})
        if not job.leads:
            return
    with nullcontext() if job.world is None else job.world.busy("saving"):
        progress = _progress(job, log, evaluated)
        save_checkpoint(
            job.run, step=step, params=job.params, optimizer=job.optimizer, progress=progress, keep=job.keep
        )


def _progress(job: Job, log: Log, evaluated: int | None) -> dict[str, Any]:
    # The events first: a checkpoint must never be ahead of them.
    return {"events_bytes": log.sync(), "evaluated": evaluated, "data": job.data.state()}


class StopRequests:
    """While entered, the first SIGINT or SIGTERM is a request to stop; the second raises KeyboardInterrupt.

    Ranks stop together: what one was asked, all know at the end of a step.
    Outside the main thread, where Python delivers no signals, nothing is caught.
    """

    def __init__(self, world: World | None = None) -> None:
        self._heard, self._world = False, world
        self._before: dict[int, Any] = {}
        if world is not None:
            world.hurried = lambda: self._heard

    @property
    def asked(self) -> bool:
        return self._heard if self._world is None else self._world.stop_agreed

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._ask) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        if self._heard:
            raise KeyboardInterrupt
        self._heard = True
        if self._world is not None and not self._world.leads:
            return
        # Not through a file object: the signal may have come in the middle of a write to it.
        os.write(_STDERR, b"\nfinishing this step, then saving; once more to stop at once\n")
