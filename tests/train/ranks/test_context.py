"""Ranks that share each pack's tokens find what one process finds."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from tests.conftest import MakeTiny
from tests.shapes import LEAST
from tests.train.ranks.conftest import MakeRecipe
from tests.train.ranks.support import Ranks, events_of, farthest, losses, train

HEADS = dataclasses.replace(LEAST, num_heads=8, num_kv_heads=4)  # which two and four ranks divide
LORA = "adapter={rank: 2, targets: [attention, experts, router]}"


@pytest.mark.slow
@pytest.mark.parametrize("trains", ["adapters", "all weights", "adapters beside a cut base"])
def test_packs_whose_tokens_ranks_share_have_the_losses_of_one_process(
    trains: str, train_into: MakeRecipe, tiny: MakeTiny, tmp_path: Path
) -> None:
    adapter = None if trains == "all weights" else LORA
    cut = "parallel.shard=all" if trains == "adapters beside a cut base" else "parallel.shard=auto"
    lasting = ("train.steps=30", "train.save_every=0", f"model={tiny(HEADS)}")
    for ranks, context in ((1, 1), (2, 2), (4, 2)):
        name = f"{ranks}-{context}"
        keys = (*lasting, cut, f"parallel.context={context}")
        train(ranks, tmp_path / f"said-{name}", train_into(tmp_path / name, *keys, adapter=adapter))
    alone = losses(tmp_path / "1-1")
    assert alone[-1] < alone[-6] - 0.1  # something was learnt
    for name in ("2-2", "4-2"):
        assert farthest(alone, losses(tmp_path / name)) < 1e-6
        norms = [[e["grad_norm"] for e in events_of(tmp_path / n, "step")] for n in ("1-1", name)]
        assert farthest(*norms) < 1e-5


@pytest.mark.parametrize(
    ("ranks", "key", "said"),
    [
        (2, "parallel.context=3", "3 ranks are to share each pack, but there are 2 ranks\n  allowed: a divisor of 2"),
        (2, "parallel.context=2", "which this model has 1 for keys and values\n  allowed: 1"),
        (
            1,
            "parallel.context=2",
            "2 ranks are to share each pack, but this process is alone\n  next: start it with --nproc",
        ),
    ],
)
def test_what_cannot_be_divided_is_an_error_that_says_what_can(
    ranks: int, key: str, said: str, train_into: MakeRecipe, tmp_path: Path
) -> None:
    started = Ranks(ranks, tmp_path / "said", *train_into(tmp_path / "run", key))
    assert 2 in started.wait()
    assert said in "".join(map(started.said, range(ranks)))  # of the first that said it; the others name that one
    assert not (tmp_path / "run" / "events.jsonl").exists()
