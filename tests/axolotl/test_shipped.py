"""Axolotl's six configs for gpt-oss: each becomes a recipe that loads, and each key of it has its verdict."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from ossia.axolotl import as_text, import_axolotl
from ossia.config import load_recipe

FOLDER = Path(__file__).parents[1] / "golden" / "axolotl"
SHIPPED = sorted(FOLDER.glob("*.yaml"))


def keys_of(value: object, path: str = "") -> list[str]:
    """Every key that holds something other than a section, dotted, by a reader of its own."""
    if isinstance(value, dict) and value:
        return [key for name, inside in value.items() for key in keys_of(inside, f"{path}.{name}".lstrip("."))]
    if isinstance(value, list) and any(isinstance(entry, dict) for entry in value):
        return [key for number, inside in enumerate(value) for key in keys_of(inside, f"{path}.{number}")]
    return [path]


def test_all_six_are_here() -> None:
    assert len(SHIPPED) == 6


@pytest.mark.parametrize("file", SHIPPED, ids=lambda file: file.stem)
def test_a_shipped_config_becomes_a_recipe_that_loads(file: Path, tmp_path: Path) -> None:
    given = yaml.safe_load(file.read_text())
    (tmp_path / "recipe.yaml").write_text(import_axolotl(file.read_text(), file.name).text)
    recipe = load_recipe(tmp_path / "recipe.yaml")
    assert recipe.model == given["base_model"]
    assert recipe.data is not None
    assert [(one.path, one.format) for one in recipe.data] == [("HuggingFaceH4/Multilingual-Thinking", "messages")]
    assert (recipe.max_length, recipe.on_long, recipe.dtype) == (4096, "drop", "bfloat16")
    gpus = given.get("dp_shard_size", 1)
    assert recipe.train.tokens_per_step == 4096 * given["gradient_accumulation_steps"] * gpus
    assert recipe.train.learning_rate == float(given["learning_rate"])
    assert (recipe.train.schedule, recipe.train.warmup) == ("constant", given["warmup_ratio"])
    assert (recipe.train.epochs, recipe.train.beta2, recipe.train.save_every) == (1.0, 0.999, 0)
    if given.get("adapter"):
        assert recipe.adapter is not None
        assert recipe.adapter.by_target().keys() == {"q_proj", "k_proj", "v_proj", "o_proj"}
        assert (recipe.adapter.rank, recipe.adapter.alpha, recipe.adapter.dropout) == (8, 16, 0)
    else:
        assert recipe.adapter is None


@pytest.mark.parametrize("file", SHIPPED, ids=lambda file: file.stem)
def test_every_key_of_a_shipped_config_is_in_the_report(file: Path) -> None:
    imported = import_axolotl(file.read_text(), file.name)
    keys = keys_of(yaml.safe_load(file.read_text()))
    assert sorted(verdict.key for verdict in imported.verdicts) == sorted(keys)
    report = as_text(imported)
    lines = file.read_text().splitlines()
    for verdict in imported.verdicts:
        assert verdict.words
        assert verdict.line is not None
        assert f"{verdict.line}: {verdict.key} " in report
        assert verdict.key.rpartition(".")[2] in lines[verdict.line - 1]


def test_only_sharding_is_not_supported_of_the_shipped_ones() -> None:
    lost = {
        verdict.key.partition(".")[0]
        for file in SHIPPED
        for verdict in import_axolotl(file.read_text(), file.name).verdicts
        if verdict.fate not in ("mapped", "not needed")
    }
    assert lost == {"fsdp_config", "fsdp_version", "deepspeed"}


def test_gpus_multiply_the_batch_and_their_absence_is_remarked() -> None:
    text = (FOLDER / "full-20b-deepspeed.yaml").read_text()
    alone, four = import_axolotl(text, "x.yaml"), import_axolotl(text, "x.yaml", gpus=4)
    assert (alone.recipe.train.tokens_per_step, four.recipe.train.tokens_per_step) == (8192, 32768)
    assert any("--gpus" in remark for remark in alone.remarks)
    assert not any("--gpus" in remark for remark in four.remarks)


def test_what_was_left_out_is_written_into_the_recipe_too() -> None:
    text = import_axolotl((FOLDER / "full-20b-deepspeed.yaml").read_text(), "x.yaml").text
    assert "Not carried over: deepspeed: deepspeed_configs/zero3_bf16.json" in text
