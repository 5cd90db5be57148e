"""What fine-tuning does before its first step: every row is read and rendered, once."""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ossia import evaluate, sft
from ossia.config import Recipe, recipe_from_dict
from ossia.data import dataset as datasets_module
from ossia.data.dataset import open_datasets
from ossia.data.formats import build
from ossia.errors import DataError, MissingExtraError, RecipeError, RunError, UserError
from ossia.harmony.vocab import Vocabulary
from ossia.run import start
from ossia.train.events import EventLog
from tests.conftest import MakeTiny
from tests.shapes import LEAST

Make = Callable[..., Recipe]


class Ended(Exception):
    """Ends a run at its first event, which comes right before step 1."""


class EndAtStart:
    """A sink that has seen enough once a run starts."""

    def write(self, event: dict[str, Any]) -> None:
        assert event["event"] == "start"
        raise Ended(event["steps"])

    def close(self) -> None:
        pass


def say_row(number: int) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": f"Say {number}."}, {"role": "assistant", "content": f"{number}!"}]}


@pytest.fixture
def make(tiny: MakeTiny, tmp_path: Path) -> Make:
    """`make(rows, train=..., ...)`: a recipe for a least model over these rows."""

    def make_(rows: list[dict[str, Any]], train: dict[str, Any] | None = None, **keys: Any) -> Recipe:
        file = tmp_path / "rows.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        small = {"tokens_per_step": 256, "tokens_per_pack": 256, "save_every": 0}
        given = {
            "model": str(tiny(LEAST)),
            "data": {"path": str(file)},
            "adapter": {"rank": 1},
            "max_length": 256,
            "train": small | (train or {}),
            "output": str(tmp_path / "run"),
        }
        return recipe_from_dict({**given, **keys})

    return make_


