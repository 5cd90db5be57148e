"""Several ranks train what one process would, and go on from each other's checkpoints."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from ossia.data.pack import Pack
from ossia.train.ranks.gradients import share
from tests.train.conftest import outcome
from tests.train.ranks.conftest import MakeRecipe
from tests.train.ranks.support import Ranks, Suffers, events_of, farthest, losses, train


@pytest.mark.slow
@pytest.mark.parametrize("trains", ["adapters", "all weights"])
def test_two_and_three_ranks_have_the_losses_of_one_over_fifty_steps(
    trains: str, train_into: MakeRecipe, tmp_path: Path
) -> None:
    how = {} if trains == "adapters" else {"adapter": None}
    for size in (1, 2, 3):
        train(
            size,
            tmp_path / f"said-{size}",
            train_into(tmp_path / f"{size}", "train.steps=50", "train.save_every=0", **how),
        )
    alone = losses(tmp_path / "1")
    assert alone[-1] < alone[-6] - 0.1  # something was learnt
    for size in (2, 3):
        assert farthest(alone, losses(tmp_path / f"{size}")) < 1e-6
        norms = [[e["grad_norm"] for e in events_of(tmp_path / f"{n}", "step")] for n in (1, size)]
        assert farthest(*norms) < 1e-5
        counts = [[(e["tokens"], e["trained"]) for e in events_of(tmp_path / f"{n}", "step")] for n in (1, size)]
        assert counts[0] == counts[1]
        assert all(len(e["rank_peak_bytes"]) == size for e in events_of(tmp_path / f"{size}", "step"))


def test_ranks_without_a_pack_take_part_and_only_the_first_talks(train_into: MakeRecipe, tmp_path: Path) -> None:
    one_pack = ("train.tokens_per_step=256", "train.steps=3")
    train(1, tmp_path / "said-1", train_into(tmp_path / "1", *one_pack))
    ranks = train(3, tmp_path / "said-3", train_into(tmp_path / "3", *one_pack))
    assert farthest(losses(tmp_path / "1"), losses(tmp_path / "3")) < 1e-6
    assert ranks.said(0).endswith(f"{tmp_path / '3'}\n")
    assert "What is trained" in ranks.said(0)
    assert [ranks.said(rank) for rank in (1, 2)] == ["", ""]
    assert json.loads((tmp_path / "3" / "env.json").read_text())["ranks"] == 3
    assert (tmp_path / "3" / "adapter" / "adapter_model.safetensors").is_file()


@pytest.mark.slow
def test_a_run_goes_on_with_other_numbers_of_ranks_and_the_same_losses(train_into: MakeRecipe, tmp_path: Path) -> None:
    arguments = train_into(tmp_path / "run", "train.steps=8")
    train(1, tmp_path / "said", train_into(tmp_path / "alone", "train.steps=8"))
    for size, update in ((4, 3), (2, 3), (3, 3)):  # each from the checkpoint two steps before
        flags = [] if size == 4 else ["--resume"]
        trouble = Suffers(0, "before an update", update)
        assert Ranks(size, tmp_path / f"said-{size}", *arguments, *flags, trouble=trouble).wait()[0] == -9
    last = train(1, tmp_path / "said-1", [*arguments, "--resume"])
    assert "going on from step 6" in last.said(0)
    assert [e["step"] for e in events_of(tmp_path / "run", "step")] == list(range(1, 9))
    sizes = [len(e.get("rank_peak_bytes", "1")) for e in events_of(tmp_path / "run", "step")]
    assert sizes == [4, 4, 2, 2, 3, 3, 1, 1]
    assert farthest(losses(tmp_path / "alone"), losses(tmp_path / "run")) < 1e-6


def test_the_same_number_of_ranks_leaves_the_same_bytes(train_into: MakeRecipe, tmp_path: Path) -> None:
    for name in "ab":
        train(3, tmp_path / f"said-{name}", train_into(tmp_path / name))
    assert outcome(tmp_path / "a") == outcome(tmp_path / "b")


def test_packs_go_to_the_rank_with_the_fewest_tokens_and_all_choose_alike() -> None:
    def pack(length: int) -> Pack:
        ids = torch.zeros(length, dtype=torch.int64)
        return Pack(ids, ids, torch.zeros(length), torch.tensor([0, length]), ("x",))

    packs = [pack(length) for length in (10, 60, 30, 31, 10)]
    assert share(packs, 1) == [[0, 1, 2, 3, 4]]
    assert share(packs, 2) == [[0, 1], [2, 3, 4]]
    assert share(packs[:2], 3) == [[1], [0], []]
