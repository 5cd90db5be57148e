"""PyTorch's own launcher starts the ranks, and starts them again; commands that can't be several processes say so."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from ossia.cli.launch import ranks_to_start
from ossia.config import recipe_from_dict
from ossia.errors import UserError
from ossia.train.ranks.launched import Launched, launched
from tests.train.conftest import outcome
from tests.train.ranks.conftest import MakeRecipe
from tests.train.ranks.support import Ranks
from tests.train.ranks.test_faults import steps_written

ROOT = Path(__file__).parents[3]
LONG = ("train.steps=60", "eval.every=0", "train.save_every=10")


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """`start(*command)`: python -m COMMAND, whose words go into said.txt; ended with the test."""
    started = []

    def start_(*command: str) -> subprocess.Popen[str]:
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
        with (tmp_path / "said.txt").open("w") as said:
            command = (sys.executable, "-m", *command)
            started.append(subprocess.Popen(command, env=environment, stdout=said, stderr=said, text=True))
        return started[-1]

    yield start_
    for process in started:
        process.terminate()  # a launcher takes its ranks with it
        process.wait(60)


def wait_for(what: Callable[[], object], process: subprocess.Popen[str]) -> None:
    end = time.monotonic() + 120
    while not what():
        assert process.poll() is None
        assert time.monotonic() < end
        time.sleep(0.02)


@pytest.mark.slow
@pytest.mark.parametrize("how", [{}, {"adapter": None}])
def test_a_killed_rank_is_started_again_with_the_others_and_they_go_on_to_the_same_bytes(
    how: dict[str, None], train_into: MakeRecipe, start: Callable[..., subprocess.Popen[str]], tmp_path: Path
) -> None:
    """The second trains all weights, which are cut."""
    arguments = train_into(tmp_path / "run", *LONG, **how)
    launcher = ("torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--max-restarts", "1")
    process = start(*launcher, "-m", "ossia", *arguments)
    wait_for(lambda: steps_written(tmp_path / "run") >= 15, process)
    children = {int(child.environ()["RANK"]): child for child in psutil.Process(process.pid).children()}
    children[1].send_signal(signal.SIGKILL)
    assert process.wait(120) == 0, (tmp_path / "said.txt").read_text()
    said = (tmp_path / "said.txt").read_text()
    assert re.search(r"^rank 1, step \d+: (is gone|gives no sign of life)", said, re.M), said
    assert re.search(r"going on from step [1-5]0$", said, re.M), said
    assert Ranks(2, tmp_path / "alone-said", *train_into(tmp_path / "alone", *LONG, **how)).wait() == [0, 0]
    assert outcome(tmp_path / "run") == outcome(tmp_path / "alone")


@pytest.mark.slow
def test_ossia_starts_several_processes_which_stop_together_when_asked_and_save(
    train_into: MakeRecipe, start: Callable[..., subprocess.Popen[str]], tmp_path: Path
) -> None:
    arguments = [*train_into(tmp_path / "run", *LONG), "--nproc", "2"]
    process = start("ossia", *arguments)
    wait_for(lambda: steps_written(tmp_path / "run") >= 3, process)
    process.send_signal(signal.SIGINT)
    assert process.wait(120) == 130
    said = (tmp_path / "said.txt").read_text()
    (step, command) = re.findall(r"stopped after step (\d+), saved; to go on: ossia (train .*)$", said, re.M)[0]
    assert command == f"train {tmp_path / 'run' / 'recipe.yaml'} --resume --nproc 2"
    assert (tmp_path / "run" / "checkpoints" / f"step-{int(step):08d}").is_dir()
    process = start("ossia", *command.split())
    assert process.wait(120) == 0
    said = (tmp_path / "said.txt").read_text()
    assert f"going on from step {step}\n" in said
    assert said.endswith(f"{tmp_path / 'run'}\n")
    events = [json.loads(line) for line in (tmp_path / "run" / "events.jsonl").read_text().splitlines()]
    assert [len(e["rank_peak_bytes"]) for e in events if e["event"] == "step"] == [2] * 60


def test_a_process_knows_what_its_launcher_says(monkeypatch: pytest.MonkeyPatch) -> None:
    assert launched() is None
    given = {"RANK": 3, "WORLD_SIZE": 4, "LOCAL_RANK": 1, "LOCAL_WORLD_SIZE": 2, "MASTER_ADDR": "x", "MASTER_PORT": 1}
    for name, value in given.items():
        monkeypatch.setenv(name, str(value))
    assert launched() == Launched(3, 4, 1, 2)
    with pytest.raises(UserError, match=r"--nproc: a launcher has started this process already"):
        ranks_to_start(recipe_from_dict({"model": "x", "data": "x.jsonl"}), 2)


def test_rewards_are_refused_by_several_processes(train_into: MakeRecipe, tmp_path: Path) -> None:
    recipe = tmp_path / "rewards.yaml"
    model = next(line for line in Path(train_into(tmp_path)[1]).read_text().splitlines() if line.startswith("model:"))
    keys = (model, "method: grpo", "env: sort", "rl: {max_new: 8}", "train: {steps: 1}", f"output: {tmp_path}/run")
    recipe.write_text("\n".join(keys))
    ranks = Ranks(2, tmp_path / "said", "train", str(recipe))
    assert ranks.wait(asks=False) == [2, 2]
    assert "rank 1: `method: grpo` is one process as yet, and a launcher has started 2" in ranks.said(1)
    assert not (tmp_path / "run").exists()
