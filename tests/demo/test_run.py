"""The story from end to end on very little, and the trained checkpoint that other tests use."""

from __future__ import annotations

import json

import pytest

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


def test_the_story_runs_from_data_to_report_and_prints_what_it_measured(tmp_path, capsys):
    folder, sink = tmp_path / "demo", Recorder()
    folder.mkdir()
    for left in (RECIPE, "old.txt"):
        (folder / left).write_text("of an earlier demo")
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
    assert not (folder / "old.txt").exists(), "the earlier demo is still there"


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
