"""Where a run's events are shown: the terminal, and optionally TensorBoard, Weights & Biases and Trackio.

All of them hear exactly what events.jsonl holds, and none decides anything. The three packages are optional; each is
imported when a recipe asks for it under `log.sinks`.
"""

from __future__ import annotations

import importlib
import sys
import uuid
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, TextIO

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from ossia.errors import MissingExtraError
from ossia.train.events import Event, Sink, fullest
from ossia.train.state import human_bytes

_WINDOW_STEPS = 20
_PLAIN_EVERY_S = 10.0


def open_sinks(names: Sequence[str], run: Path, config: dict[str, Any], *, step: int = 0) -> list[Sink]:
    """The sinks of a recipe's `log.sinks`, for a run that goes on after `step`.

    config  the resolved recipe as plain JSON types
    Raises  MissingExtraError if the package of one isn't installed
    """
    kinds = {"tensorboard": TensorBoardSink, "wandb": WandbSink, "trackio": TrackioSink}
    return [kinds[name](run, config, step=step) for name in names]


def check_sinks(names: Sequence[str]) -> None:
    """Raises MissingExtraError if the package of a sink isn't installed, before anything is written."""
    for name in names:
        _optional(name)


class TensorBoardSink:
    """Scalars under RUN/tensorboard, `train/loss` and so on."""

    def __init__(self, run: Path, config: dict[str, Any], *, step: int) -> None:
        _optional("tensorboard")
        writer = _optional("torch.utils.tensorboard", extra="tensorboard").SummaryWriter
        # On resume, what an earlier process wrote for steps that will be taken again is hidden by TensorBoard itself.
        self._writer = writer(str(run / "tensorboard"), purge_step=step + 1 if step else None)

    def write(self, event: Event) -> None:
        for name, value in scalars(event).items():
            self._writer.add_scalar(name, value, event["step"])
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


class WandbSink:
    """A run in the project `ossia`, named as the folder; a resumed run goes on under the same id."""

    def __init__(self, run: Path, config: dict[str, Any], *, step: int) -> None:
        self._run = _optional("wandb").init(
            project="ossia", name=run.name, id=_run_id(run), dir=run, config=config, resume="allow"
        )

    def write(self, event: Event) -> None:
        self._run.log(scalars(event), step=event["step"])

    def close(self) -> None:
        self._run.finish()


class TrackioSink:
    """A run in the Trackio project `ossia`, named as the folder and a short id."""

    def __init__(self, run: Path, config: dict[str, Any], *, step: int) -> None:
        name = f"{run.name}-{_run_id(run)[:8]}"
        self._run = _optional("trackio").init(project="ossia", name=name, config=config, resume="allow")

    def write(self, event: Event) -> None:
        self._run.log(scalars(event), step=event["step"])

    def close(self) -> None:
        self._run.finish()


def scalars(event: Event) -> dict[str, float]:
    """The numbers of a step or eval event by the names that sinks show: `train/loss`, `eval/loss`."""
    group = {"step": "train", "eval": "eval"}.get(event["event"])
    numbers = {key: value for key, value in event.items() if isinstance(value, int | float) and key != "step"}
    return {f"{group}/{key.removeprefix('eval_')}": value for key, value in numbers.items()} if group else {}


def _optional(module: str, extra: str = "") -> ModuleType:
    """Import an optional package. Raises MissingExtraError with the line that installs it."""
    extra = extra or module
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise MissingExtraError(
            f"log.sinks: {extra} needs a package that isn't installed ({error})\n"
            f"  next: pip install 'ossia[{extra}]', or take {extra} out of log.sinks"
        ) from error


def _run_id(run: Path) -> str:
    """A name for this run that no other has, the same whenever it is resumed; kept in RUN/.run-id."""
    path = run / ".run-id"
    run.mkdir(parents=True, exist_ok=True)
    if not path.exists():
        path.write_text(uuid.uuid4().hex)
    return path.read_text()


class TerminalSink:
    """One line that follows the run: a progress bar in a terminal, plain lines now and then anywhere else."""

    def __init__(self, steps: int, *, step: int = 0, file: TextIO | None = None, width: int | None = None) -> None:
        """For a run of `steps` steps that goes on after `step`.

        file   where to write; None: standard error
        width  in columns; None: the terminal's own
        """
        file = file or sys.stderr
        self._steps, self._step = steps, step
        self._held_out: float | None = None
        self._alarm: str | None = None
        self._recent: deque[tuple[float, int]] = deque(maxlen=_WINDOW_STEPS)
        self._since_line_s = _PLAIN_EVERY_S
        self._console = Console(file=file, width=width, highlight=False, soft_wrap=not file.isatty())
        self._bar: Progress | None = None
        if self._console.is_terminal:
            counted, now = TextColumn("step {task.completed}/{task.total}"), TextColumn("{task.fields[now]}")
            # Refreshed by events only: no thread beside the training.
            self._bar = Progress(
                counted, BarColumn(16), now, console=self._console, auto_refresh=False, redirect_stdout=False
            )
            self._task = self._bar.add_task("", total=steps, completed=step, now="starting")
            self._bar.start()

    def write(self, event: Event) -> None:
        """See Sink."""
        if event["event"] == "eval":
            name, value = ("loss", event.get("eval_loss")) if "eval_loss" in event else ("reward", event["eval_reward"])
            self._held_out = value
            if self._bar is None:
                self.say(f"step {event['step']}/{self._steps}  held-out {name} {value:.4f}")
        if event["event"] == "step":
            self._write_step(event)

    def _write_step(self, event: Event) -> None:
        self._step = event["step"]
        self._recent.append((event["step_s"], event["trained"]))
        self._since_line_s += event["step_s"]
        if "alarm" in event and event["alarm_kind"] != self._alarm:  # once, not at every step that it goes on for
            self.say(f"step {self._step}: {event['alarm']}")
        self._alarm = event.get("alarm_kind")
        if self._bar is not None:
            self._bar.update(self._task, completed=self._step, now=self._now(event))
            self._bar.refresh()
        elif self._since_line_s >= _PLAIN_EVERY_S or self._step == self._steps:
            self._since_line_s = 0.0
            self.say(f"step {self._step}/{self._steps}  {self._now(event)}")

    def _now(self, event: Event) -> str:
        """Loss, held-out loss once there is one, trained tokens/s, memory, time left."""
        seconds, trained = (sum(column) for column in zip(*self._recent, strict=True))
        held_out = "" if self._held_out is None else f" (held-out {self._held_out:.4f})"
        speed = trained / seconds if seconds else 0.0
        left = human_time((self._steps - self._step) * seconds / len(self._recent))
        most, whose = fullest(event)
        memory = human_bytes(most) + (f" ({whose})" if whose else "")
        name = "reward" if "answer_tokens" in event else "loss"
        value = f"{event[name]:.4f}" if name in event else "none"  # of a step whose samples all failed
        return f"{name} {value}{held_out}  {speed:,.0f} tok/s  {memory}  {left} left"

    def say(self, text: str) -> None:
        """Print a message of the run above the bar."""
        self._console.print(text, markup=False)

    def close(self) -> None:
        """Leave the last state of the bar on the screen, and the terminal as it was."""
        if self._bar is not None:
            self._bar.stop()


def human_time(seconds: float) -> str:
    """A duration for people: 42s, 3m 12s, 5h 07m."""
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes}m {rest:02}s" if minutes else f"{rest}s"
    return f"{minutes // 60}h {minutes % 60:02}m"
