"""Mistakes of different kinds, in different sections and on the machine, are told together, and only real ones."""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Iterator, Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ossia.config import checked_recipe
from ossia.config.load import draft_from_dict
from ossia.errors import RecipeError

GOOD: dict[str, Any] = {
    "model": "tiny",
    "adapter": {"rank": 4},
    "data": [{"path": "rows.jsonl"}, {"path": "rows.jsonl"}],
    "max_length": 128,
    "train": {"steps": 10},
    "output": "runs/a",
}
# key path and a value that is wrong there, whatever else is
MISTAKES: list[tuple[str, Any]] = [
    ("dtype", "bf16"),
    ("log.sinks", "tensorboard"),
    ("lora_rank", 8),
    ("adapter.targets", ["atention"]),
    ("adapter.init_from", "gone"),
    ("data.0.path", "gone.jsonl"),
    ("data.1.format", "csv"),
    ("eval.every", 5),
    ("harmony.reasoning_effort", "hi"),
    ("max_length", 5000),
    ("train.epochs", 2.0),
    ("train.schedule", "cos"),
    ("train.warmup", 1.5),
    ("train.keep", 0),
]


@pytest.fixture(autouse=True)
def place(tmp_path: Path) -> Iterator[Path]:
    """A current folder with a checkpoint's config.json and a data file, and nothing else."""
    (tmp_path / "tiny").mkdir()
    (tmp_path / "tiny" / "config.json").write_text(json.dumps({"max_position_embeddings": 4096}))
    (tmp_path / "rows.jsonl").write_text("{}\n")
    before = Path.cwd()
    os.chdir(tmp_path)
    yield tmp_path
    os.chdir(before)


def with_mistakes(*mistakes: tuple[str, Any]) -> dict[str, Any]:
    recipe = deepcopy(GOOD)
    for name, value in mistakes:
        inside: Any = recipe
        *path, last = name.split(".")
        for piece in path:
            inside = inside[int(piece)] if isinstance(inside, list) else inside.setdefault(piece, {})
        inside[int(last) if isinstance(inside, list) else last] = value
    return recipe


def told(recipe: Mapping[str, Any] | Path, *overrides: str) -> list[str]:
    """The findings, each on one line."""
    try:
        checked_recipe(recipe, overrides)
    except RecipeError as error:
        return str(error).replace("\n  ", " / ").splitlines()
    return []


def test_any_two_mistakes_are_told_together_as_each_is_told_alone() -> None:
    assert told(GOOD) == []
    alone = {name: told(with_mistakes((name, value))) for name, value in MISTAKES}
    assert {name for name, findings in alone.items() if len(findings) != 1} == set()
    for one, other in itertools.combinations(MISTAKES, 2):
        assert sorted(told(with_mistakes(one, other))) == sorted(alone[one[0]] + alone[other[0]]), (one, other)
    assert sorted(told(with_mistakes(*MISTAKES))) == sorted(
        finding for findings in alone.values() for finding in findings
    )


def test_mistakes_of_a_file_and_what_is_missing_on_the_machine_are_told_with_their_lines(tmp_path: Path) -> None:
    (tmp_path / "my.yaml").write_text(
        "model: tinny\n"
        "adapter: {targets: [atention]}\n"
        "data:\n"
        "  - {path: gone.jsonl, formt: text}\n"
        "  - {path: rows.jsonl}\n"
        "max_length: 8192\n"
        "train: {tokens_per_step: 4096, lr: 1.0e-4, steps: 5, warmup: 5}\n"
    )
    assert [line.split(" / ")[0].split("; did")[0] for line in told(Path("my.yaml"), "eval.every=2")] == [
        "my.yaml:1: `model`: there is no folder tinny",
        "my.yaml:2: `adapter.targets.0` is the text 'atention'",
        "my.yaml:4: unknown key `data.0.formt`",
        "my.yaml:4: `data.0.path`: there is no file or folder gone.jsonl",
        "my.yaml:7: unknown key `train.lr`",
        "my.yaml:7: `train.warmup` is 5 steps, which leaves none of `train.steps`, 5",
        "my.yaml:7: `train.tokens_per_step` is 4096, below `max_length`, 8192; a sample has to fit into a step",
        "command line, eval.every=2: `eval.every` needs held-out rows; give `eval.split` or `eval.data`",
    ]


