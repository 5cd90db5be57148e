"""The guard against slowdowns, at a tiny size: two checkouts of this repository really train and generate."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.guard import Ratio

ROOT = Path(__file__).parents[1]


def test_a_ratio_is_the_median_of_pairs_that_ran_together() -> None:
    assert Ratio.of("train", [(1.0, 1.1), (2.0, 2.0), (4.0, 6.0)]) == Ratio("train", 1.1, 1.0, 1.5)


def test_a_commit_is_not_slower_than_itself_and_any_ratio_is_above_none() -> None:
    if subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, check=False).returncode:
        pytest.skip("not a git checkout")
    sizes = {"shape": "demo", "steps": 1, "tokens": 512, "prompts": 1, "answer": 2, "repeats": 1, "most": 0.01}
    options = [word for name, value in sizes.items() for word in (f"--{name}", str(value))]
    words = [sys.executable, "-m", "benchmarks.guard", "HEAD", "HEAD", "--no-warmup", *options]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 1, done.stderr
    assert done.stdout.startswith("new / old       median of 1, least to largest\ntrain           ")
    assert "slower by more than" in done.stderr
    assert "a training step" in done.stderr
    left = subprocess.run(["git", "worktree", "list"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert "/old" not in left
