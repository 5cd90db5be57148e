"""What is wrong on this machine is told before any weight is read: files, folders and config.json are all it takes."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from ossia.config import check_recipe, is_hub_name, read_recipe
from ossia.errors import RecipeError

TEXT = "model: tiny\ndata:\n  - path: rows/train.jsonl\nmax_length: 128\noutput: runs/a\n"
Check = Callable[..., str]


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Path]:
    """A current folder with a checkpoint's config.json and a data file, and nothing else."""
    (tmp_path / "tiny").mkdir()
    (tmp_path / "tiny" / "config.json").write_text(json.dumps({"max_position_embeddings": 4096}))
    (tmp_path / "rows").mkdir()
    (tmp_path / "rows" / "train.jsonl").write_text("{}\n")
    before = Path.cwd()
    os.chdir(tmp_path)
    yield tmp_path
    os.chdir(before)


@pytest.fixture
def check(place: Path) -> Check:
    """Checks a recipe's text; what is said, "" if nothing is wrong."""

    def told(text: str = TEXT, *overrides: str, resume: bool = False, writes: bool = True) -> str:
        Path("my.yaml").write_text(text)
        recipe, places = read_recipe(Path("my.yaml"), overrides)
        try:
            check_recipe(recipe, places, resume=resume, writes=writes)
        except RecipeError as error:
            return str(error)
        return ""

    return told


def test_a_recipe_that_fits_the_machine_passes(check: Check) -> None:
    assert check() == ""


def test_a_length_over_the_models_limit_is_refused_with_both_numbers(check: Check) -> None:
    assert check(TEXT, "max_length=4096") == ""
    assert check(TEXT.replace("128", "4097")).startswith("my.yaml:4: `max_length` is 4097, over the 4096 positions")


def test_a_missing_data_file_names_the_nearest_in_its_folder(check: Check) -> None:
    told = check(TEXT.replace("train.jsonl", "trian.jsonl"))
    assert told.startswith(
        "my.yaml:3: `data.0.path`: there is no file or folder rows/trian.jsonl; did you mean rows/train"
    )
    assert "the folder nowhere is not there either" in check(TEXT, "data.0.path=nowhere/x.jsonl")
    assert "`eval.data.0.path`" in check(TEXT + "eval: {data: {path: held.jsonl}}\n")


def test_a_model_folder_has_to_be_there_and_hold_a_config(check: Check, place: Path) -> None:
    assert "`model`: there is no folder tinny; did you mean tiny?" in check(TEXT, "model=tinny")
    (place / "tiny" / "config.json").unlink()
    assert "tiny has no config.json" in check()
    (place / "x.gguf").write_bytes(b"GGUF")
    told = check(TEXT, "model=x.gguf")
    assert "`model`: x.gguf is a GGUF file\n" in told
    assert "ossia export x.gguf --to hf-mxfp4" in told
    (place / "tiny" / "config.json").write_text("{")
    assert "is not valid JSON" in check()


def test_a_run_folder_as_the_model_is_told_with_what_to_name_instead(check: Check, place: Path) -> None:
    (place / "tiny" / "config.json").unlink()
    (place / "tiny" / "recipe.yaml").write_text("model: x")
    told = check()
    assert "`model`: tiny is a run folder, not a model\n" in told
    assert "the model that it trained, and `adapter.init_from: tiny` to train its adapter on" in told
    (place / "tiny" / "model").mkdir()
    assert "next: name tiny/model " in check()


def test_everything_in_the_way_is_told_at_once(check: Check) -> None:
    told = check(TEXT, "model=tinny", "data.0.path=x.jsonl", "adapter={init_from: gone}")
    assert [line.split(":")[0] for line in told.splitlines() if not line.startswith(" ")] == [
        "command line, model=tinny",
        "command line, data.0.path=x.jsonl",
        "command line, adapter={init_from",
    ]


def begin_run(place: Path, text: str) -> None:
    """A run folder as a run leaves it after its first step."""
    (place / "runs" / "a").mkdir(parents=True)
    (place / "my.yaml").write_text(text)
    recipe, _ = read_recipe(place / "my.yaml")
    (place / "runs" / "a" / "recipe.yaml").write_text(recipe.to_yaml())
    (place / "runs" / "a" / "events.jsonl").write_text('{"step": 1}\n')


