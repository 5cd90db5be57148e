"""Every key is explained, from the schema that also reads it; the page in docs/ is that same text."""

from __future__ import annotations

from pathlib import Path

import pytest

from ossia.config import explain, recipe_page
from ossia.config.keys import all_keys, children, nearest
from ossia.errors import RecipeError

PAGE = Path(__file__).parents[2] / "docs" / "recipe.md"


def test_every_key_has_a_meaning_that_is_a_sentence() -> None:
    for name, key in all_keys().items():
        assert key.meaning, name
        assert key.meaning.endswith("."), name
        assert len(key.meaning) < 240, name


def test_every_key_says_its_type_and_its_default() -> None:
    required = {name for name, key in all_keys().items() if not key.default}
    assert required == {"model", "data.path", "eval.data.path", "env.id"}
    assert all("mapping" in key.type or key.type for key in all_keys().values())


def test_the_docs_page_is_the_one_the_schema_makes() -> None:
    assert PAGE.read_text(encoding="utf-8") == recipe_page(), "write it again: make docs"


def test_the_page_and_the_list_hold_every_key() -> None:
    page, listed = recipe_page(), explain()
    for name in all_keys():
        if not name.startswith(("eval.data.", "harmony.train.")):  # sections told once, where they come first
            assert f"`{name.rpartition('.')[2]}`" in page
            assert f"\n{name} " in listed


def test_a_key_is_explained_with_type_default_and_limits() -> None:
    told = explain("train.learning_rate")
    for words in ("Highest learning rate", "number, above 0", "2e-4 with an adapter"):
        assert words in told
    assert explain("learning_rate") == told
    assert "cosine | linear | constant" in explain("schedule")


def test_a_section_is_explained_with_every_key_in_it() -> None:
    for name in children("train"):
        assert f"\ntrain.{name}\n" in explain("train")


def test_a_key_that_does_not_exist_names_the_nearest() -> None:
    with pytest.raises(RecipeError, match=r"no key `train\.lerning_rate`; did you mean `train\.learning_rate`\?"):
        explain("train.lerning_rate")


@pytest.mark.parametrize(
    ("word", "meant"),
    [("bf16", "bfloat16"), ("lr", "learning_rate"), ("learning-rate", "learning_rate"), ("zzz", None)],
)
def test_the_nearest_word_is_close_in_letters_or_the_initials(word: str, meant: str | None) -> None:
    assert nearest(word, ["bfloat16", "learning_rate", "steps"]) == meant
