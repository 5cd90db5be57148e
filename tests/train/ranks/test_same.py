"""Several ranks train what one process would, and go on from each other's checkpoints."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from ossia.data.pack import Pack
from ossia.model.arch import alternating_layers
from ossia.model.open import open_model
from ossia.train.ranks.gradients import share
from ossia.train.shards.sliced import InShards
from ossia.train.state import checkpoint_paths, is_sharded
from tests.conftest import MakeTiny
from tests.shapes import LEAST
from tests.train.conftest import outcome
from tests.train.ranks.conftest import MakeRecipe
from tests.train.ranks.support import Ranks, Suffers, events_of, farthest, losses, train

DEEPER = dataclasses.replace(LEAST, num_layers=3, layer_types=alternating_layers(3))  # than what is there at a time
RUNS = (  # checkpoint, ranks, parallel.shard
    ("mxfp4", 1, "none"),
    ("mxfp4", 2, "none"),
    ("mxfp4", 2, "all"),
    ("mxfp4", 3, "all"),
    ("bf16", 1, "none"),
    ("bf16", 3, "all"),
)


@pytest.mark.slow
@pytest.mark.parametrize("trains", ["adapters", "all weights"])
def test_two_and_three_ranks_have_the_losses_of_one_over_fifty_steps(
    trains: str, train_into: MakeRecipe, tiny: MakeTiny, tmp_path: Path
) -> None:
    how = {} if trains == "adapters" else {"adapter": None}
    alone = {}
    for layout, size, shard in RUNS:
        run, told = tmp_path / f"{layout}-{size}-{shard}", tmp_path / f"said-{layout}-{size}-{shard}"
        keys = (f"model={tiny(DEEPER, weights=layout)}", f"parallel.shard={shard}", "eval.answers=0")
        train(size, told, train_into(run, "train.steps=50", "train.save_every=0", *keys, **how))
        steps = events_of(run, "step")
        norms, counts = [e["grad_norm"] for e in steps], [(e["tokens"], e["trained"]) for e in steps]
        if size == 1:
            alone[layout] = losses(run), norms, counts
            assert alone[layout][0][-1] < alone[layout][0][-6] - 0.1  # something was learnt
            continue
        assert farthest(alone[layout][0], losses(run)) < 1e-6, run.name
        assert farthest(alone[layout][1], norms) < 1e-5, run.name
        assert alone[layout][2] == counts
        assert all(len(e["rank_peak_bytes"]) == size for e in steps)


def test_ranks_without_a_pack_take_part_and_only_the_first_talks(train_into: MakeRecipe, tmp_path: Path) -> None:
    one_pack = ("train.tokens_per_step=256", "train.steps=3")
    train(1, tmp_path / "said-1", train_into(tmp_path / "1", *one_pack))
    ranks = train(3, tmp_path / "said-3", train_into(tmp_path / "3", *one_pack))
    assert farthest(losses(tmp_path / "1"), losses(tmp_path / "3")) < 1e-6
    assert ranks.said(0).endswith(f"{tmp_path / '3'}\n")
    assert "What is trained" in ranks.said(0)
    assert "weights: whole on every rank (parallel.shard: auto): everything on each rank takes" in ranks.said(0)
    assert [ranks.said(rank) for rank in (1, 2)] == ["", ""]
    assert json.loads((tmp_path / "3" / "env.json").read_text())["ranks"] == 3
    assert (tmp_path / "3" / "adapter" / "adapter_model.safetensors").is_file()


@pytest.mark.slow
def test_whole_weights_go_on_from_cut_ones_and_cut_from_whole(train_into: MakeRecipe, tmp_path: Path) -> None:
    def arguments(run: str, shard: str) -> list[str]:
        return train_into(tmp_path / run, "parallel.async_save=false", f"parallel.shard={shard}", adapter=None)

    train(2, tmp_path / "said", arguments("alone", "none"))
    for shard, update in (("all", 3), ("none", 3)):  # each ends two steps after its start, one of them saved
        trouble = Suffers(0, "before an update", update)
        flags = ["--resume"] if shard == "none" else []
        assert Ranks(2, tmp_path / "said", *arguments("run", shard), *flags, trouble=trouble).wait()[0] == -9
    assert [is_sharded(path) for path in checkpoint_paths(tmp_path / "run")] == [True, False]
    said = train(2, tmp_path / "said", [*arguments("run", "all"), "--resume"]).said(0)
    assert "going on from step 4" in said
    assert farthest(losses(tmp_path / "alone"), losses(tmp_path / "run")) < 1e-6


@pytest.mark.slow
@pytest.mark.parametrize("how", [{}, {"adapter": None}])
def test_a_run_goes_on_with_other_numbers_of_ranks_and_the_same_losses(
    how: dict[str, None], train_into: MakeRecipe, tmp_path: Path
) -> None:
    """The tensors of the second are cut, and saved before the next step so that it is known what is there."""
    keys = ("train.steps=8", "parallel.async_save=false", *(("parallel.shard=all",) if how else ()))
    arguments = train_into(tmp_path / "run", *keys, **how)
    train(1, tmp_path / "said", train_into(tmp_path / "alone", *keys, **how))
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


@pytest.mark.parametrize("trains", ["adapters", "all weights"])
def test_a_cut_run_that_lost_a_rank_in_a_gather_says_so_and_goes_on_to_the_same_bytes(
    trains: str, train_into: MakeRecipe, tmp_path: Path
) -> None:
    how = {} if trains == "adapters" else {"adapter": None}

    def arguments(name: str) -> list[str]:
        return train_into(tmp_path / name, f"parallel.shard={'all' if how == {} else 'auto'}", **how)

    said = train(2, tmp_path / "said", arguments("untouched")).said(0)
    why = "all): as the recipe says" if trains == "adapters" else "auto): all weights are trained"
    assert f"weights: cut over 2 ranks (parallel.shard: {why}\n" in said
    trouble = Suffers(1, "before a sum", 14 if trains == "adapters" else 80)
    ranks = Ranks(2, tmp_path / "said", *arguments("run"), trouble=trouble)
    assert ranks.wait() == [2, -9]
    error = ranks.said(0).splitlines()[-1]
    assert re.match(r"rank 1, step [3-6]: (gives no sign of life|is gone)", error), error
    said = train(2, tmp_path / "said", [*arguments("run"), "--resume"]).said(0)
    assert re.search("going on from step [24]$", said, re.M), said
    assert outcome(tmp_path / "run") == outcome(tmp_path / "untouched")
    assert [json.loads(line)["step"] for line in (tmp_path / "run" / "samples.jsonl").read_text().splitlines()] == [
        0,
        6,
    ]
    if trains == "all weights":
        goes_on_alone_and_is_a_model(tmp_path, arguments)


def goes_on_alone_and_is_a_model(folder: Path, arguments: Callable[[str], list[str]]) -> None:
    """One process goes on from what two ranks have saved of a cut run; what they trained can be opened."""
    trouble = Suffers(0, "before an update", 3)
    assert Ranks(2, folder / "said", *arguments("other"), trouble=trouble).wait()[0] == -9
    train(1, folder / "said", [*arguments("other"), "--resume"])
    assert farthest(losses(folder / "untouched"), losses(folder / "other")) < 1e-6
    saved = InShards(folder / "run" / "checkpoints" / "step-00000006")
    model, _ = open_model(str(folder / "run"), dtype="float32")
    for name in ("lm_head.weight", "model.layers.1.self_attn.sinks"):
        assert torch.equal(model.weights.get(name), saved[name].bfloat16().float())
    experts = model.weights.expert_weight(1, "gate_up_proj")
    assert torch.equal(experts, saved["model.layers.1.mlp.experts.gate_up_proj"].bfloat16().float())


def test_packs_go_to_the_rank_with_the_fewest_tokens_and_all_choose_alike() -> None:
    def pack(length: int) -> Pack:
        ids = torch.zeros(length, dtype=torch.int64)
        return Pack(ids, ids, torch.zeros(length), torch.tensor([0, length]), ("x",))

    packs = [pack(length) for length in (10, 60, 30, 31, 10)]
    assert share(packs, 1) == [[0, 1, 2, 3, 4]]
    assert share(packs, 2) == [[0, 1], [2, 3, 4]]
    assert share(packs[:2], 3) == [[1], [0], []]
