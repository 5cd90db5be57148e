"""`ossia data` and what is left of it where its output can't go."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from ossia.config import Recipe, recipe_from_dict
from ossia.errors import UserError
from ossia.preview import show_data
from tests.conftest import MakeTiny
from tests.shapes import LEAST

ROOT = Path(__file__).parents[2]


@pytest.fixture
def recipe(tiny: MakeTiny, tmp_path: Path) -> Path:
    """A recipe of 300 rows."""
    row = {"messages": [{"role": "user", "content": "Say it."}, {"role": "assistant", "content": "It. " * 20}]}
    (tmp_path / "rows.jsonl").write_text((json.dumps(row) + "\n") * 300)
    (tmp_path / "r.yaml").write_text(f"model: {tiny(LEAST)}\ndata: {tmp_path / 'rows.jsonl'}\nmax_length: 256\n")
    return tmp_path / "r.yaml"


def as_recipe(file: Path) -> Recipe:
    model, data, _ = (line.split(": ")[1] for line in file.read_text().splitlines())
    return recipe_from_dict({"model": model, "data": data, "max_length": 256})


@pytest.mark.parametrize(
    ("html", "words"),
    [
        (
            "/nowhere/x.html",
            r"^--html /nowhere/x.html: can't be written: there is no folder /nowhere\n  next: name a file",
        ),
        (".", r"^--html \.: can't be written: it is a folder"),
    ],
)
def test_a_page_that_cannot_be_written_is_told_before_rows_are_read(
    recipe: Path, monkeypatch: pytest.MonkeyPatch, html: str, words: str
) -> None:
    monkeypatch.setattr("ossia.preview.open_datasets", None)
    with pytest.raises(UserError, match=words):
        show_data(as_recipe(recipe), limit=5, as_json=False, html=Path(html))


def test_json_and_a_page_are_not_both_written(recipe: Path) -> None:
    with pytest.raises(UserError, match="--json and --html: choose one"):
        show_data(as_recipe(recipe), limit=5, as_json=True, html=recipe.with_name("page.html"))


@pytest.mark.parametrize("words", [["--json"], ["--limit", "1"]])
def test_a_reader_that_has_seen_enough_ends_the_command_without_a_word(recipe: Path, words: list[str]) -> None:
    start = f"import sys; sys.path.insert(0, {str(ROOT)!r}); from ossia.cli import main; main()"
    reading, writing = os.pipe()
    os.close(reading)
    command = [sys.executable, "-c", start, "data", str(recipe), *words]
    done = subprocess.run(command, stdout=writing, stderr=subprocess.PIPE, text=True)
    os.close(writing)
    assert (done.returncode, done.stderr) == (141, "")