def test_an_output_that_holds_another_run_is_refused_and_told_what_differs(check: Check, place: Path) -> None:
    begin_run(place, TEXT)
    told = check(TEXT, "train.steps=5")
    assert "`output`: runs/a holds a run of another recipe (train.steps: null there, 5 here" in told
    assert "resumed with the recipe it began with" in check(TEXT, "train.steps=5", "train.seed=1", resume=True)
    many = ("train.steps=5", "train.seed=1", "dtype=float32", "on_long=drop", "log.sinks=[wandb]")
    assert "(dtype: bfloat16 there, float32 here; on_long: error there, drop here; train.steps:" in check(TEXT, *many)
    assert "; and 3 more)" in check(TEXT, *many)  # the seed, the sinks, and epochs, which steps replaced


def test_the_same_run_needs_resume(check: Check, place: Path) -> None:
    begin_run(place, TEXT)
    assert "runs/a holds this run already; add --resume" in check()
    assert check(resume=True) == ""
    assert check(TEXT, "train.save_every=3", resume=True) == ""


def test_a_run_that_stopped_before_its_first_step_can_be_started_again(check: Check, place: Path) -> None:
    begin_run(place, TEXT)
    (place / "runs" / "a" / "events.jsonl").write_text("")
    assert check(TEXT, "train.steps=5") == ""
    (place / "runs" / "a" / "checkpoints" / "step-00000001").mkdir(parents=True)
    assert "holds a run of another recipe" in check(TEXT, "train.steps=5")


def test_looking_at_data_does_not_mind_the_output_folder(check: Check, place: Path) -> None:
    begin_run(place, TEXT)
    assert check(TEXT, "train.steps=5", writes=False) == ""


def test_an_output_that_is_the_current_folder_or_one_around_it_is_refused(check: Check, place: Path) -> None:
    for folder in (".", "./", "rows/..", "..", str(place)):
        assert "everything here would be in the run folder; name one of its own" in check(TEXT, f"output={folder}")
    assert check(TEXT, "output=rows") == check(TEXT, "output=new/run") == ""


def test_an_output_that_cannot_be_written_is_refused_and_nothing_is_left_there(check: Check, place: Path) -> None:
    assert "`output`: rows/train.jsonl/x can't be a folder: Not a directory" in check(TEXT, "output=rows/train.jsonl/x")
    assert "`output`: /proc/x can't be a folder: " in check(TEXT, "output=/proc/x")
    assert check(TEXT, "output=/proc/x", writes=False) == ""
    assert check(TEXT, "output=new/run") == ""
    assert not (place / "new").exists()


def test_a_link_that_leads_nowhere_is_told_as_one(check: Check, place: Path) -> None:
    (place / "link").symlink_to("gone")
    assert "`model`: link is a link to gone, which is not there" in check(TEXT, "model=link")


def test_a_run_cannot_be_made_longer_and_what_to_do_instead_is_told(check: Check, place: Path) -> None:
    begin_run(place, f"{TEXT}adapter: {{rank: 2}}\n")
    told = check(f"{TEXT}adapter: {{rank: 2}}\n", "train.steps=5", resume=True)
    assert "a run keeps its length, as the learning rate of every step depends" in told
    assert "to train on, start another run with adapter.init_from=runs/a" in told
    (place / "runs" / "a" / "recipe.yaml").unlink()
    (place / "runs" / "a").rename(place / "old")
    begin_run(place, TEXT)
    assert "start another run with model=runs/a/model" in check(TEXT, "train.epochs=2.0", resume=True)


def test_an_output_that_is_a_file_is_refused(check: Check, place: Path) -> None:
    assert "is a file; name a folder" in check(TEXT, "output=my.yaml")


@pytest.mark.parametrize(
    ("name", "hub"),
    [
        ("openai/gpt-oss-20b", True),
        ("rows/missing", False),
        ("tiny", False),
        ("./openai/gpt-oss-20b", False),
        ("/models/x", False),
        ("owner/rows.jsonl", False),
        ("a/b/c", False),
    ],
)
def test_a_hub_name_is_told_from_a_path(place: Path, name: str, hub: bool) -> None:
    assert is_hub_name(name) is hub


def test_a_hub_model_is_checked_in_the_folder_it_was_put_in(place: Path) -> None:
    Path("my.yaml").write_text(TEXT.replace("tiny", "openai/gpt-oss-20b").replace("128", "5000"))
    recipe, places = read_recipe(Path("my.yaml"))
    check_recipe(recipe, places)
    with pytest.raises(RecipeError, match="over the 4096 positions"):
        check_recipe(recipe, places, model_folder=place / "tiny")
