"""`ossia plan --gpus`: which division is taken, what is said of it, and the closed forms beside the simulation."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from ossia import cli
from ossia.config import load_recipe
from ossia.errors import UserError
from ossia.model.budget.many.links import ETHERNET, INFINIBAND, inner_link
from ossia.model.budget.many.traffic import traffic
from ossia.plan.machine import named_gpu
from ossia.plan.many.pays import context_parallel_share, expert_parallel_tokens, hiding_tokens, most_ranks
from ossia.plan.many.predict import ManyPlan, Wanted, as_json, make_many_plan
from ossia.plan.many.text import as_text
from ossia.plan.many.times import layer_products, step_time
from ossia.plan.speed import speed

RECIPE = """\
model: 20b
{adapter}data: train.jsonl
train: {{tokens_per_step: 131072, tokens_per_pack: 16384, recompute: always}}
"""
LORA = "adapter: {rank: 16}\n"


def file_of(folder: Path, adapter: str = LORA) -> Path:
    (folder / "my.yaml").write_text(RECIPE.format(adapter=adapter))
    return folder / "my.yaml"


def planned(folder: Path, *changes: str, adapter: str = LORA, gpu: str = "H100", **wanted: object) -> ManyPlan:
    recipe = load_recipe(file_of(folder, adapter), changes)
    asked = replace(Wanted(8, INFINIBAND), **wanted)
    return make_many_plan(recipe, named_gpu(gpu, None), asked)


def test_the_division_that_sends_least_is_taken_of_those_that_fit(tmp_path: Path) -> None:
    def division(*changes: str, **more: object) -> tuple[int, int, bool]:
        found = planned(tmp_path, *changes, **more)
        assert found.fits
        return found.division.shards, found.division.trained_shards, found.division.offload

    assert division() == (1, 1, False)
    assert division("model=120b") == (8, 1, False)
    assert division(adapter="") == (8, 8, False)
    assert division(adapter="", gpus=512) == (8, 8, False)
    assert division("model=120b", adapter="", gpus=512) == (64, 64, False)
    assert division("model=120b", adapter="", gpus=16) == (16, 16, True)
    assert division(shards=8) == (8, 1, False)


def test_a_division_that_no_run_has_is_said_to_be_on_paper(tmp_path: Path) -> None:
    def said(*changes: str, adapter: str = LORA, **more: object) -> bool:
        found = planned(tmp_path, *changes, adapter=adapter, **more)
        named = "on paper: `ossia train` cuts over all ranks or none" in as_text(found)
        assert as_json(found)["division"]["on_paper"] == named == found.on_paper
        return named

    full = ""
    assert not said()
    assert not said("parallel.shard=all")
    assert not said("parallel.experts=stay", gpus=32)
    assert not said(adapter=full)
    assert said(adapter=full, gpus=64)  # replicas of eight
    assert not said("parallel.shard=all", adapter=full, gpus=64)
    assert said(gpus=64, shards=8)
    assert said(gpus=64, shards=64, experts=8)


def test_a_division_that_was_asked_for_is_taken_as_it_is(tmp_path: Path) -> None:
    plan = planned(tmp_path, "model=120b", adapter="", gpus=16, offload=False)
    assert not plan.fits
    assert plan.division.shards == 16
    assert planned(tmp_path, shards=8).why == "as you say"
    assert planned(tmp_path, adapter="", offload=True).division.offload


def test_on_one_gpu_a_step_takes_what_a_plan_for_one_says(tmp_path: Path) -> None:
    plan = planned(tmp_path, "train.tokens_per_step=16384", gpus=1)
    assert plan.time is not None
    alone = speed(plan.work, plan.machine).compute
    assert plan.time.products == pytest.approx(plan.time.total)
    last_forward = layer_products(plan.work, plan.rates)[-1][0]
    assert plan.time.total == pytest.approx(alone - last_forward)  # which is not computed again


@pytest.mark.parametrize("network", [INFINIBAND, ETHERNET])
@pytest.mark.parametrize("adapter", [LORA, ""])
def test_from_the_tokens_on_that_the_closed_form_gives_the_schedule_hides_what_travels(
    tmp_path: Path, network: object, adapter: str
) -> None:
    plan = planned(tmp_path, adapter=adapter, gpus=64, shards=64, offload=False, outer=network)
    tokens = hiding_tokens(plan.work, plan.division, plan.rates)

    def waiting(share: float) -> float:
        work = replace(plan.work, pack=int(tokens * share))
        return step_time(work, plan.division, plan.rates).waiting

    assert waiting(1.25) < 0.15  # what can't be hidden: the first gather and the last sum
    assert waiting(20.0) < 0.01
    assert waiting(0.25) > 0.5


def test_where_rows_to_experts_cost_more_than_the_experts_they_do(tmp_path: Path) -> None:
    gathered = planned(tmp_path, "model=120b", adapter="", gpus=8, shards=8, offload=False)
    put = planned(tmp_path, "model=120b", adapter="", gpus=8, shards=8, experts=8, offload=False)
    limit = int(expert_parallel_tokens(gathered.work, 8))

    def expert_bytes(plan: ManyPlan, tokens: int) -> float:
        parts = traffic(replace(plan.work, pack=tokens), plan.division).parts
        return sum(part.total for part in parts.values())

    lead = [expert_bytes(gathered, n) - expert_bytes(put, n) for n in (limit // 2, limit * 2)]
    assert lead[0] > 0 > lead[1]


def test_exchanges_have_the_share_of_a_layers_forward_that_the_schedule_gives_them(tmp_path: Path) -> None:
    plan = planned(tmp_path, "train.tokens_per_step=16384", context=8, gpus=8)
    share = context_parallel_share(plan.work, plan.rates, plan.rates.inner.bytes_s(8), 8)
    sent = traffic(plan.work, plan.division).layer.exchanged.total / plan.rates.inner.bytes_s(8)
    full = plan.work.arch.layer_types.index("full_attention")
    assert share == pytest.approx(sent / (sent + layer_products(plan.work, plan.rates)[full][0]))
    longer = context_parallel_share(replace(plan.work, longest=131_072), plan.rates, plan.rates.inner.bytes_s(8), 8)
    assert longer < share


def test_a_step_keeps_as_many_ranks_busy_as_it_has_tokens_to_hide_behind() -> None:
    assert most_ranks(1_000_000, 4000.0) == 250
    assert most_ranks(1000, 4000.0) == 1


def test_ranks_without_a_pack_are_named_with_the_step_that_gives_them_one(tmp_path: Path) -> None:
    done = CliRunner().invoke(cli.app, ["plan", str(file_of(tmp_path)), "--gpu", "H100", "--gpus", "16"])
    assert "8 ranks have no pack: 16 packs are train.tokens_per_step=262144" in done.stdout
    more = planned(tmp_path, "train.tokens_per_step=262144", gpus=16)
    assert (more.idle, more.tokens) == (0, 262144)
    assert planned(tmp_path, gpus=16).tokens == 131072


def test_a_plan_of_many_gpus_needs_no_torch_and_says_where_every_byte_is_and_goes(tmp_path: Path) -> None:
    code = (
        "import sys; from ossia.cli import main\ntry: main()\nfinally: print('torch' in sys.modules, file=sys.stderr)"
    )
    words = [
        "plan",
        str(file_of(tmp_path, "")),
        "--gpu",
        "h100",
        "--gpus",
        "64",
        "train.tokens_per_step=1048576",
        "--json",
    ]
    done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, check=True)
    assert done.stderr.split() == ["False"]
    found = json.loads(done.stdout)
    assert (found["fits"], found["estimate"], found["gpus"]) == (True, True, 64)
    assert sum(found["rank"]["parts"].values()) == found["rank"]["peak_bytes"]
    assert set(found["received_bytes"]) == {"weights, gathered", "gradients, summed"}
    assert found["links"]["between_machines"] == {"name": "InfiniBand", "gb_s": 50.0, "per": "gpu"}
    step = found["step"]
    assert step["step_s"] == pytest.approx(step["products_s"] + step["exchanged_s"] + step["exposed_s"])
    assert step["tokens_per_s"] == pytest.approx(1_048_576 / step["step_s"])


def test_in_words_it_says_that_it_is_an_estimate_what_travels_and_whether_it_fits(tmp_path: Path) -> None:
    words = ["plan", str(file_of(tmp_path, "")), "model=120b", "--gpu", "H100", "--gpus", "16"]
    done = CliRunner().invoke(cli.app, [*words, "train.tokens_per_step=262144"])
    assert done.exit_code == 0, done.output
    lines = done.stdout.splitlines()
    assert lines[0].startswith("estimate     16 x H100 in 2 machines of 8; NVLink 4 at 450 GB/s; InfiniBand at 50 GB/s")
    assert "from other machines a step" in done.stdout
    assert "without the optimizer's pass over the machine's memory" in done.stdout
    refused = CliRunner().invoke(cli.app, [*words, "--no-offload"])
    assert refused.exit_code == 3
    assert "fits         no: " in refused.stdout
    little = CliRunner().invoke(cli.app, [*words, "--machine-memory", "512"])
    assert little.exit_code == 3
    assert "of a machine's memory are needed, 476.84 GiB are there" in little.stdout


def test_a_gpu_without_a_rate_has_a_plan_without_a_speed(tmp_path: Path) -> None:
    words = ["plan", str(file_of(tmp_path)), "--gpu-memory", "80", "--gpus", "8"]
    done = CliRunner().invoke(cli.app, words)
    assert done.exit_code == 0, done.output
    assert "speed        not known" in done.stdout
    assert json.loads(CliRunner().invoke(cli.app, [*words, "--json"]).stdout)["step"] is None


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--gpus", "8"], "name one: --gpu H100"),
        (["--gpu", "H100", "--gpus", "12"], "gpus: 12; allowed: a multiple"),
        (["--gpu", "H100", "--gpus", "8", "--network", "token-ring"], "allowed: infiniband, ethernet"),
        (["--gpu", "H100", "--gpus", "8", "weights=stream"], "knows auto, resident and bf16"),
        (["--gpu", "H100", "--gpus", "8", "--shards", "3"], "shards: 3; allowed: a divisor of the GPUs, 8"),
        (["--gpu", "H100", "--gpus", "64", "--expert-parallel", "64"], "the model has 32 experts"),
    ],
)
def test_what_can_not_be_planned_is_said_with_what_can(tmp_path: Path, words: list[str], says: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "ossia", "plan", str(file_of(tmp_path)), *words], capture_output=True, text=True
    )
    assert done.returncode == 2
    assert says in done.stderr


def test_gpus_without_nvlink_meet_over_pcie_and_share_it_with_what_waits_in_memory(tmp_path: Path) -> None:
    assert inner_link("H200", 50.0).gb_s == 450
    assert inner_link("3090", 24.0).gb_s == 24
    sizes = ("train.tokens_per_step=8192", "train.tokens_per_pack=4096")
    few = planned(tmp_path, *sizes, adapter="", gpu="3090", gpus=2, per_machine=2, offload=True)
    assert few.time is not None
    one = few.time.timeline.gathers[1]
    layer = traffic(few.work, few.division).layer.gather.total  # half of it comes from the other, half from the memory
    assert one.end - one.begin == pytest.approx(2 * layer / 24e9, rel=1e-3)


def test_tokens_per_rank_of_a_context_parallel_sequence_are_its_part(tmp_path: Path) -> None:
    plan = planned(tmp_path, "train.tokens_per_step=16384", context=8, gpus=8)
    assert (plan.work.pack, plan.work.packs, plan.idle, plan.tokens) == (2048, 1, 0, 16_384)
    assert "tokens to heads and back" in as_json(plan)["received_bytes"]
    said = planned(tmp_path, "train.tokens_per_step=16384", "parallel.context=8", gpus=8)
    assert said.work == plan.work
    for uneven in (3, 16):
        with pytest.raises(UserError, match=f"context: {uneven}; allowed: a divisor of the model's key-value heads, 8"):
            planned(tmp_path, gpus=48, context=uneven)


def test_a_plan_says_that_the_copy_is_what_does_not_fit(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text("model: 20b\ndata: x.jsonl\nparallel: {offload: true}\n")
    words = ["plan", str(tmp_path / "r.yaml"), "--gpu", "3090", "--gpus", "2", "--machine-memory", "384"]
    said = CliRunner().invoke(cli.app, words).stdout
    assert "parallel.async_save=false: saves 233." in said
    assert "fits         yes" in CliRunner().invoke(cli.app, [*words, "parallel.async_save=false"]).stdout
