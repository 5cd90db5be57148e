"""Hosts that share no disk: each keeps its ranks' files, and what one lacks another sends.

A host is another working folder, in which the run's folder is a path like any other.
"""

from __future__ import annotations

import re
import shutil
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from ossia.errors import RunError
from ossia.train.ranks.world import World
from ossia.train.shards.save import Saver
from ossia.train.state import newest_checkpoint
from tests.train.disks import small_disk_at
from tests.train.shards.support import Group, train
from tests.train.shards.test_faults import Suffers, flip_a_bit

RUN = Path("run")


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A/run of ranks 0 and 1, B/run of rank 2: the checkpoints of steps 2 and 4."""
    folder = tmp_path_factory.mktemp("hosts")
    on_hosts(folder, "AAB", 4)
    return folder


def on_hosts(
    folder: Path, hosts: str, steps: int, *, resume: bool = False, fails: bool = False, **how: object
) -> Group:
    """A rank on each of these hosts."""
    folders = [folder / host for host in hosts]
    group = Group(len(hosts), folder / "out", train, RUN, steps, resume=resume, folders=folders, **how)
    codes = group.wait()
    assert codes == [2] * len(hosts) if fails else codes == [0] * len(hosts), group.errors()
    return group


def files(folder: Path, host: str, step: int) -> list[str]:
    return sorted(path.name for path in (folder / host / "run" / "checkpoints" / f"step-{step:08d}").glob("*.distcp"))


@pytest.fixture
def hosts(saved: Path, tmp_path: Path) -> Path:
    for host in "AB":
        shutil.copytree(saved / host, tmp_path / host)
    return tmp_path


def test_each_host_keeps_its_ranks_files_and_other_ranks_get_what_they_need_from_it(hosts: Path) -> None:
    assert (files(hosts, "A", 4), files(hosts, "B", 4)) == (["__0_0.distcp", "__1_0.distcp"], ["__2_0.distcp"])
    for name in ("manifest.json", "state.json", ".metadata"):
        assert len({(hosts / host / "run/checkpoints/step-00000004" / name).read_bytes() for host in "AB"}) == 1
    assert "going on from step 4" in on_hosts(hosts, "AB", 6, resume=True).said(0)
    assert files(hosts, "B", 4) == [
        "__1_0.distcp",
        "__2_0.distcp",
    ]  # rank 1's half takes a part of the old second third
    assert files(hosts, "A", 4) == ["__0_0.distcp", "__1_0.distcp"]
    on_hosts(hosts, "ACB", 8, resume=True)  # a host that has nothing yet
    assert files(hosts, "C", 8) == ["__1_0.distcp"]


def test_a_host_killed_before_its_rename_is_healed_and_a_bad_file_is_sent_anew_or_given_up(hosts: Path) -> None:
    place = hosts / "B/run/checkpoints/step-00000004"
    place.rename(place.with_name(f".partial-{place.name}"))
    on_hosts(hosts, "AAB", 4, resume=True)
    assert files(hosts, "B", 4) == ["__2_0.distcp"]
    shutil.copy(place / "__2_0.distcp", hosts / "A/run/checkpoints/step-00000004")
    flip_a_bit(place / "__2_0.distcp")
    on_hosts(hosts, "AAB", 4, resume=True)  # the other host has it: `train` compares what was restored
    flip_a_bit(place / "__2_0.distcp")
    (hosts / "A/run/checkpoints/step-00000004/__2_0.distcp").unlink()
    said = on_hosts(hosts, "AAB", 4, resume=True).said(0)
    assert re.search(r"step-00000004: the bytes of its __2_0.distcp are not those .* set aside", said), said
    assert "going on from step 2" in said
    for host in "AB":
        assert (hosts / host / "run/checkpoints/step-00000004.corrupt").is_dir()


def test_a_state_that_is_spoilt_on_the_first_host_comes_from_another_that_has_it(hosts: Path) -> None:
    state = hosts / "A/run/checkpoints/step-00000004/state.json"
    good = state.read_bytes()
    state.write_bytes(good.replace(b'"data": 4', b'"data": 5'))  # `train` compares what was restored
    assert "going on from step 4" in on_hosts(hosts, "AAB", 4, resume=True).said(0)
    assert state.read_bytes() == good
    state.unlink()
    assert "going on from step 4" in on_hosts(hosts, "AAB", 4, resume=True).said(0)
    assert state.read_bytes() == good


class _Garbles:
    """What one rank sends of a file has a bit that isn't in the file."""

    @contextmanager
    def __call__(self, rank: int) -> Iterator[None]:
        send = World.send

        def garbled(world: World, tensor: torch.Tensor, to: int) -> None:
            tensor[0] ^= 1
            send(world, tensor, to)

        World.send = garbled
        yield


