"""Experts that stay on their ranks, to which tokens travel, train as those of one process do."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from tests.conftest import MakeTiny
from tests.shapes import LEAST
from tests.train.ranks.conftest import MakeRecipe
from tests.train.ranks.support import Ranks, Suffers, events_of, farthest, losses, train

LORA = "adapter={rank: 2, targets: [attention, experts, router]}"


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["mxfp4", "bf16"])
@pytest.mark.parametrize("trains", ["adapters", "all weights"])
def test_experts_that_stay_have_the_losses_of_one_process(
    trains: str, layout: str, train_into: MakeRecipe, tiny: MakeTiny, tmp_path: Path
) -> None:
    adapter = LORA if trains == "adapters" else None
    lasting = ("train.steps=20", "train.save_every=10", f"model={tiny(LEAST, weights=layout)}")
    for ranks in (1, 2, 4):  # of four the last has one pack of a step's five, and others two
        stay = () if ranks == 1 else ("parallel.experts=stay",)
        train(ranks, tmp_path / f"said-{ranks}", train_into(tmp_path / f"{ranks}", *lasting, *stay, adapter=adapter))
    alone = losses(tmp_path / "1")
    assert alone[-1] < alone[20] - 0.05  # something was learnt, by the held-out losses after those of 20 steps
    for ranks in (2, 4):
        assert farthest(alone, losses(tmp_path / f"{ranks}")) < 1e-6
        norms = [[e["grad_norm"] for e in events_of(tmp_path / f"{n}", "step")] for n in (1, ranks)]
        assert farthest(*norms) < 1e-5


def test_ranks_that_do_not_divide_the_experts_are_told(train_into: MakeRecipe, tmp_path: Path) -> None:
    ranks = Ranks(3, tmp_path / "said", *train_into(tmp_path / "run", "parallel.experts=stay"))
    assert 2 in ranks.wait()
    said = "3 ranks don't divide this model's 4 experts\n  allowed: 1, 2, 4 ranks; or parallel.experts=gather"
    assert said in "".join(map(ranks.said, range(3)))
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_experts_stay_while_packs_are_shared_and_a_run_goes_on_with_gathered_ones(
    train_into: MakeRecipe, tiny: MakeTiny, tmp_path: Path
) -> None:
    shape = dataclasses.replace(LEAST, num_heads=4, num_kv_heads=2)
    lasting = ("train.steps=8", f"model={tiny(shape)}")
    both = ("parallel.experts=stay", "parallel.context=2")
    train(1, tmp_path / "said-1", train_into(tmp_path / "1", *lasting, adapter=None))
    train(4, tmp_path / "said-4", train_into(tmp_path / "4", *lasting, *both, adapter=None))
    assert farthest(losses(tmp_path / "1"), losses(tmp_path / "4")) < 1e-6
    begun = train_into(tmp_path / "other", *lasting, *both, adapter=None)
    assert Ranks(2, tmp_path / "said", *begun, trouble=Suffers(0, "before an update", 5)).wait()[0] == -9
    train(3, tmp_path / "said", [*train_into(tmp_path / "other", *lasting, adapter=None), "--resume"])
    assert farthest(losses(tmp_path / "1"), losses(tmp_path / "other")) < 1e-6
