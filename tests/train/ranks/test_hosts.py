"""Two hosts, each a network namespace with a run folder of its own, and the link between them."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.train.conftest import outcome
from tests.train.ranks.conftest import MakeRecipe
from tests.train.ranks.support import events_of, train

PORT = "29511"


@dataclass(frozen=True, slots=True)
class Hosts:
    """Their names, and that of each one's end of the link."""

    names: tuple[str, str]
    ends: tuple[str, str]

    def link(self, how: str) -> None:
        """up or down"""
        _ip("-n", self.names[1], "link", "set", self.ends[1], how)

    def train(self, folder: Path, arguments: Callable[[Path], list[str]], *flags: str) -> list[subprocess.Popen[bytes]]:
        """A rank on each, started as a launcher would; host 1 has no access to the folder of host 0."""
        begun = []
        for rank, (name, end) in enumerate(zip(self.names, self.ends, strict=True)):
            given = {
                "RANK": rank,
                "WORLD_SIZE": 2,
                "LOCAL_RANK": 0,
                "LOCAL_WORLD_SIZE": 1,
                "MASTER_ADDR": "10.77.0.1",
                "MASTER_PORT": PORT,
                "GLOO_SOCKET_IFNAME": end,
                "OMP_NUM_THREADS": 1,
            }
            here = folder / f"host-{rank}"
            here.mkdir(parents=True, exist_ok=True)
            words = ["ip", "netns", "exec", name, sys.executable, "-m", "ossia", *arguments(Path("run")), *flags]
            environment = os.environ | {key: str(value) for key, value in given.items()}
            with (here / "said.txt").open("ab") as said:
                begun.append(
                    subprocess.Popen(words, stdout=said, stderr=said, env=environment, cwd=here, start_new_session=True)
                )
        return begun


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True)


@pytest.fixture
def hosts() -> Iterator[Hosts]:
    mark = f"os{os.getpid() % 100_000}"
    found = Hosts((f"{mark}a", f"{mark}b"), (f"{mark}x", f"{mark}y"))
    if shutil.which("ip") is None:
        pytest.skip("needs iproute2")
    try:
        for name in found.names:
            _ip("netns", "add", name)
        (a, b), (x, y) = found.names, found.ends
        _ip("link", "add", x, "netns", a, "type", "veth", "peer", y, "netns", b)
        for number, (name, end) in enumerate(zip(found.names, found.ends, strict=True), start=1):
            _ip("-n", name, "addr", "add", f"10.77.0.{number}/24", "dev", end)
            _ip("-n", name, "link", "set", end, "up")
            _ip("-n", name, "link", "set", "lo", "up")
    except subprocess.CalledProcessError as error:
        _remove(found)
        pytest.skip(f"no network namespace can be made here: {error.stderr.decode().strip()}")
    yield found
    _remove(found)


def _remove(hosts: Hosts) -> None:
    for name in hosts.names:
        subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False)


@pytest.mark.slow
def test_a_lost_link_ends_the_ranks_on_both_sides_and_the_run_goes_on_to_the_same_bytes(
    hosts: Hosts, train_into: MakeRecipe, tmp_path: Path
) -> None:
    def arguments(run: Path) -> list[str]:
        return train_into(run, "train.steps=40", "parallel.timeout=10", adapter=None)

    train(2, tmp_path / "said", arguments(tmp_path / "undisturbed"))
    folders = [tmp_path / f"host-{number}" for number in range(2)]
    begun = hosts.train(tmp_path, arguments)
    try:
        events = folders[0] / "run" / "events.jsonl"
        _wait_for(lambda: events.exists() and len(events_of(events.parent, "step")) >= 5, begun)
        hosts.link("down")
        assert [process.wait(60) for process in begun] == [2, 2]
        done = len(events_of(events.parent, "step"))
        assert done < 40
        said = [(folder / "said.txt").read_text() for folder in folders]
        assert "rank 1, step " in said[0]
        assert "gives no sign of life" in said[0] or "is gone" in said[0]
        assert "rank 1, step " in said[1]
        assert "the store through which the ranks talk, on the first host, is gone or out of reach" in said[1]
        hosts.link("up")
        begun = hosts.train(tmp_path, arguments, "--resume")
        assert [process.wait(120) for process in begun] == [0, 0], [(f / "said.txt").read_text() for f in folders]
    finally:
        for process in begun:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
    files, heard = outcome(folders[0] / "run")
    apart = folders[1] / "run"
    files |= {str(file.relative_to(apart)): file.read_bytes() for file in apart.rglob("*.distcp")}
    assert (files, heard) == outcome(tmp_path / "undisturbed")


def _wait_for(so_far: Callable[[], bool], begun: list[subprocess.Popen[bytes]]) -> None:
    end = time.monotonic() + 120
    while not so_far():
        assert all(process.poll() is None for process in begun)
        assert time.monotonic() < end
        time.sleep(0.05)