def test_what_comes_garbled_is_not_taken_and_the_next_start_fetches_it_again(hosts: Path) -> None:
    group = on_hosts(hosts, "AB", 6, resume=True, fails=True, trouble=_Garbles())
    words = r"rank 1: run/checkpoints/step-00000004/__1_0.distcp: what rank 0 sent isn't what was written"
    assert re.search(words, group.said(1)), group.said(1)
    assert files(hosts, "B", 4) == ["__2_0.distcp"]
    on_hosts(hosts, "AB", 6, resume=True)


def test_a_file_that_no_one_has_is_named_with_the_rank_and_the_host_that_wrote_it(hosts: Path) -> None:
    said = on_hosts(hosts, "AAA", 6, resume=True, fails=True)
    words = (
        r"rank 0: run/checkpoints/step-00000004: __2_0.distcp, written by rank 2 on \S+, isn't there, one of 1 missing "
    )
    assert re.search(words, said.said(0)), said.said(0)
    assert "copy them there from the run's folder on that host" in said.said(0)
    assert "stopped, as rank 0 has said: rank 0: run/checkpoints/step-00000004: __2_0.distcp" in said.said(1)
    with pytest.raises(RunError, match=r"__2_0.distcp, written by rank 2 on"):
        newest_checkpoint(hosts / "A/run", pytest.fail)
    on_hosts(hosts, "AAB", 6, resume=True)


def test_a_run_does_not_begin_over_what_another_host_has_left_of_one(hosts: Path) -> None:
    shutil.rmtree(hosts / "A/run")
    said = on_hosts(hosts, "AB", 6, fails=True).said(1)
    assert "rank 1: run: rank 0 begins at step 0, and the folder on this host holds step-00000004 of a run" in said


def test_a_host_killed_between_the_first_rename_and_its_own_goes_on(tmp_path: Path) -> None:
    trouble = Suffers(1, "before the rename", tmp_path / "reached")
    folders = [tmp_path / "A", tmp_path / "B"]
    group = Group(2, tmp_path / "out", train, RUN, 4, folders=folders, trouble=trouble, timeout_s=3)
    assert group.wait() == [2, -signal.SIGKILL]
    assert (files(tmp_path, "A", 4), files(tmp_path, "B", 4)) == (["__0_0.distcp"], [])
    assert "going on from step 4" in on_hosts(tmp_path, "AB", 6, resume=True).said(0)


class _HearsLate:
    """Rank 1's third exchange of its second save is over for the others, and for it ends in another's failure."""

    @contextmanager
    def __call__(self, rank: int) -> Iterator[None]:
        complete, gather, done = Saver._complete, World.gather_beside, [0]

        def complete_(saver: Saver, *what: Any) -> None:
            complete(saver, *what)
            done[0] += 1

        def gather_(world: World, value: Any) -> list[Any]:
            found = gather(world, value)
            if done[0] == 2:
                raise RunError("rank 0, step 4: is gone")
            return found

        if rank == 1:
            Saver._complete, World.gather_beside = complete_, gather_
        yield


def test_a_host_that_hears_of_a_failure_while_the_first_renames_keeps_its_files(tmp_path: Path) -> None:
    folders = [tmp_path / "A", tmp_path / "B"]
    group = Group(2, tmp_path / "out", train, RUN, 4, folders=folders, trouble=_HearsLate(), timeout_s=3)
    assert group.wait() == [2, 2], group.errors()
    assert (files(tmp_path, "A", 4), files(tmp_path, "B", 4)) == (["__0_0.distcp"], [])
    assert "going on from step 4" in on_hosts(tmp_path, "AB", 6, resume=True).said(0)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A real file system of 160 KiB."""
    with small_disk_at(tmp_path / "B", "160k", "test_faults has the same with a limit on files") as disk:
        yield disk


def test_a_full_disk_of_one_host_leaves_the_last_checkpoint_on_all(small_disk: Path) -> None:
    folder = small_disk.parent
    group = on_hosts(folder, "AB", 12, fails=True, keep=9)
    assert re.search(r"rank 1, step \d+: can't save its part of .*: No space left on device", group.said(1)), (
        group.said(1)
    )
    steps = [[int(p.name[5:]) for p in (folder / host / "run/checkpoints").iterdir()] for host in "AB"]
    assert sorted(steps[0]) == sorted(steps[1]) != []
    subprocess.run(["mount", "-o", "remount,size=1m", str(small_disk)], check=True)
    left = small_disk / "run/checkpoints/.partial-step-00000099"  # of a save that was killed: it makes room by itself
    left.mkdir()
    (left / "__1_0.distcp").write_bytes(bytes(shutil.disk_usage(small_disk).free - 4096))
    on_hosts(folder, "AB", 12, resume=True)