@pytest.fixture
def rendered(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often each row was rendered."""
    count: Counter[str] = Counter()

    def counting(layout: Any, row: Any, where: str, *rest: Any) -> Any:
        count[where.rpartition(":")[2]] += 1
        return build(layout, row, where, *rest)

    monkeypatch.setattr(datasets_module, "build", counting)
    return count


def test_each_row_is_rendered_once_before_the_first_step(make: Make, rendered: Counter[str]) -> None:
    held_out = {"split": 0.3, "answers": 1, "answer_tokens": 1}
    recipe = make([say_row(number) for number in range(40)], {"epochs": 3.0}, eval=held_out)
    with pytest.raises(Ended) as caught:
        sft.run(recipe, sink=EndAtStart())
    assert caught.value.args[0] > 3
    assert rendered == {str(line): 1 for line in range(1, 41)}


def test_epochs_give_the_steps_that_the_data_lasts_for(make: Make) -> None:
    recipe = make([say_row(number) for number in range(40)], {"epochs": 1.5}, eval={"split": 0.2, "answers": 0})
    result = sft.run(recipe)
    events = [json.loads(line) for line in (result.folder / "events.jsonl").read_text().splitlines()]
    assert events[0]["steps"] == result.step == sum(event["event"] == "step" for event in events)


def bad_row() -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": 3}]}


@pytest.mark.parametrize("train", [{"steps": 2}, {"epochs": 1.0}])
def test_bad_rows_end_a_run_before_its_first_step_and_are_told_together(make: Make, train: dict[str, Any]) -> None:
    rows = [say_row(1), bad_row(), say_row(2), bad_row()]
    with pytest.raises(DataError, match=r"2 of 4 rows can't be used:\n  .*rows.jsonl:2: .*\n  .*rows.jsonl:4: "):
        sft.run(make(rows, train), sink=EndAtStart())


def test_very_many_rows_are_read_beforehand_only_if_the_steps_depend_on_them(
    make: Make, rendered: Counter[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sft, "ROWS_TO_CHECK", 3)
    rows = [say_row(1), say_row(2), say_row(3), bad_row()]
    with pytest.raises(Ended):
        sft.run(make(rows, {"steps": 1}), sink=EndAtStart())
    assert "4 rows: checked as they are read; `ossia data RECIPE` checks them all" in capsys.readouterr().err
    assert rendered == {"1": 1}  # that something is trained is known by then
    with pytest.raises(DataError, match="1 of 4 rows can't be used"):
        sft.run(make(rows, {"epochs": 1.0}), sink=EndAtStart())


@pytest.mark.parametrize("rows_to_check", [0, 9])
def test_a_source_of_which_nothing_is_trained_ends_a_run(
    make: Make, monkeypatch: pytest.MonkeyPatch, rows_to_check: int
) -> None:
    monkeypatch.setattr(sft, "ROWS_TO_CHECK", rows_to_check)
    with pytest.raises(DataError, match=r"rows.jsonl: no token of this source is trained\n  samples left out, .*: 2"):
        sft.run(make([{"messages": say_row(n)["messages"][:1]} for n in range(2)], {"steps": 1}))


@pytest.mark.parametrize("rows_to_check", [0, 99])
def test_held_out_samples_are_those_of_the_held_out_rows_up_to_their_limit(
    make: Make, monkeypatch: pytest.MonkeyPatch, rows_to_check: int
) -> None:
    monkeypatch.setattr(sft, "ROWS_TO_CHECK", rows_to_check)

    def held_out(**limit: int) -> list[str]:
        rows = [say_row(number) for number in range(40)]
        recipe = make(rows, {"steps": 1}, eval={"split": 0.3, **limit})
        datasets = open_datasets(recipe, Vocabulary.from_file(Path(recipe.model)), check=False)
        assert len(datasets.held_out[0]) > 5
        return [sample.source for sample in sft.read_rows(recipe, datasets, print)[0]]

    everything = held_out()
    assert len(everything) > 5
    assert held_out(max_samples=5) == everything[:5]


def test_epochs_that_are_less_than_a_row_are_refused(make: Make) -> None:
    with pytest.raises(
        RecipeError, match=r"train.epochs: 0.0001 of 60 rows gives nothing to train on.*\n  next: raise"
    ):
        sft.run(make([say_row(number) for number in range(60)], {"epochs": 0.0001}))


@pytest.mark.parametrize(
    ("rows", "keys", "kind", "words"),
    [
        ([say_row(1), bad_row()], {}, DataError, "1 of 2 rows can't be used"),
        ([{"what": 1}], {}, DataError, "the format isn't known from the columns what"),
        ([say_row(1)], {"log": {"sinks": ["trackio"]}}, MissingExtraError, "log.sinks: trackio needs a package"),
        ([say_row(1)], {"train": {"epochs": 1e-9}}, RecipeError, "gives nothing to train on"),
    ],
)
def test_what_can_be_known_before_weights_are_read_is_told_before(
    make: Make,
    monkeypatch: pytest.MonkeyPatch,
    rows: list[dict[str, Any]],
    keys: dict[str, Any],
    kind: type[UserError],
    words: str,
) -> None:
    monkeypatch.setitem(sys.modules, "trackio", None)  # how Python marks a module that can't be imported
    monkeypatch.setattr(start, "open_model", None)
    with pytest.raises(kind, match=words):
        sft.run(make(rows, **{"train": {"steps": 1}, **keys}))


def test_a_folder_that_another_process_trains_into_is_told_before_weights_are_read(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(start, "open_model", None)
    recipe = make([say_row(1)], {"steps": 1})
    with EventLog(recipe.output), pytest.raises(RunError, match="another process is training into this folder"):
        sft.run(recipe)


def test_files_of_others_in_a_new_runs_folder_are_told_and_none_is_written_over(
    make: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "mine"
    folder.mkdir()
    for name in ("notes.txt", "rows.jsonl", "my.yaml", ".hidden"):
        (folder / name).touch()
    recipe = make([say_row(1)], {"steps": 1}, output=str(folder))
    with pytest.raises(Ended):
        sft.run(recipe, sink=EndAtStart())
    assert f"{folder}: holds what is of no run, and stays as it is: notes.txt, rows.jsonl\n" in capsys.readouterr().err
    other = tmp_path / "other"
    (other / "model").mkdir(parents=True)  # perhaps the model to train; the trained one goes there
    monkeypatch.setattr(start, "open_model", None)
    with pytest.raises(
        RunError, match=r"other: `model` is there already, though no run is: the run would write over it"
    ):
        sft.run(make([say_row(1)], {"steps": 1}, output=str(other)))
    assert [path.name for path in other.iterdir()] == ["model"]


def test_a_step_that_is_no_whole_number_of_packs_is_said(
    make: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for step, said in ((700, True), (512, False)):
        recipe = make([say_row(1)], {"steps": 1, "tokens_per_step": step}, output=f"{tmp_path}/{step}")
        with pytest.raises(Ended):
            sft.run(recipe, sink=EndAtStart())
        words = "train.tokens_per_step 700: 2 packs of 256 tokens fit, so a step has at most 512"
        assert (words in capsys.readouterr().err) is said


def test_outside_a_terminal_reading_rows_says_how_far_it_is(
    make: Make, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ticks = iter(range(0, 10_000, 4))
    monkeypatch.setattr("ossia.data.preview.monotonic", lambda: next(ticks))
    with pytest.raises(Ended):
        sft.run(make([say_row(number) for number in range(9)], {"steps": 1}), sink=EndAtStart())
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("reading rows")]
    assert said == ["reading rows: 3 of 9", "reading rows: 6 of 9", "reading rows: 9 of 9"]


def test_held_out_loss_needs_rows_that_are_held_out(
    make: Make, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [say_row(number) for number in range(9)]
    recipe = make(rows)
    with monkeypatch.context() as no_weights:
        no_weights.setattr(evaluate, "open_model", None)
        with pytest.raises(RecipeError, match=r"the recipe holds no rows out\n  next: .*eval.data=.*rows.jsonl"):
            evaluate.run(recipe, adapter=None)
    found = evaluate.run(make(rows, eval={"data": recipe.data[0].path}), adapter=None)
    assert found.samples == 9
    assert "rows.jsonl: 9 rows, format messages" in capsys.readouterr().err
