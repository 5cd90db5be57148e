"""What happens to machines, done to ranks: nothing accepted is corrupt, little is lost, the error says who and when."""

from __future__ import annotations

import errno
import json
import os
import random
import re
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from ossia.model.transformer import Transformer
from ossia.train.optim import AdamW
from ossia.train.ranks import agree
from ossia.train.state import checkpoint_paths, verify
from tests.train.conftest import Outcome, outcome
from tests.train.ranks.conftest import MakeRecipe
from tests.train.ranks.support import Ranks, Suffers

SAVE_EVERY = 2
PLACES = (  # rank, kind of call, which one
    (1, "before a sum", 4),
    (1, "before words", 9),
    (1, "after an update", 4),
    (0, "half a tensor file", 3),
    (0, "after a rename", 2),
    (0, "half an event", 7),
)


@pytest.fixture(scope="module")
def untouched(train_into: MakeRecipe, tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    folder = tmp_path_factory.mktemp("untouched")
    assert Ranks(2, folder / "said", *train_into(folder / "run")).wait() == [0, 0]
    files, events = outcome(folder / "run")
    assert len(files) == 7  # the adapter, and three of each of two checkpoints
    return files, events


def steps_written(run: Path) -> int:
    """The last step whose event is whole."""
    file = run / "events.jsonl"
    lines = file.read_bytes().splitlines(keepends=True) if file.is_file() else []
    steps = [json.loads(line) for line in lines if line.endswith(b"\n")]
    return max((event["step"] for event in steps if event["event"] == "step"), default=0)


def check_saved(run: Path, late: int = 0) -> None:
    """Every checkpoint that is there is whole, and at most the steps since the last save are lost.

    late  steps that training goes on while it saves
    """
    saved = checkpoint_paths(run)
    assert [verify(path) for path in saved] == [None] * len(saved)
    newest = max((int(path.name.removeprefix("step-")) for path in saved), default=0)
    assert newest >= (steps_written(run) - 1) // SAVE_EVERY * SAVE_EVERY - late


@pytest.mark.parametrize(("rank", "kind", "number"), PLACES)
def test_a_rank_that_is_killed_ends_the_others_who_name_it_and_the_run_goes_on_to_the_same_bytes(
    rank: int, kind: str, number: int, train_into: MakeRecipe, untouched: Outcome, tmp_path: Path
) -> None:
    run, arguments = tmp_path / "run", train_into(tmp_path / "run")
    ranks = Ranks(2, tmp_path / "said", *arguments, trouble=Suffers(rank, kind, number))
    codes = ranks.wait()
    assert codes[rank] == -signal.SIGKILL
    assert codes[1 - rank] == 2
    error = ranks.said(1 - rank).splitlines()[-1]
    assert re.match(rf"rank {rank}, step \d: (gives no sign of life|is gone)", error), error
    check_saved(run)
    again = Ranks(2, tmp_path / "again", *arguments, "--resume")
    assert again.wait() == [0, 0], again.said(0)
    assert outcome(run) == untouched


def test_ranks_killed_at_random_moments_go_on_to_the_same_bytes(
    train_into: MakeRecipe, untouched: Outcome, tmp_path: Path
) -> None:
    kill_often(5, random.Random(2), train_into, untouched, tmp_path)


@pytest.mark.slow
def test_fifty_random_kills_leave_the_same_bytes(train_into: MakeRecipe, untouched: Outcome, tmp_path: Path) -> None:
    kill_often(50, random.Random(7), train_into, untouched, tmp_path)


def test_cut_ranks_killed_at_random_moments_go_on_to_the_same_bytes(train_into: MakeRecipe, tmp_path: Path) -> None:
    kill_cut_ranks_often(3, random.Random(5), train_into, tmp_path)


@pytest.mark.slow
def test_fifty_random_kills_of_cut_ranks_leave_the_same_bytes(train_into: MakeRecipe, tmp_path: Path) -> None:
    kill_cut_ranks_often(50, random.Random(9), train_into, tmp_path)


def kill_cut_ranks_often(least: int, chance: random.Random, train_into: MakeRecipe, folder: Path) -> None:
    """`kill_often` for ranks that train all weights, which are cut over them."""

    def arguments(run: Path) -> list[str]:
        return train_into(run, "parallel.shard=all", adapter=None)

    assert Ranks(2, folder / "said", *arguments(folder / "untouched")).wait() == [0, 0]
    untouched = outcome(folder / "untouched")
    assert sum(name.endswith(".distcp") for name in untouched[0]) == 4  # of two ranks, in two checkpoints
    kill_often(least, chance, arguments, untouched, folder, SAVE_EVERY)


def kill_often(
    least: int, chance: random.Random, train_into: MakeRecipe, untouched: Outcome, folder: Path, late: int = 0
) -> None:
    """Train to the end, killing on the way a rank alone, whose launcher ends the other, or both; run after run."""
    kills, number = 0, 0
    while kills < least:
        run, number, patience_s = folder / f"run-{number}", number + 1, 0.7
        while True:
            ranks = Ranks(2, folder / "said", *train_into(run), "--resume")
            end, patience_s = time.monotonic() + chance.uniform(0.2, patience_s), patience_s * 1.3
            while time.monotonic() < end and any(process.is_alive() for process in ranks.processes):
                time.sleep(0.01)
            if all(process.exitcode == 0 for process in ranks.processes):
                break
            assert not any(process.exitcode for process in ranks.processes), [ranks.said(rank) for rank in (0, 1)]
            kills += 1
            if chance.random() < 0.5:
                ranks.signal(signal.SIGKILL, [chance.randrange(2)])
                time.sleep(chance.uniform(0.0, 0.1))
            ranks.kill()
            check_saved(run, late)
        assert outcome(run) == untouched


@pytest.mark.parametrize(
    ("kind", "number", "shard"), [("before words", 5, "none"), ("before a sum", 5, "none"), ("before a sum", 13, "all")]
)
def test_a_rank_that_hangs_ends_the_job_within_the_timeout_and_is_named(
    kind: str, number: int, shard: str, train_into: MakeRecipe, tmp_path: Path
) -> None:
    arguments = train_into(tmp_path / "run", "parallel.timeout=4", f"parallel.shard={shard}")
    trouble = Suffers(1, kind, number, signal.SIGSTOP)
    began = time.monotonic()
    ranks = Ranks(3, tmp_path / "said", *arguments, trouble=trouble)
    ranks.processes[0].join(60)
    took = time.monotonic() - began
    ranks.processes[2].join(10)
    codes = [ranks.processes[rank].exitcode for rank in (0, 2)]
    ranks.kill()
    said = [ranks.said(rank) for rank in (0, 2)]
    assert codes == [2, 2], said
    assert took < 40
    named = [text for text in said if re.search(r"^rank 1, step \d: (gives no sign of life|is gone)", text, re.M)]
    words = r"^rank \d, step \d: stopped, as rank \d has said: rank 1, step \d"
    stopped = [text for text in said if re.search(words, text, re.M)]
    assert (len(named), len(stopped)) == (1, 1), said
    check_saved(tmp_path / "run")


def test_a_store_that_falls_silent_ends_every_rank_within_the_timeout(train_into: MakeRecipe, tmp_path: Path) -> None:
    """As when the connection to the first host is lost: nothing is refused, nothing is answered."""
    ranks = Ranks(2, tmp_path / "said", *train_into(tmp_path / "run", "parallel.timeout=3", "train.steps=500"))
    end = time.monotonic() + 60
    while steps_written(tmp_path / "run") < 3:
        assert time.monotonic() < end
        time.sleep(0.02)
    os.kill(ranks.store.pid, signal.SIGSTOP)
    assert ranks.wait(asks=False) == [2, 2]
    for rank in (0, 1):
        words = rf"^rank {rank}, step \d+: the store through which the ranks talk, .* out of reach: no answer for 3 s$"
        assert re.search(words, ranks.said(rank), re.M), ranks.said(rank)
    check_saved(tmp_path / "run")


class _Poisons:
    """One rank's activations turn to NaN in a step."""

    def __init__(self, rank: int, step: int) -> None:
        self.rank, self.call = rank, step

    @contextmanager
    def __call__(self, rank: int) -> Iterator[None]:
        if rank == self.rank:
            embed, calls = Transformer.embed, 0

            def poisoned(model: Transformer, ids: torch.Tensor) -> torch.Tensor:
                nonlocal calls
                calls += 1
                return embed(model, ids) * (float("nan") if calls >= self.call else 1.0)

            Transformer.embed = poisoned
        yield


@pytest.mark.parametrize("how", [{}, {"adapter": None, "shard": "all"}])
def test_a_rank_that_computes_nan_is_named_with_step_and_cause_and_nothing_is_updated(
    how: dict[str, str | None], train_into: MakeRecipe, tmp_path: Path
) -> None:
    keys = ("eval.split=0", "eval.every=0", "train.tokens_per_step=512", f"parallel.shard={how.pop('shard', 'none')}")
    arguments = train_into(tmp_path / "run", *keys, **how)
    ranks = Ranks(2, tmp_path / "said", *arguments, trouble=_Poisons(1, 4))
    assert ranks.wait(asks=False) == [2, 2]
    said = ranks.said(0) + ranks.said(1)
    assert len(re.findall(r"^rank 1, step 4: the loss is nan\. No update was made", said, re.M)) == 1, said
    assert re.search(r"^rank \d, step 4: stopped, as rank \d has said: rank 1, step 4: the loss is nan", said, re.M), (
        said
    )
    assert steps_written(tmp_path / "run") == 3


class _FillsTheDisk:
    """The first rank's disk is full when a file is flushed for the second time: in its first checkpoint."""

    @contextmanager
    def __call__(self, rank: int) -> Iterator[None]:
        fsync, calls = os.fsync, 0

        def refused(handle: int) -> None:
            nonlocal calls
            calls += 1
            if rank == 0 and calls >= 2:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            fsync(handle)

        os.fsync = refused
        yield


def test_a_full_disk_of_the_first_rank_ends_all_and_leaves_no_half_checkpoint(
    train_into: MakeRecipe, tmp_path: Path
) -> None:
    ranks = Ranks(2, tmp_path / "said", *train_into(tmp_path / "run"), trouble=_FillsTheDisk())
    assert ranks.wait(asks=False) == [2, 2]
    assert re.search(r"^rank 0, step 2: can't save the checkpoint .*: No space left", ranks.said(0), re.M), ranks.said(
        0
    )
    assert re.match(r"rank 1, step [23]: stopped, as rank 0 has said: rank 0, step 2: can't save", ranks.said(1))
    assert list((tmp_path / "run" / "checkpoints").iterdir()) == []


class _Differs:
    """One rank finds other weights."""

    def __init__(self, rank: int) -> None:
        self.rank = rank

    @contextmanager
    def __call__(self, rank: int) -> Iterator[None]:
        if rank == self.rank:
            from ossia.run import start

            start.weights_identity = lambda checkpoint: "0123456789abcdef"
            assert agree.weights_identity is not start.weights_identity
        yield


def test_ranks_with_different_weights_dont_begin(train_into: MakeRecipe, tmp_path: Path) -> None:
    ranks = Ranks(3, tmp_path / "said", *train_into(tmp_path / "run"), trouble=_Differs(2))
    assert ranks.wait(asks=False) == [2, 2, 2]
    said = "".join(ranks.said(rank) for rank in range(3))
    words = r"^rank 2: its model \(a hash of its weights\) differs from rank 0's: 0123456789abcdef there, "
    assert len(re.findall(words, said, re.M)) == 1, said
    assert "every host the same recipe, data, model and version" in said
    assert steps_written(tmp_path / "run") == 0


class _Drifts:
    """After each update one rank has another last bit in one number than the others."""

    @contextmanager
    def __call__(self, rank: int) -> Iterator[None]:
        update = AdamW.update

        def drifting(optimizer: AdamW, **how: Any) -> float:
            norm = update(optimizer, **how)
            first = next(iter(optimizer.params.values())).detach().view(-1)
            first[0] = torch.nextafter(first[0], torch.tensor(9.0))
            return norm

        if rank == 1:
            AdamW.update = drifting
        yield


def test_copies_that_drifted_apart_by_one_bit_are_found_at_the_next_checkpoint(
    train_into: MakeRecipe, tmp_path: Path
) -> None:
    ranks = Ranks(2, tmp_path / "said", *train_into(tmp_path / "run", "eval.answers=0"), trouble=_Drifts())
    assert ranks.wait(asks=False) == [2, 2]
    said = ranks.said(0) + ranks.said(1)
    assert re.search(r"rank 1: its trained tensors \(a checksum\) differs from rank 0's", said), said
    assert steps_written(tmp_path / "run") <= 2
    assert not any((tmp_path / "run" / "checkpoints").glob("*"))
