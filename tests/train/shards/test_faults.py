"""What happens to machines while a cut run saves: no accepted checkpoint is corrupt, little is lost, restart goes on.

That the state which is restored is, bit for bit, what a run that nothing happened to has is checked by `train` on every
rank, and by `check_whole` at the end.
"""

from __future__ import annotations

import os
import random
import re
import resource
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from ossia.train.ranks.world import World
from ossia.train.shards import save
from ossia.train.shards.save import Saver
from ossia.train.state import checkpoint_paths, verify
from tests.train.shards.support import Group, train
from tests.train.shards.test_same import check_whole

STEPS = 6
# (rank that it happens on, in its second save where)
PLACES = (
    (1, "half its file"),
    (0, "before the manifest"),
    (0, "half the manifest"),
    (0, "before the rename"),
    (0, "after the rename"),
    (0, "half a removal"),
)


class Suffers:
    """Trouble for a rank in its second save: a signal at a place, after `reached` is there to be seen."""

    def __init__(self, rank: int, place: str, reached: Path, how: int = signal.SIGKILL, save: int = 2) -> None:
        self.rank, self.place, self.reached, self.how, self.save = rank, place, reached, how, save

    @contextmanager
    def __call__(self, rank: int) -> Iterator[None]:
        if rank == self.rank:
            self._lurk()
        yield

    def _maybe(self, place: str, before: Callable[[], object] = lambda: None) -> None:
        if place == self.place:
            self.save -= 1
            if not self.save:
                before()
                self.reached.touch()
                os.kill(os.getpid(), self.how)

    def _lurk(self) -> None:
        own, rename, rmtree = Saver._own_file, os.rename, save.shutil.rmtree
        write_part, write_manifest = save.write_part, save.write_manifest

        def write_part_(folder: Path, rank: int, *what: object) -> object:
            found, file = write_part(folder, rank, *what), folder / f"__{rank}_0.distcp"
            self._maybe("half its file", lambda: os.truncate(file, file.stat().st_size // 2))
            return found

        def own_(saver: Saver, *what: object) -> object:
            found = own(saver, *what)
            self._maybe("file written")
            return found

        def write_manifest_(folder: Path, *what: object, **more: object) -> None:
            self._maybe("before the manifest")
            write_manifest(folder, *what, **more)
            self._maybe("half the manifest", lambda: os.truncate(folder / "manifest.json", 100))

        def rename_(old: Path, new: Path) -> None:
            if Path(old).name.startswith(".partial-"):
                self._maybe("before the rename")
            rename(old, new)
            if Path(old).name.startswith(".partial-"):
                self._maybe("after the rename")

        def rmtree_(path: Path, **how: bool) -> None:
            self._maybe("half a removal", lambda: next(Path(path).glob("*.distcp")).unlink())
            rmtree(path, **how)

        Saver._own_file, os.rename, save.shutil.rmtree = own_, rename_, rmtree_
        save.write_part, save.write_manifest = write_part_, write_manifest_


def check_saved(run: Path, least: int) -> None:
    """Every checkpoint that is there is whole, and the newest is at least that of step `least`."""
    saved = checkpoint_paths(run)
    assert [verify(path) for path in saved] == [None] * len(saved)
    assert [path.name for path in saved][-1:] >= [f"step-{least:08d}"][: bool(least)]


def finish(tmp_path: Path, run: Path, size: int = 2) -> None:
    """The same number of ranks goes on to the end."""
    finished(Group(size, tmp_path / f"again-{run.name}", train, run, STEPS, resume=True), run)


def finish_all(tmp_path: Path, num: int) -> None:
    """`finish` for run-0, run-1, ... at once."""
    runs = [tmp_path / f"run-{number}" for number in range(num)]
    groups = [Group(2, tmp_path / f"again-{run.name}", train, run, STEPS, resume=True) for run in runs]
    for run, group in zip(runs, groups, strict=True):
        finished(group, run)


def finished(group: Group, run: Path) -> None:
    codes = group.wait()
    assert codes == [0] * len(codes), group.errors()
    check_whole(run, STEPS)
    assert not [path for path in (run / "checkpoints").iterdir() if path.name.startswith(".")]


def wait_for(file: Path) -> None:
    end = time.monotonic() + 60
    while not file.exists():
        assert time.monotonic() < end
        time.sleep(0.01)


def saved_by(place: str) -> int:
    """The step of the newest checkpoint after something happened there in the save of step 4."""
    return 4 if place in ("after the rename", "half a removal") else 2


def test_a_rank_killed_anywhere_in_a_save_is_named_and_the_run_goes_on_from_the_old_set_or_the_new(
    tmp_path: Path,
) -> None:
    groups = []
    for number, (rank, place) in enumerate(PLACES):
        trouble = Suffers(rank, place, tmp_path / f"reached-{number}", save=1 if place == "half a removal" else 2)
        run = tmp_path / f"run-{number}"
        groups.append(Group(2, tmp_path / f"out-{number}", train, run, STEPS, trouble=trouble, timeout_s=3, keep=1))
    for number, (rank, place) in enumerate(PLACES):
        codes = groups[number].wait()
        assert (codes[rank], codes[1 - rank]) == (-signal.SIGKILL, 2), (place, codes, groups[number].errors())
        error = groups[number].errors()[1 - rank]
        assert re.match(rf"rank {rank}, step \d+: (gives no sign of life|is gone)", error), (place, error)
        check_saved(tmp_path / f"run-{number}", saved_by(place))
    finish_all(tmp_path, len(PLACES))


def test_all_ranks_killed_anywhere_in_a_save_leave_the_old_set_or_the_new(tmp_path: Path) -> None:
    groups = []
    places = (PLACES[0], PLACES[2], PLACES[4])
    for number, (rank, place) in enumerate(places):
        trouble = Suffers(rank, place, tmp_path / f"reached-{number}", signal.SIGSTOP)
        run = tmp_path / f"run-{number}"
        groups.append(Group(2, tmp_path / f"out-{number}", train, run, STEPS, trouble=trouble))
    for number, (_, place) in enumerate(places):
        wait_for(tmp_path / f"reached-{number}")
        groups[number].kill()
        check_saved(tmp_path / f"run-{number}", saved_by(place))
    finish_all(tmp_path, len(groups))


def test_a_rank_stopped_in_a_save_ends_the_job_within_the_timeout_and_is_named(tmp_path: Path) -> None:
    run, trouble = tmp_path / "run", Suffers(1, "file written", tmp_path / "reached", signal.SIGSTOP)
    group = Group(3, tmp_path / "out", train, run, STEPS, trouble=trouble, timeout_s=4, pause_s=0.2)
    wait_for(tmp_path / "reached")
    began = time.monotonic()
    for rank in (0, 2):
        group.processes[rank].join(30)
    took = time.monotonic() - began
    group.kill()
    assert [group.processes[rank].exitcode for rank in (0, 2)] == [2, 2]
    assert took < 15
    named = [re.search(r"rank 1, step [3-6]: (gives no sign of life|is gone)", group.said(rank)) for rank in (0, 2)]
    assert all(named), group.errors()
    check_saved(run, 2)
    finish(tmp_path, run, 3)


class _LimitsFiles:
    """One rank's disk refuses files of more than a few KiB from its second step on."""

    @contextmanager
    def __call__(self, rank: int) -> Iterator[None]:
        own, calls = Saver._own_file, 0

        def limited(saver: Saver, *what: object) -> object:
            nonlocal calls
            calls += 1
            if calls == 2:
                resource.setrlimit(resource.RLIMIT_FSIZE, (4096, resource.RLIM_INFINITY))
            return own(saver, *what)

        if rank == 1:
            Saver._own_file = limited
        yield


def test_a_full_disk_of_one_rank_ends_all_with_rank_step_and_cause_and_what_is_safe(tmp_path: Path) -> None:
    run = tmp_path / "run"
    group = Group(3, tmp_path / "out", train, run, STEPS, trouble=_LimitsFiles())
    assert group.wait() == [2, 2, 2]
    words = (
        rf"rank 1, step [4-6]: can't save its part of the checkpoint {run}/checkpoints/step-00000004: File too large\n"
        rf"  needed: .*\n  safe: {run}/checkpoints/step-00000002 and all that it holds\n  next: .* go on from step 2"
    )
    assert re.search(words, group.said(1)), group.said(1)
    for rank in (0, 2):
        assert re.search(rf"rank {rank}, step [4-6]: stopped, as rank 1 has said: ", group.said(rank)), group.said(rank)
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["step-00000002"]
    check_saved(run, 2)
    finish(tmp_path, run, 3)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two ranks with the checkpoints of steps 2 and 4."""
    folder = tmp_path_factory.mktemp("saved")
    assert Group(2, folder / "out", train, folder / "run", 4).wait() == [0, 0]
    return folder / "run"


def shorten(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("file", "harm", "words"),
    [
        ("__1_0.distcp", shorten, "its __1_0.distcp has [0-9,]+ bytes where"),
        ("__0_0.distcp", flip_a_bit, r"the bytes of its __0_0.distcp are not those .* \(sha256 differs\)"),
        (".metadata", flip_a_bit, r"the bytes of its .metadata are not those"),
        ("manifest.json", shorten, "its manifest.json can't be read"),
    ],
)
def test_a_damaged_shard_is_named_set_aside_and_the_checkpoint_before_it_is_taken(
    file: str, harm: Callable[[Path], None], words: str, saved: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(saved, run)
    harm(run / "checkpoints" / "step-00000004" / file)
    again = Group(2, tmp_path / "again", train, run, STEPS, resume=True)
    assert again.wait() == [0, 0], again.errors()
    said = again.said(0)
    assert re.search(
        rf"step-00000004: {words}.*; set aside as step-00000004.corrupt, trying the checkpoint before", said
    )
    assert "going on from step 2" in said
    assert (run / "checkpoints" / "step-00000004.corrupt").is_dir()
    check_whole(run, STEPS)


class _OtherClock:
    """One rank's clock is hours ahead, then hours behind."""

    @contextmanager
    def __call__(self, rank: int) -> Iterator[None]:
        true, calls = time.time, 0

        def jumping() -> float:
            nonlocal calls
            calls += 1
            return true() + 7200 * (-1) ** calls

        if rank == 1:
            time.time = jumping
        yield


def test_a_clock_that_jumps_by_hours_changes_nothing(tmp_path: Path) -> None:
    for name, trouble in (("plain", {}), ("jumps", {"trouble": _OtherClock()})):
        group = Group(2, tmp_path / f"out-{name}", train, tmp_path / name, 4, **trouble)
        assert group.wait() == [0, 0], group.errors()
    files = [
        {f.name: f.read_bytes() for f in checkpoint_paths(tmp_path / name)[-1].iterdir()} for name in ("plain", "jumps")
    ]
    assert files[0] == files[1]


@pytest.mark.slow
def test_fifty_random_kills_of_cut_ranks_lose_at_most_the_steps_since_the_last_save(tmp_path: Path) -> None:
    kill_often(50, random.Random(11), tmp_path)


def kill_often(least: int, chance: random.Random, folder: Path) -> None:
    """Train to the end again and again, killing one rank or all on the way."""
    kills, number = 0, 0
    while kills < least:
        run, number = folder / f"run-{number}", number + 1
        while True:
            group = Group(2, folder / "out", train, run, 20, resume=True, pause_s=0.02, timeout_s=4)
            end = time.monotonic() + chance.uniform(0.2, 1.2)
            while time.monotonic() < end and any(process.is_alive() for process in group.processes):
                time.sleep(0.005)
            if all(process.exitcode == 0 for process in group.processes):
                break
            assert not any(process.exitcode for process in group.processes), group.errors()
            kills += 1
            if chance.random() < 0.5:
                group.processes[chance.randrange(2)].kill()
                time.sleep(chance.uniform(0.0, 0.1))
            group.kill()
            check_saved(run, 0)
        check_whole(run, 20)


def break_off(world: World) -> None:
    """Rank 0's exchange fails, and the others live."""

    def fail(tensor: object) -> None:
        raise RuntimeError("this end is broken. More of it")

    if world.leads:
        world._together([None], fail)
    time.sleep(4.5)
    world.gather(None)


def test_an_exchange_that_fails_while_all_live_is_called_that_with_a_short_timeout_too(tmp_path: Path) -> None:
    group = Group(2, tmp_path / "out", break_off, timeout_s=2.5)
    assert group.wait() == [2, 2], group.errors()
    assert group.said(0) == "rank 0: lost its connection to another rank (this end is broken)\n"


class _Fails:
    """Rank 1's save has a fault of ours."""

    @contextmanager
    def __call__(self, rank: int) -> Iterator[None]:
        def wrong(*what: object) -> None:
            raise ValueError("no such piece")

        if rank == 1:
            Saver._own_file = wrong
        yield


def test_a_fault_of_ours_in_the_thread_that_saves_is_told(tmp_path: Path) -> None:
    group = Group(2, tmp_path / "out", train, tmp_path / "run", 4, trouble=_Fails())
    assert group.wait() == [2, 1], group.errors()
    assert "ValueError: no such piece" in group.said(1)
    assert "rank 1, step" in group.said(0)
    assert "ValueError: no such piece" in group.said(0)
