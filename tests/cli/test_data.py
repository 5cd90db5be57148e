"""`ossia data` and what is left of it where its output can't go."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from ossia.config import Recipe, recipe_from_dict
from ossia.errors import RewardError, UserError
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


def rewarded(model: str, **more: object) -> Recipe:
    return recipe_from_dict({"method": "grpo", "model": model, "max_length": 256, "rl": {"max_new": 32}} | more)


def test_tasks_of_a_recipe_that_learns_from_rewards_are_shown_and_its_environments_tried(
    tiny: MakeTiny, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = rewarded(str(tiny(LEAST)), env=["sort", "reverse"], train={"steps": 1})
    show_data(recipe, limit=3, as_json=False, html=None)
    said = capsys.readouterr().out
    assert said.count(" trained\n") == 3
    assert said.count("system") >= 3
    assert "env sort: the right answer earns more than each corrupted one, in 20 of 20 tasks" in said
    assert "env reverse: the right answer earns more" in said
    show_data(recipe, limit=2, as_json=True, html=None)
    records = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [set(record["weights"]) for record in records] == [{0.0}, {0.0}]
    assert records[0]["roles"][0] == "system"
    assert records[0]["roles"][-1] == "assistant"
    assert all(len(record["ids"]) == len(record["roles"]) for record in records)


def test_prompts_of_reward_functions_are_shown_and_have_no_examples(
    tiny: MakeTiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mine.py").write_text("def f(completions, **columns):\n    return [1.0 for _ in completions]\n")
    (tmp_path / "p.jsonl").write_text("".join(json.dumps({"prompt": f"Say {n}"}) + "\n" for n in range(20)))
    given = {"data": str(tmp_path / "p.jsonl"), "reward": f"{tmp_path / 'mine.py'}:f", "train": {"steps": 1}}
    recipe = rewarded(str(tiny(LEAST)), **given)
    show_data(recipe, limit=2, as_json=False, html=None)
    said = capsys.readouterr().out
    assert "env reward: it has no examples to try" in said
    with pytest.raises(UserError, match="--html: a page shows rows"):
        show_data(recipe, limit=2, as_json=False, html=tmp_path / "x.html")


def test_an_environment_that_pays_for_a_corrupted_answer_is_told_by_ossia_data(tiny: MakeTiny, tmp_path: Path) -> None:
    text = "from ossia.rl.envs.procedural import Sort\nfrom ossia.rl.env import OneStep\n\n\nclass Free(Sort):\n"
    text += "    def open(self, task, seed):\n        return OneStep(lambda turn: (1.0, {}))\n"
    (tmp_path / "free.py").write_text(text)
    recipe = rewarded(str(tiny(LEAST)), env=[f"{tmp_path / 'free.py'}:Free"], train={"steps": 1})
    with pytest.raises(RewardError, match="a corrupted answer earns 1, the right one 1"):
        show_data(recipe, limit=2, as_json=False, html=None)