@pytest.mark.parametrize(
    ("mistakes", "not_told"),
    [
        ([("max_length", "long"), ("train.tokens_per_step", 64)], "below `max_length`"),
        ([("max_lenght", 64), ("train.tokens_per_step", 100)], "below `max_length`"),
        ([("evall", {"split": 0.1}), ("eval.every", 5)], "needs held-out rows"),
        ([("zzz", 1), ("eval.every", 5)], "needs held-out rows"),
        ([("eval.split", "some"), ("eval.every", 5)], "needs held-out rows"),
        ([("eval.data", {"path": 3}), ("eval.every", 5)], "needs held-out rows"),
        ([("adaptor", {"rank": 4}), ("weights", "mmap")], "without `adapter`"),
        ([("train.steps", "ten"), ("train.warmup", 10)], "leaves none"),
        ([("model", 3)], "there is no"),
        ([("data.0.path", 3)], "there is no"),
        ([("data.0", 3)], "there is no"),
        ([("data", 3)], "there is no"),
        ([("data", "")], "there is no"),
    ],
)
def test_what_may_only_follow_from_another_mistake_is_not_told(mistakes: list[tuple[str, Any]], not_told: str) -> None:
    recipe = with_mistakes(*mistakes)
    if any(name in ("max_lenght", "adaptor") for name, _ in mistakes):
        del recipe["max_length"], recipe["adapter"]
    findings = told(recipe)
    assert len(findings) == 1
    assert not_told not in findings[0]


def test_a_missing_file_is_told_of_a_source_that_is_wrong_in_another_key() -> None:
    findings = told({**GOOD, "data": [{"path": "gone.jsonl", "format": "csv"}]})
    assert [finding.split(" is ")[0] for finding in findings] == [
        "recipe: `data.0.format`",
        "recipe: `data.0.path`: there",
    ]


def test_what_an_override_that_failed_was_to_set_is_not_relied_on(tmp_path: Path) -> None:
    (tmp_path / "my.yaml").write_text(json.dumps(with_mistakes(("train.tokens_per_step", 100))))
    assert "below `max_length`, 128" in told(Path("my.yaml"))[0]
    (finding,) = told(Path("my.yaml"), "max_length=[64")
    assert "not valid YAML" in finding


def test_a_key_that_is_given_twice_is_not_relied_on(tmp_path: Path) -> None:
    (tmp_path / "my.yaml").write_text(
        "model: tiny\ndata: gone.jsonl\nmax_length: 200\nmax_length: 100\ntrain: {tokens_per_step: 150}\n"
    )
    assert [line.split(": ")[0] for line in told(Path("my.yaml"))] == ["my.yaml:2", "my.yaml:4"]


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-2, 9000) | st.floats() | st.sampled_from(["", "x", "rows.jsonl", "all"]),
    lambda inner: (
        st.lists(inner, max_size=2) | st.dictionaries(st.sampled_from(["path", "rank", "x"]), inner, max_size=2)
    ),
    max_leaves=3,
)
NAMES = [name for name, _ in MISTAKES] + [
    "model",
    "data",
    "data.1",
    "train",
    "eval",
    "eval.data",
    "adapter",
    "weights",
    "y",
]


@settings(max_examples=150, derandomize=True, deadline=None, database=None)
@given(st.lists(st.tuples(st.sampled_from(NAMES), VALUES), max_size=4, unique_by=lambda mistake: mistake[0]))
def test_whatever_is_wrong_the_rest_is_read_and_reading_it_ends(mistakes: list[tuple[str, Any]]) -> None:
    names = [name for name, _ in mistakes]
    inside = [mistake for mistake in mistakes if not any(mistake[0].startswith(f"{name}.") for name in names)]
    draft = draft_from_dict(with_mistakes(*inside))
    assert draft.recipe is not None
