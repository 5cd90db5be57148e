"""Recipes are read as they were meant, and written back as they were read."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ossia.config import AdapterConfig, LoraShape, Recipe, TrainConfig, load_recipe, recipe_from_dict
from ossia.config.yaml_lines import dump_yaml, parse_yaml
from ossia.errors import RecipeError

SMALL = "model: models/tiny\ndata: {path: train.jsonl}\n"


def recipe_in(folder: Path, text: str, *overrides: str) -> Recipe:
    """The recipe of a file with this text."""
    file = folder / "my.yaml"
    file.write_text(text, encoding="utf-8")
    return load_recipe(file, overrides)


def test_model_and_data_are_all_that_has_to_be_given(tmp_path: Path) -> None:
    recipe = recipe_in(tmp_path, SMALL)
    assert recipe.method == "sft"
    assert recipe.adapter is None
    assert recipe.output == Path("runs/my")
    assert recipe.data[0].path == "train.jsonl"
    assert (recipe.train.steps, recipe.train.epochs) == (None, 1.0)


@pytest.mark.parametrize("text", ["1e-5", "1.0e-5", "0.00001", "1E-05", ".1e-4"])
def test_a_number_with_an_exponent_is_a_number(tmp_path: Path, text: str) -> None:
    assert recipe_in(tmp_path, SMALL, f"train.learning_rate={text}").train.learning_rate == 1e-5
    assert recipe_in(tmp_path, f"{SMALL}train: {{learning_rate: {text}}}").train.learning_rate == 1e-5


def test_a_date_and_the_word_no_are_text(tmp_path: Path) -> None:
    recipe = recipe_in(tmp_path, f"{SMALL}harmony: {{current_date: 2026-11-21, identity: no}}")
    assert (recipe.harmony.current_date, recipe.harmony.identity) == ("2026-11-21", "no")


def test_a_list_of_sources_and_a_single_one_mean_the_same(tmp_path: Path) -> None:
    listed = recipe_in(tmp_path, "model: m\ndata:\n  - path: train.jsonl\n")
    single = recipe_in(tmp_path, "model: m\ndata: {path: train.jsonl}\n")
    assert listed == single


def test_overrides_reach_sections_lists_and_whole_values(tmp_path: Path) -> None:
    text = f"{SMALL}adapter: {{rank: 8}}\n"
    recipe = recipe_in(
        tmp_path, text, "train.steps=7", "data.0.path=x.jsonl", "adapter.targets=[router]", "adapter.rank=4"
    )
    assert recipe.train.steps == 7
    assert recipe.data[0].path == "x.jsonl"
    assert recipe.adapter is not None
    assert recipe.adapter.by_target() == {"router": LoraShape(4, 8.0)}
    assert recipe_in(tmp_path, text, "adapter=null").adapter is None
    assert recipe_in(tmp_path, text, "data.path=x.jsonl").data[0].path == "x.jsonl"


def test_overrides_reach_into_sources_that_are_written_as_a_path_alone(tmp_path: Path) -> None:
    lone, listed = "model: m\ndata: a.jsonl\n", "model: m\ndata: [a.jsonl, b.jsonl]\n"
    for override in ("data.0.path=x.jsonl", "data.path=x.jsonl"):
        assert recipe_in(tmp_path, lone, override).data[0].path == "x.jsonl"
    weighted = recipe_in(tmp_path, lone, "data.0.weight=2.0").data[0]
    assert (weighted.path, weighted.weight) == ("a.jsonl", 2.0)
    assert [source.path for source in recipe_in(tmp_path, listed, "data.1.path=x.jsonl").data] == ["a.jsonl", "x.jsonl"]
    held_out = recipe_in(tmp_path, f"{lone}eval: {{data: b.jsonl}}\n", "eval.data.0.weight=0.5").eval.data
    assert held_out is not None
    assert (held_out[0].path, held_out[0].weight) == ("b.jsonl", 0.5)


def test_a_section_with_nothing_in_it_has_its_defaults(tmp_path: Path) -> None:
    empty = "train:\neval:\nlog:\nharmony:\n"
    assert recipe_in(tmp_path, SMALL + empty) == recipe_in(tmp_path, SMALL)
    assert recipe_in(tmp_path, f"{SMALL}harmony: {{train: }}\n") == recipe_in(tmp_path, SMALL)
    given = "adapter:\n  targets:\n    attention:\n    experts: {rank: 2}\n"
    assert recipe_in(tmp_path, SMALL + given) == recipe_in(
        tmp_path, SMALL + given.replace("attention:", "attention: {}")
    )


def test_an_equals_sign_in_an_override_belongs_to_its_value(tmp_path: Path) -> None:
    assert recipe_in(tmp_path, SMALL, "harmony.identity=a=b").harmony.identity == "a=b"


def test_defaults_follow_the_keys_they_depend_on(tmp_path: Path) -> None:
    with_adapter = recipe_in(tmp_path, f"{SMALL}adapter: {{rank: 8}}\nmax_length: 65536\n")
    assert with_adapter.train.learning_rate == 2e-4
    assert recipe_in(tmp_path, SMALL).train.learning_rate == 2e-5
    assert with_adapter.train.tokens_per_step == with_adapter.train.tokens_per_pack == 65536
    assert with_adapter.adapter is not None
    assert with_adapter.adapter.alpha == 16.0
    assert recipe_in(tmp_path, SMALL, "train.steps=3").train.epochs is None


def test_targets_expand_to_single_names_and_the_single_name_wins() -> None:
    targets = {"q_proj": {"rank": 2, "alpha": 6.0}, "attention": {"rank": 8}, "experts": {}}
    shapes = AdapterConfig.model_validate({"rank": 16, "targets": targets}).by_target()
    attention = {"q_proj": LoraShape(2, 6.0), **dict.fromkeys(("k_proj", "v_proj", "o_proj"), LoraShape(8, 16.0))}
    assert shapes == attention | dict.fromkeys(("gate_up_proj", "down_proj"), LoraShape(16, 32.0))


def test_a_recipe_can_be_built_from_python_values() -> None:
    parts = Recipe(model="m", data=[{"path": "a.jsonl"}], train=TrainConfig(steps=3))
    plain = recipe_from_dict({"model": "m", "data": {"path": "a.jsonl"}, "train": {"steps": 3}})
    assert parts == plain
    assert plain.train.learning_rate == 2e-5


def test_a_recipe_is_frozen() -> None:
    recipe = recipe_from_dict({"model": "m", "data": {"path": "a"}})
    with pytest.raises(ValueError, match="frozen"):
        recipe.train.steps = 3  # type: ignore[misc]


def test_the_resolved_recipe_reads_back_as_an_equal_one(tmp_path: Path) -> None:
    text = f"""{SMALL}adapter: {{targets: {{attention: {{rank: 4}}, experts: {{}}}}}}
