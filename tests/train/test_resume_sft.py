"""kill -9 and --resume of real fine-tuning: a tiny gpt-oss checkpoint, LoRA with dropout, conversations from a file."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.train.conftest import Outcome, RecipeFor, in_process, outcome

PLACES = [("after an update", 1), ("half a tensor file", 3), ("before a rename", 3), ("half an event", 9)]


@pytest.mark.parametrize(("kind", "number"), PLACES)
def test_fine_tuning_killed_and_resumed_ends_in_the_same_bits(
    kind: str, number: int, recipe_for: RecipeFor, untouched: Outcome, tmp_path: Path
) -> None:
    recipe = recipe_for(tmp_path / "run")
    assert in_process(recipe, kind, number) == -signal.SIGKILL
    assert in_process(recipe, resume=True) == 0
    assert outcome(tmp_path / "run") == untouched


def test_the_command_line_resumes_what_was_killed(recipe_for: RecipeFor, untouched: Outcome, tmp_path: Path) -> None:
    recipe = recipe_for(tmp_path / "run")
    assert in_process(recipe, "after a rename", 2) == -signal.SIGKILL
    command = [sys.executable, "-m", "ossia", "train", str(recipe), "--resume"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "going on from step 4" in done.stderr
    assert outcome(tmp_path / "run") == untouched
