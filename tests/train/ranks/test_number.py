"""How many processes `ossia train` is on a machine: of the command, of the recipe, or one for each GPU."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from ossia import cli
from ossia.cli import commands, launch
from ossia.config import recipe_from_dict
from ossia.errors import UserError
from ossia.plan import machine
from ossia.run.start import resume_with
from ossia.train.ranks.number import NumRanks, num_ranks

SFT = {"model": "demo", "data": "x.jsonl", "train": {"tokens_per_step": 32768, "tokens_per_pack": 4096}}
GRPO = {"model": "demo", "method": "grpo", "env": "sort", "train": {"steps": 1}}


def chosen(recipe: dict[str, Any], gpus: int | None, nproc: int | None = None, **keys: Any) -> NumRanks:
    """On a machine with so many GPUs; None: nobody may count them."""

    def count() -> int:
        assert gpus is not None, "counted, though it doesn't matter"
        return gpus

    return num_ranks(recipe_from_dict({**recipe, **keys}), nproc, count)


@pytest.mark.parametrize(
    ("gpus", "number", "why"),
    [(0, 1, "no GPU is visible"), (1, 1, "one GPU is visible"), (2, 2, "all 2 GPUs"), (8, 8, "all 8 GPUs that are")],
)
def test_left_out_it_is_a_process_for_each_gpu_of_the_machine(gpus: int, number: int, why: str) -> None:
    found = chosen(SFT, gpus)
    assert (found.number, found.idle, found.packless) == (number, "", "")
    assert why in found.why
    assert found.lines == [f"ranks: {number} ({found.why})"]
    assert chosen(SFT, gpus, parallel={"ranks": "auto"}, device="cuda") == found


def test_the_command_goes_before_the_recipe_and_nobody_counts_gpus_then() -> None:
    assert chosen(SFT, None, parallel={"ranks": 3}) == NumRanks(3, "as `parallel.ranks` says")
    assert chosen(SFT, None, 2, parallel={"ranks": 3}) == NumRanks(2, "--nproc")
    assert chosen(SFT, None, device="cpu").number == 1
    assert chosen(SFT, None, 2, device="cpu").number == 2


def test_rewards_are_one_process_and_say_which_gpus_stay_idle() -> None:
    assert [chosen(GRPO, gpus).number for gpus in (0, 1, 8)] == [1, 1, 1]
    assert [chosen(GRPO, gpus).idle for gpus in (0, 1)] == ["", ""]
    assert chosen(GRPO, 2).idle.startswith("1 GPU stays idle; with `rl.rollout`")
    assert chosen(GRPO, 8).lines[1].startswith("7 GPUs stay idle; ")
    with pytest.raises(UserError, match=r"--nproc: 2, but `method: grpo` is one process as yet"):
        chosen(GRPO, None, 2)


def test_ranks_that_share_a_pack_come_in_whole_groups() -> None:
    found = chosen(SFT, 7, parallel={"context": 2})
    assert (found.number, found.idle) == (6, "1 GPU stays idle: 2 share a pack")
    assert "6 of the 7 GPUs" in found.why
    assert chosen(SFT, 3, parallel={"context": 4}).number == 3  # which the run refuses, and says what it needs


def test_ranks_that_never_have_a_pack_are_said_before_they_start() -> None:
    sizes = {"tokens_per_step": 20000, "tokens_per_pack": 4096}  # four packs
    for found in (chosen(SFT, 8, train=sizes), chosen(SFT, None, 8, train=sizes)):
        assert found.number == 8
        assert found.lines[1].startswith("4 of the 8 ranks never have a pack: a step has at most 4 of 4,096 tokens")
    assert chosen(SFT, 8, train={**sizes, "tokens_per_step": 8 * 4096}).packless == ""
    assert "train.tokens_per_step=32768" in found.packless
    assert chosen(SFT, 8, train=sizes, parallel={"context": 2}).packless == ""
    assert chosen(SFT, 16, train=sizes, parallel={"context": 2}).packless.startswith("8 of the 16 ranks")


def test_gpus_that_this_torch_can_not_use_are_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    for works, found in ((True, 8), (False, 0)):
        monkeypatch.setattr(torch.cuda, "is_available", lambda works=works: works)
        assert launch.visible_gpus() == found
    assert not torch.cuda.is_initialized()


@pytest.fixture
def on_gpus(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., tuple[str, list[Any]]]:
    """`on_gpus(count, *command)`: what a command says on such a machine, and what it would have started there."""
    (tmp_path / "r.yaml").write_text(json.dumps(SFT | {"data": str(tmp_path / "rows.jsonl"), "model": str(tmp_path)}))
    (tmp_path / "rows.jsonl").touch()
    (tmp_path / "config.json").write_text("{}")

    def run(count: int, command: str, *words: str) -> tuple[str, list[Any]]:
        started: list[Any] = []
        monkeypatch.setattr(launch, "visible_gpus", lambda: count)
        monkeypatch.setattr(machine, "here", lambda *recipe: machine.named_gpu("H100", None))
        monkeypatch.setattr(commands, "launch", lambda ranks, arguments, max_restarts: started.append(ranks))
        done = CliRunner().invoke(cli.app, [command, str(tmp_path / "r.yaml"), *words])
        return done.output, started

    return run


def test_the_commands_start_and_plan_what_was_chosen_and_say_so(on_gpus: Callable[..., Any], tmp_path: Path) -> None:
    output = f"output={tmp_path / 'run'}"
    said, started = on_gpus(8, "train", output)
    assert started == [8]
    assert said == "ranks: 8 (parallel.ranks: auto; all 8 GPUs that are visible here)\n"
    assert on_gpus(8, "train", output, "--nproc", "2")[1] == [2]
    said, started = on_gpus(16, "train", output)
    assert started == [16]
    assert said.splitlines()[1].startswith("8 of the 16 ranks never have a pack")
    said, started = on_gpus(1, "train", output)
    assert started == []
    assert said.startswith("ranks: 1 (parallel.ranks: auto; one GPU is visible here)\n")

    planned = json.loads(on_gpus(8, "plan", "model=20b", "adapter.rank=8", "--json")[0])
    assert planned["ranks"] == {"number": 8, "why": "parallel.ranks: auto; all 8 GPUs that are visible here"}
    assert (planned["gpus"], planned["gpus_per_machine"]) == (8, 8)
    said, _ = on_gpus(8, "plan", "model=20b", "adapter.rank=8")
    assert said.startswith(
        "ranks        8 (parallel.ranks: auto; all 8 GPUs that are visible here)\nestimate     8 x H100"
    )
    assert json.loads(on_gpus(8, "plan", "model=20b", "adapter.rank=8", "--gpus", "2", "--json")[0])["gpus"] == 2
    alone = json.loads(on_gpus(1, "plan", "model=20b", "adapter.rank=8", "--json")[0])
    assert alone["ranks"]["number"] == 1
    assert alone["machine"]["name"] == "H100"


def test_of_a_gpu_that_is_not_here_a_plan_has_as_many_as_the_recipe_says(on_gpus: Callable[..., Any]) -> None:
    words = ("plan", "model=20b", "adapter.rank=8", "--gpu", "H100", "--json")
    assert "gpus" not in json.loads(on_gpus(8, *words)[0])
    assert json.loads(on_gpus(0, *words, "parallel.ranks=4")[0])["gpus"] == 4


@pytest.mark.parametrize(
    ("said", "gpus", "flag"), [("auto", 1, ""), ("auto", 8, " --nproc 1"), (1, 8, ""), (3, 0, " --nproc 1")]
)
def test_a_run_of_one_process_is_resumed_as_one(
    said: int | str, gpus: int, flag: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where what its recipe says, which is written out as it was left, would be several."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    recipe = recipe_from_dict({**SFT, "parallel": {"ranks": said}})
    assert f"ranks: {said}\n" in recipe.to_yaml()
    assert resume_with(recipe, None) == f"{recipe.resume_command}{flag}"
    assert resume_with(recipe_from_dict(GRPO), None).endswith("--resume")


def test_a_plan_of_ranks_on_a_cpu_says_that_it_is_of_one_process(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text("model: demo\ndata: x.jsonl\ndevice: cpu\nparallel: {ranks: 2}\n")
    said = CliRunner().invoke(cli.app, ["plan", str(tmp_path / "r.yaml")]).output.splitlines()
    assert said[0] == "ranks        2 (as `parallel.ranks` says)"
    assert said[1].strip().startswith("what follows is of one process alone")
    said = CliRunner().invoke(cli.app, ["plan", str(tmp_path / "r.yaml"), "parallel.ranks=auto"]).output.splitlines()
    assert said[0] == "ranks        1 (parallel.ranks: auto; on a CPU it is one process)"
    assert said[1].startswith("machine ")
