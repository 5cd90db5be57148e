"""The story from end to end on very little, and the trained checkpoint that other tests use."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest

from ossia import sft
from ossia.config import check_recipe, load_recipe
from ossia.demo import fixture
from ossia.demo.conversations import read_rows
from ossia.demo.prepare import RECIPE
from ossia.demo.run import exact_match, run_demo
from ossia.errors import UserError
from ossia.model.checkpoint import Checkpoint
from ossia.train.events import read_events
from tests.demo.support import SMALL


class Recorder:
    """A sink that keeps what it hears."""

    def __init__(self) -> None:
        self.events: list[dict] = []

    def write(self, event) -> None:
        self.events.append(dict(event))

    def close(self) -> None:
        self.events.append({"event": "closed"})


def _answered(thinking: str | None, content: str | None, answer: str) -> dict:
    message = {"role": "assistant", "content": content} | ({"reasoning_content": thinking} if thinking else {})
    return {"answer": answer, "completions": [{"messages": [message]}]}


def test_an_answer_counts_only_if_the_final_text_is_exactly_right():
    rows = [
        _answered("In order: 1 2.", "1 2", "1 2"),
        _answered(None, "1 2", "1 2"),
        _answered("In order: 1 2.", "1 2 ", "1 2"),
        _answered("1 2", None, "1 2"),
        _answered(None, "2 1", "1 2"),
        {"answer": "1 2", "completions": [{"messages": []}]},
    ]
    assert exact_match(rows) == 2 / 6


def test_a_folder_with_something_else_in_it_is_refused_and_left_alone(tmp_path):
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(UserError, match="something else"):
        run_demo(tmp_path, plan=SMALL)
    assert (tmp_path / "thesis.txt").read_text() == "mine"


@pytest.fixture
def told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """`demo` in the current folder: as much of an earlier demo as a second one looks at."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "demo" / "model").mkdir(parents=True)
    for name in (RECIPE, "model/model.safetensors", "mark"):
        (tmp_path / "demo" / name).write_text("of the first")
    return Path("demo")


class Watcher(Recorder):
    """Looks, at every event, whether the earlier demo is still what it was."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.folder, self.there = folder, []

    def write(self, event) -> None:
        super().write(event)
        left = [(self.folder / name).read_text() for name in ("mark", "model/model.safetensors")]
        self.there.append(left == ["of the first"] * 2)


def test_the_story_runs_from_data_to_report_beside_an_earlier_one_and_prints_what_it_measured(told, capsys):
    folder, sink = told, Watcher(told)
    result = run_demo(folder, plan=SMALL, sink=sink)
    printed = capsys.readouterr().out
    evals = [event["eval_loss"] for event in read_events(folder / "events.jsonl") if event["event"] == "eval"]
    assert (result.before.loss, result.after.loss) == (evals[0], evals[-1])
    assert result.after.loss < result.before.loss
    shares = f"{result.before.exact_match:.2f}    {result.after.exact_match:.2f}"
    for shown in (f"{evals[0]:.3f}", f"{evals[-1]:.3f}", shares, str(result.model), "report.html"):
        assert shown in printed
    assert [event["step"] for event in sink.events if event["event"] == "step"] == [1, 2, 3, 4]
    assert Checkpoint.open(result.model).arch == Checkpoint.open(folder / "start").arch
    for when, score in (("before", result.before), ("after", result.after)):
        answered = read_rows(folder / "answers" / f"{when}.jsonl")
        assert [row["answer"] for row in answered] == [
            row["answer"] for row in read_rows(folder / "data/questions.jsonl")
        ]
        assert exact_match(answered) == score.exact_match
    assert (folder / "report.html").stat().st_size > 1000
    assert printed.startswith(
        "demo holds an earlier demo, which stays as it is until this one is done. It is made in demo.new\n"
    )
    assert printed.splitlines()[-4:-1] == [
        "demo is this one now; the earlier one is gone.",
        "The report: demo/report.html",
        "Talk to it: ossia chat demo/model",
    ]
    assert sink.there == [True] * len(sink.there) != []
    assert [entry.name for entry in Path().iterdir()] == ["demo"]
    assert not (folder / "mark").exists(), "the earlier demo is still there"
    for file in folder.rglob("*"):
        if file.suffix in (".yaml", ".json", ".jsonl", ".html"):
            assert "demo.new" not in file.read_text(), file
    recipe = load_recipe(folder / RECIPE)
    assert recipe == load_recipe(folder / "recipe.yaml")
    check_recipe(recipe, resume=True)
    assert sft.run(recipe, resume=True, sink=Recorder()).step == SMALL.steps


def test_a_second_demo_that_fails_leaves_the_first_as_it_was(told: Path, monkeypatch, capsys) -> None:
    files = {file: file.read_bytes() for file in told.rglob("*") if file.is_file()}

    def fail(folder: Path, **_: object) -> None:
        (folder / RECIPE).write_text("of the second")
        raise UserError("no more")

    monkeypatch.setattr("ossia.demo.run.prepare", fail)
    for _ in range(2):  # what the first try left is made room of, with a word
        with pytest.raises(UserError, match="no more"):
            run_demo(told, plan=SMALL)
        assert {file: file.read_bytes() for file in told.rglob("*") if file.is_file()} == files
    assert "demo.new: an unfinished demo; begun anew\n" in capsys.readouterr().out
    shutil.rmtree("demo.new")
    Path("demo.new").mkdir()
    (Path("demo.new") / "thesis.txt").write_text("mine")
    with pytest.raises(UserError, match=r"demo.new: holds something else than a demo"):
        run_demo(told, plan=SMALL)


def test_where_a_demo_cannot_be_is_told(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / RECIPE).write_text("of an earlier demo")
    for folder in (Path("."), Path(".."), tmp_path):
        with pytest.raises(UserError, match="the current folder or one around it; name another folder with --output"):
            run_demo(folder, plan=SMALL)
    with pytest.raises(UserError, match=r"^/proc/x: can't be made: No such file or directory; name another folder"):
        run_demo(Path("/proc/x"), plan=SMALL)


def test_the_fixture_is_trained_once_and_found_again(tmp_path, capsys):
    path = fixture.trained_fixture(tmp_path, plan=SMALL)
    trained = (path / "model.safetensors").read_bytes()
    assert "What is trained" in capsys.readouterr().err
    assert fixture.trained_fixture(tmp_path, plan=SMALL) == path
    assert capsys.readouterr().err == "", "it was trained again"
    assert trained != (path.parent / "start" / "model.safetensors").read_bytes()
    assert json.loads((path / "config.json").read_text())["model_type"] == "gpt_oss"
    assert sorted(entry.name for entry in tmp_path.iterdir()) == [path.parent.name], "something was left behind"


def test_the_fixtures_name_follows_the_plan_and_the_seed():
    names = {fixture.content_hash(plan, seed) for plan in (SMALL, fixture.FIXTURE_PLAN) for seed in (0, 1)}
    assert len(names) == 4
    assert fixture.content_hash(SMALL, 0) == fixture.content_hash(SMALL, 0)


def test_the_fixtures_cache_keeps_what_was_asked_for_last(tmp_path):
    found = tmp_path / f"demo-{fixture.content_hash(SMALL, 0)}"
    for age, folder in enumerate([*(tmp_path / f"demo-{letter}" for letter in "abc"), found]):
        folder.mkdir()
        os.utime(folder, (1000 - age, 1000 - age))
    assert fixture.trained_fixture(tmp_path, plan=SMALL).parent == found
    assert {folder.name for folder in tmp_path.iterdir()} == {"demo-a", "demo-b", found.name}