harmony: {{knowledge_cutoff: null, current_date: 2026-11-21, identity: "no: #1"}}
eval: {{split: 1e-2, every: 5}}
train: {{steps: 1_000, eps: 1e-8, clip: null}}
output: runs/elsewhere
"""
    recipe = recipe_in(tmp_path, text)
    assert recipe_in(tmp_path, recipe.to_yaml()) == recipe
    assert recipe.train.steps == 1000


PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=8,
)
TRICKY = st.sampled_from(
    ["1e5", "1e-5", "no", "Yes", "~", "null", "", "-", "1_0", "0x1f", "1:30", "<<", "=", "@", "# x"]
)


@settings(max_examples=200, deadline=None)
@given(st.dictionaries(st.text(), PLAIN | TRICKY))
def test_any_value_that_is_written_as_yaml_is_read_back(value: dict[str, object]) -> None:
    parsed = parse_yaml(dump_yaml(value))
    assert parsed.problems == ()
    assert parsed.value == value


@settings(max_examples=100, deadline=None)
@given(st.text())
def test_no_text_at_all_makes_the_yaml_reader_fall_over(text: str) -> None:
    parse_yaml(text)


@settings(max_examples=100, deadline=None)
@given(
    identity=st.text(),
    rate=st.floats(min_value=1e-12, max_value=1.0),
    ranks=st.dictionaries(st.sampled_from(["attention", "experts", "router"]), st.integers(1, 512), min_size=1),
)
def test_any_recipe_survives_its_own_yaml(identity: str, rate: float, ranks: dict[str, int]) -> None:
    targets = {name: {"rank": rank} for name, rank in ranks.items()}
    adapter = {"targets": targets}
    given_values = {"model": "m", "data": {"path": "a"}, "harmony": {"identity": identity}, "adapter": adapter}
    recipe = recipe_from_dict({**given_values, "train": {"learning_rate": rate}})
    again = recipe_from_dict(parse_yaml(recipe.to_yaml()).value)
    assert again == recipe
    assert math.isclose(again.train.learning_rate, rate, rel_tol=0)


def test_an_empty_file_and_a_list_say_what_a_recipe_is(tmp_path: Path) -> None:
    for text in ("", "# nothing\n", "- a\n", "just words\n"):
        with pytest.raises(RecipeError, match=r"a recipe"):
            recipe_in(tmp_path, text)
