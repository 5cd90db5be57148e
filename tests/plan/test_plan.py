"""`ossia plan`: a recipe's memory and speed before a weight is read, on this machine and on GPUs that aren't here."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from ossia import cli
from ossia.config import Recipe, load_recipe
from ossia.errors import CheckpointError, UserError
from ossia.model.arch import SHAPES
from ossia.plan.machine import GPUS, Machine, described_gpu, named_gpu
from ossia.plan.predict import Plan, as_json, make_plan, read_shape
from ossia.plan.speed import flops_per_token
from tests.conftest import MakeTiny

RECIPE = """\
model: {model}
adapter: {{rank: 16, targets: {{attention: {{rank: 16}}, experts: {{rank: 8}}}}}}
data: train.jsonl
train: {{tokens_per_step: 16384, tokens_per_pack: 16384}}
"""


TOO_LONG = ("train.tokens_per_step=32768", "train.tokens_per_pack=32768")  # for 8 GB


def recipe_file(folder: Path, model: str = "20b") -> Path:
    file = folder / "my.yaml"
    file.write_text(RECIPE.format(model=model))
    return file


def planned(tmp_path: Path, machine: Machine, *changes: str, model: str = "20b") -> Plan:
    recipe: Recipe = load_recipe(recipe_file(tmp_path, model), changes)
    return make_plan(recipe, machine)


def test_a_plan_for_a_gpu_that_is_not_here_needs_no_torch_and_says_where_every_byte_is(tmp_path: Path) -> None:
    code = (
        "import sys; from ossia.cli import main\ntry: main()\nfinally: print('torch' in sys.modules, file=sys.stderr)"
    )
    words = ["plan", str(recipe_file(tmp_path)), "--gpu", "rtx 3090", "--json"]
    done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, check=True)
    assert done.stderr.split() == ["False"]
    found = json.loads(done.stdout)
    assert found["fits"]
    assert found["weights"]["placement"] == "resident"
    parts = found["device"]["parts"]
    assert sum(parts.values()) == found["device"]["peak_bytes"]
    assert parts["weights"] == 13_761_264_768
    assert parts["optimizer"] == 8 * found["trained_parameters"]


def test_where_it_does_not_fit_the_exit_code_is_3_and_the_keys_that_help_are_named(tmp_path: Path) -> None:
    words = ["plan", str(recipe_file(tmp_path)), "--gpu", "4060"]
    done = CliRunner().invoke(cli.app, [*words, *TOO_LONG])
    assert done.exit_code == 3
    assert "fits         no: " in done.stdout
    sizes = ["train.tokens_per_step=8192", "train.tokens_per_pack=8192"]
    assert f"{' '.join(sizes)}: saves " in done.stdout
    helped = CliRunner().invoke(cli.app, [*words, *sizes])
    assert helped.exit_code == 0
    assert "fits         yes: " in helped.stdout


def test_what_a_change_is_said_to_save_is_what_it_saves(tmp_path: Path) -> None:
    plan = planned(tmp_path, named_gpu("4060", None), *TOO_LONG)
    assert plan.changes
    for change in plan.changes:
        kept = [key for key in TOO_LONG if key.partition("=")[0] not in change.keys]
        changed = planned(tmp_path, plan.machine, *kept, *change.keys.split())
        assert plan.needed - changed.needed == change.saves_bytes
        assert changed.fits == change.fits


@pytest.mark.parametrize(
    ("gpu", "machine_gb", "placement", "fits"),
    [
        ("H200", None, "bf16", True),
        ("3090", None, "resident", True),
        ("4060", 64, "stream", True),
        ("4060", 8, "mmap", True),
    ],
)
def test_auto_is_told_with_its_reason(
    tmp_path: Path, gpu: str, machine_gb: float | None, placement: str, fits: bool
) -> None:
    plan = planned(tmp_path, named_gpu(gpu, machine_gb))
    assert (plan.choice.placement, plan.fits) == (placement, fits)
    assert plan.choice.why
    assert planned(tmp_path, plan.machine, "weights=resident").choice.why == "as the recipe says"


def test_the_longest_document_that_fits_fits_and_the_next_one_does_not(tmp_path: Path) -> None:
    machine = named_gpu("3090", None)
    longest = planned(tmp_path, machine).longest
    assert 4096 < longest < 131072

    def fits(length: int) -> bool:
        sizes = [f"{key}={length}" for key in ("max_length", "train.tokens_per_step", "train.tokens_per_pack")]
        return planned(tmp_path, machine, *sizes).fits

    assert fits(longest)
    assert not fits(longest + 64)


def test_streamed_experts_are_hidden_behind_many_tokens_and_not_behind_few(tmp_path: Path) -> None:
    sizes = "max_length={0} train.tokens_per_step={0} train.tokens_per_pack={0} weights=stream"
    many, few = (planned(tmp_path, named_gpu("4090", 64), *sizes.format(n).split()) for n in (16384, 512))
    assert many.speed.hidden
    assert not few.speed.hidden
    assert few.speed.transfer == many.speed.transfer == pytest.approx(2 * 10.15e9 * 47 / 48 / 24e9, rel=0.01)


def test_products_of_a_token_are_those_of_the_architecture() -> None:
    matrices, attention, head = flops_per_token(SHAPES["20b"], 4096)
    assert (matrices + attention + head) / 1e9 == pytest.approx(7.68, rel=0.01)
    matrices, attention, head = flops_per_token(SHAPES["120b"], 65536)
    assert (matrices + attention + head) / 1e9 == pytest.approx(20.0, rel=0.01)


def test_a_sampled_step_has_its_keys_and_values_and_each_prompt_once(tmp_path: Path) -> None:
    recipe = tmp_path / "rl.yaml"
    recipe.write_text(
        "method: grpo\nmodel: 20b\nadapter: {rank: 8}\nenv: sort\nmax_length: 1024\n"
        "rl: {prompts: 4, group: 8, max_new: 512}\ntrain: {steps: 1, tokens_per_step: 8192, tokens_per_pack: 4096}\n"
    )
    plan = make_plan(load_recipe(recipe), named_gpu("H100", None))
    assert plan.work.pack * plan.work.packs == 4 * (512 + 8 * 512) // 4096 * 4096
    each = 2 * 8 * 64 * 2 * 12 * (1024 + 128)
    assert plan.footprint.device["keys and values"] == 4 * 8 * each


def test_a_model_is_a_folder_a_shape_or_a_released_name(tiny: MakeTiny, tmp_path: Path) -> None:
    folder = tiny(weights="bf16")
    arch, layout = read_shape(str(folder))
    assert (arch.num_layers, layout) == (SHAPES["demo"].num_layers, "bf16")
    assert read_shape("openai/gpt-oss-120b") == read_shape("120b") == (SHAPES["120b"], "mxfp4")
    with pytest.raises(CheckpointError, match="no such folder, and no shape either"):
        read_shape("21b")
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match=r"config\.json: can't be read"):
        read_shape(str(tmp_path / "empty"))


def test_this_machine_is_measured_and_its_plan_can_be_read_as_json(tmp_path: Path) -> None:
    words = ["plan", str(recipe_file(tmp_path, "B1")), "device=cpu", "--json"]
    done = CliRunner().invoke(cli.app, words)
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert found["machine"]["device"] == "cpu"
    assert found["device"] is None
    assert found["estimate"]["tokens_per_s"] > 0
    assert found["estimate"]["from"].endswith("timed here just now")


def test_gpus_can_be_named_as_people_do_or_described() -> None:
    for name in GPUS:
        assert named_gpu(f"NVIDIA GeForce RTX {name}".lower(), None).name == name
    assert named_gpu("A100 80", None).name == "A100-80"
    with pytest.raises(UserError, match="--gpu 9999: no such GPU"):
        named_gpu("9999", None)
    unknown = described_gpu(24, 0, 24, None)
    assert unknown.memory.gpu == 24 * 10**9
    assert unknown.flops == 0


def test_a_gpu_without_a_rate_has_no_speed(tmp_path: Path) -> None:
    plan = planned(tmp_path, described_gpu(24, 0, 24, None))
    assert plan.speed.tokens_per_s is None
    assert as_json(plan)["estimate"]["tokens_per_s"] is None
    both = CliRunner().invoke(cli.app, ["plan", str(recipe_file(tmp_path)), "--gpu", "T4", "--gpu-memory", "16"])
    assert both.exit_code == 2
