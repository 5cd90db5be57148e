"""`ossia train` by ranks over which all weights are cut: saves that take long, or fail, beside training."""

from __future__ import annotations

import errno
import os
import re
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from ossia.train.shards.save import Saver
from ossia.train.state import checkpoint_paths, verify
from tests.train.ranks.conftest import MakeRecipe
from tests.train.ranks.support import Ranks
from tests.train.ranks.test_faults import steps_written

CUT = ("parallel.shard=all", "eval.split=0", "eval.every=0")


class _Saves:
    """A rank's file takes so many seconds to be written; or, from rank 1, the disk is full then.

    heard  the rank that looks whether its save has failed; the other one has just looked. None: both
    """

    def __init__(self, seconds: float, *, full: bool = False, heard: int | None = None) -> None:
        self.seconds, self.full, self.heard = seconds, full, heard

    @contextmanager
    def __call__(self, rank: int) -> Iterator[None]:
        own = Saver._own_file

        def slow(saver: Saver, *what: object) -> object:
            time.sleep(self.seconds)
            if self.full and rank == 1:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return own(saver, *what)

        Saver._own_file = slow
        if self.heard not in (None, rank):
            Saver.check = lambda saver: None
        yield


def test_the_end_and_a_request_to_stop_wait_for_the_save_under_way(train_into: MakeRecipe, tmp_path: Path) -> None:
    ends = train_into(tmp_path / "ends", *CUT, "train.steps=2", adapter=None)
    stops = train_into(tmp_path / "stops", *CUT, "train.steps=500", "train.save_every=400", adapter=None)
    groups = [Ranks(2, tmp_path / f"said-{n}", *a, trouble=_Saves(1.5)) for n, a in enumerate((ends, stops))]
    end = time.monotonic() + 60
    while steps_written(tmp_path / "stops") < 2:
        assert time.monotonic() < end
        time.sleep(0.02)
    groups[1].signal(signal.SIGINT, [0])
    assert [group.wait(asks=False) for group in groups] == [[0, 0], [130, 130]], [group.said(0) for group in groups]
    step = int(re.findall(r"stopped after step (\d+), saved; to go on", groups[1].said(0))[0])
    for run, last in ((tmp_path / "ends", 2), (tmp_path / "stops", step)):
        assert [path.name for path in checkpoint_paths(run)] == [f"step-{last:08d}"]
        assert verify(checkpoint_paths(run)[0]) is None


@pytest.mark.parametrize("heard", [None, 0, 1])
def test_a_save_that_fails_beside_training_ends_it_at_the_next_step(
    heard: int | None, train_into: MakeRecipe, tmp_path: Path
) -> None:
    """Long before the next save, which would hear of it too."""
    arguments = train_into(tmp_path / "run", *CUT, "train.steps=500", "train.save_every=20", adapter=None)
    ranks = Ranks(2, tmp_path / "said", *arguments, trouble=_Saves(0.1, full=True, heard=heard))
    assert ranks.wait(asks=False) == [2, 2]
    words = r"^rank 1, step \d+: can't save its part of the checkpoint .*step-00000020: No space left on device$"
    assert re.search(words, ranks.said(1), re.M), ranks.said(1)
    assert re.search(r"^rank 0, step \d+: stopped, as rank 1 has said: ", ranks.said(0), re.M), ranks.said(0)
    assert 20 <= steps_written(tmp_path / "run") < 38
    assert list((tmp_path / "run" / "checkpoints").iterdir()) == []
