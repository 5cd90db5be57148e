"""Ctrl-C in a terminal while `ossia train` runs there: what it says is true, and what it says to type goes on."""

from __future__ import annotations

import re
import shlex
import sys
import time
from pathlib import Path

from tests.e2e.conftest import ROOT
from tests.e2e.terminal import Terminal, terminal
from tests.train.conftest import Outcome, RecipeFor, outcome

# `ossia` on a disk that stands still while a file named `hold` is there and a checkpoint is being written.
START = [
    sys.executable,
    "-c",
    f"""import glob, os, sys, time
sys.path.insert(0, {str(ROOT)!r})
folder, flush = sys.argv.pop(1), os.fsync
def wait_and_flush(handle):
    while os.path.exists(f"{{folder}}/hold") and glob.glob(f"{{folder}}/run/checkpoints/.partial-*"):
        time.sleep(0.05)
    flush(handle)
os.fsync = wait_and_flush
from ossia.cli import main
main()""",
]


def press_ctrl_c_while_it_saves(screen: Terminal, folder: Path, step: int, times: int) -> None:
    partial, end = folder / "run" / "checkpoints" / f".partial-step-{step:08d}", time.monotonic() + 60
    while not partial.is_dir():
        assert time.monotonic() < end
        time.sleep(0.02)
    screen.type("\x03")
    screen.wait_for("finishing this step, then saving; once more to stop at once")
    if times == 2:
        screen.type("\x03")
        screen.wait_for("stopped at once, ")
    (folder / "hold").unlink()


def go_on(screen: Terminal) -> list[str]:
    """The arguments of `ossia` in the command that the program says goes on."""
    command = re.search(r"to go on: ossia (.*)\n", screen.wait_for("--resume\n"))
    assert command
    return shlex.split(command[1])


def test_ctrl_c_saves_and_a_second_one_stops_at_once_and_what_is_said_goes_on_to_the_same_bytes(
    recipe_for: RecipeFor, untouched: Outcome, tmp_path: Path
) -> None:
    run, hold = tmp_path / "run", tmp_path / "hold"
    hold.touch()
    with terminal(tmp_path, "train", recipe_for(run), start=START) as screen:
        press_ctrl_c_while_it_saves(screen, tmp_path, 2, times=1)
        screen.wait_for("stopped after step 2, saved; ")
        command = go_on(screen)
        assert screen.exit_code() == 130
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["step-00000002"]
    hold.touch()
    with terminal(tmp_path, *command, start=START) as screen:
        screen.wait_for("going on from step 2")
        press_ctrl_c_while_it_saves(screen, tmp_path, 4, times=2)
        screen.wait_for("the checkpoint of step 2 is whole; ")
        assert go_on(screen) == command
        assert screen.exit_code() == 130
    assert (run / "checkpoints" / "step-00000002").is_dir()
    assert not (run / "checkpoints" / "step-00000004").exists()
    with terminal(*command) as screen:
        screen.wait_for("going on from step 2")
        screen.wait_for(str(run))
        screen.wait_for("report.html")
        screen.wait_for(f"{run}\n")
        assert screen.exit_code() == 0
    assert "Traceback" not in screen.seen
    assert outcome(run) == untouched
