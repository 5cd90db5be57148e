"""`parallel.shard: auto`, decided by what a rank would take; and what `ossia plan` makes of the key."""

from __future__ import annotations

from pathlib import Path

import pytest

from ossia.config import recipe_from_dict
from ossia.model.arch import SHAPES
from ossia.model.budget.choose import Memory
from ossia.model.budget.work import DeviceKind
from ossia.plan.many.shard import Shard, choose_shard
from ossia.run.shard import ranks_to_cut_over
from tests.plan.many.test_many import planned

LORA = {"adapter": {"rank": 16, "targets": ["attention"]}}


def chosen(shape: str, gpu_gb: float, *, machine_gb: float = 0.0, ranks: int = 8, **keys: object) -> Shard:
    recipe = recipe_from_dict({"model": shape, "data": "train.jsonl", "output": "runs/x", **keys})
    kind: DeviceKind = "cuda" if gpu_gb else "cpu"
    memory = Memory(int(machine_gb * 1e9), int(machine_gb * 1e9), int(gpu_gb * 1e9), int(gpu_gb * 1e9))
    kernels = "triton" if gpu_gb else "torch"
    return choose_shard(recipe, SHAPES[shape], "mxfp4", memory, kind, kernels, ranks=ranks, per_machine=min(ranks, 8))


def test_a_base_that_fits_on_each_gpu_stays_whole_and_another_is_cut() -> None:
    assert not chosen("20b", 85, **LORA).cut
    found = chosen("120b", 64, **LORA)
    assert found.cut
    assert "everything on each rank would take" in found.why
    assert not chosen("120b", 141, **LORA).cut


def test_what_is_trained_in_full_is_cut_wherever_it_would_fit() -> None:
    assert chosen("demo", 141) == Shard(True, "all weights are trained")
    assert chosen("demo", 0, machine_gb=64, ranks=2).cut


def test_on_a_cpu_the_ranks_of_a_machine_share_its_memory() -> None:
    resident = {"weights": "resident", **LORA}
    assert not chosen("20b", 0, machine_gb=64, ranks=2, **resident).cut
    assert chosen("20b", 0, machine_gb=96, ranks=8, **resident).cut
    assert not chosen("20b", 0, machine_gb=96, ranks=8, **LORA).cut  # in the file, whose pages they share
    found = chosen("20b", 0, machine_gb=16, ranks=8, **LORA)
    assert not found.cut  # what doesn't fit are activations, and gathered layers would come on top
    assert "a part" in found.why


@pytest.mark.parametrize(
    ("keys", "why"),
    [
        ({"weights": "mmap", **LORA}, "weights: mmap"),
        ({"train": {"recompute": "never"}, **LORA}, "train.recompute: never"),
        ({"qat": "mxfp4"}, "qat: mxfp4"),
    ],
)
def test_what_needs_whole_weights_has_them(keys: dict[str, object], why: str) -> None:
    found = chosen("120b", 24, **keys)
    assert not found.cut
    assert why in found.why


def test_a_plan_of_many_gpus_divides_as_the_recipe_says_unless_an_option_does(tmp_path: Path) -> None:
    def division(*changes: str, **more: object) -> tuple[int, int, str]:
        found = planned(tmp_path, *changes, **more)
        return found.division.shards, found.division.trained_shards, found.why

    assert division("parallel.shard=all") == (8, 1, "parallel.shard: all")
    assert division("parallel.shard=none", "model=120b") == (1, 1, "parallel.shard: none")
    assert division("parallel.shard=all", adapter="") == (8, 8, "parallel.shard: all")
    assert division("parallel.shard=none", shards=8)[::2] == (8, "as you say")


def test_one_process_says_which_of_the_keys_for_several_it_makes_no_use_of() -> None:
    def said(**parallel: object) -> list[str]:
        heard: list[str] = []
        recipe = recipe_from_dict({"model": "x", "data": "x.jsonl", "parallel": parallel})
        assert ranks_to_cut_over(recipe, None, heard.append) is None
        return heard

    ends = "this is one process, which has everything"
    assert said() == said(timeout=5) == []
    assert said(shard="all") == [f"parallel.shard: all: {ends}"]
    assert said(experts="stay", offload=True) == [f"parallel.experts: stay, parallel.offload: true: {ends}"]
