"""What becomes of rows: bad ones, long ones, untrained ones, held-out ones, and how often each is read."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ossia.config import Recipe
from ossia.data.dataset import Dataset, Datasets, EpochOrder, Statistics, in_order, open_datasets, scan
from ossia.errors import DataError, RecipeError, RunError
from ossia.harmony.vocab import Vocabulary

Open = Callable[..., Datasets]
GOOD = {"prompt": "What is 2 + 2?", "completion": "4"}


@pytest.fixture
def open_rows_as(write_rows: Callable[..., str], make_recipe: Callable[..., Recipe], vocab: Vocabulary) -> Open:
    """Opens a source that holds these rows."""

    def open_(rows: list[dict[str, Any]], name: str = "rows.jsonl", **keys: Any) -> Datasets:
        return open_datasets(make_recipe(write_rows(rows, name), **keys), vocab)

    return open_


def texts(count: int, first: int = 0) -> list[dict[str, str]]:
    return [{"text": f"text number {number}"} for number in range(first, first + count)]


def sources(datasets: tuple[Dataset, ...]) -> list[str]:
    return [sample.source for sample in in_order(datasets)]


def words(datasets: tuple[Dataset, ...], vocab: Vocabulary) -> set[str]:
    return {vocab.decode(sample.ids.tolist()) for sample in in_order(datasets)}


def test_a_bad_row_is_an_error_with_its_place_field_and_a_next_step(open_rows_as: Open) -> None:
    (dataset,), *_ = open_rows_as([GOOD, {"prompt": "?", "completion": 4}])
    assert len(dataset.read(0).samples) == 1
    with pytest.raises(DataError, match=r"rows.jsonl:2: completion: expected .*, found a number\n  next: .*on_bad_row"):
        dataset.read(1)


def test_bad_rows_can_be_skipped_counted_and_told(open_rows_as: Open) -> None:
    bad = [{"prompt": "?", "completion": number} for number in range(7)]
    datasets = open_rows_as([GOOD, *bad, GOOD], on_bad_row="skip")
    counts = scan(datasets.train)
    assert (counts.rows, counts.samples, counts.skipped) == (9, 2, 7)
    assert len(counts.reasons) == 5
    assert "rows.jsonl:2: completion: expected" in counts.reasons[0]
    assert counts.warnings()[0].startswith("rows skipped: 7 of 9, the first:\n  ")


def test_a_line_that_is_no_json_is_a_bad_row_like_any_other(
    tmp_path: Path, make_recipe: Callable[..., Recipe], vocab: Vocabulary
) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps(GOOD) + '\n{"prompt": \n' + json.dumps(GOOD) + "\n")
    counts = scan(open_datasets(make_recipe(str(file), on_bad_row="skip"), vocab).train)
    assert (counts.samples, counts.skipped) == (2, 1)
    assert "rows.jsonl:2: not valid JSON" in counts.reasons[0]
    with pytest.raises(DataError, match=r"rows.jsonl:2: not valid JSON: .*\n  next: .*on_bad_row"):
        list(in_order(open_datasets(make_recipe(str(file)), vocab).train))


def test_a_scan_tells_of_all_bad_rows_at_once(open_rows_as: Open) -> None:
    bad = [{"prompt": "?"}, {"completion": "!"}, {"prompt": "?", "completion": "x" * 500}]
    datasets = open_rows_as([GOOD, *bad], max_length=300)
    seen: list[int] = []
    with pytest.raises(DataError) as error:
        scan(datasets.train, seen.append)
    lines = str(error.value).splitlines()
    assert lines[0] == "3 of 4 rows can't be used:"
    assert "rows.jsonl:2: completion: missing" in lines[1]
    assert "rows.jsonl:3: prompt: missing" in lines[2]
    assert "rows.jsonl:4: " in lines[3]
    assert "more than max_length, 300" in lines[3]
    assert seen == [1, 2, 3, 4]


def test_a_long_sample_is_an_error_or_dropped_or_cut_at_its_end_and_counted(open_rows_as: Open) -> None:
    rows = [{"text": "short"}, {"text": "a text of more than ten tokens"}]
    with pytest.raises(DataError, match=r"rows.jsonl:2: 31 tokens, more than max_length, 10\n  next: raise max_length"):
        list(in_order(open_rows_as(rows, max_length=10).train))

    dropped = scan(open_rows_as(rows, max_length=10, on_long="drop").train)
    assert (dropped.samples, dropped.dropped, dropped.truncated, dropped.longest) == (1, 1, 0, 6)
    assert dropped.warnings() == ["samples dropped, longer than max_length: 1"]

    cut = open_rows_as(rows, max_length=10, on_long="truncate").train
    counts = Statistics()
    samples = list(in_order(cut, counts))
    assert (counts.samples, counts.dropped, counts.truncated, counts.longest) == (2, 0, 1, 10)
    assert bytes(samples[1].ids.tolist()) == b"a text of "
    assert samples[1].weights.tolist() == [0] + [1] * 9
    assert [(span.start, span.end) for span in samples[1].spans] == [(0, 10)]


def test_a_cut_sample_without_a_trained_token_is_left_out_and_counted(open_rows_as: Open) -> None:
    rows = [{"ids": [1, 2, 3, 4], "weights": [0, 0, 0, 1]}, {"ids": [1, 2], "weights": [0, 1]}]
    counts = scan(open_rows_as(rows, max_length=3, on_long="truncate").train)
    assert (counts.samples, counts.truncated, counts.untrained) == (1, 1, 1)


def test_a_file_that_changes_is_never_skipped_as_bad_rows(write_rows: Callable[..., str], open_rows_as: Open) -> None:
    (dataset,), *_ = open_rows_as([GOOD] * 3, on_bad_row="skip")
    write_rows([GOOD] * 4)
    with pytest.raises(RunError, match="changed while it was in use"):
        dataset.read(0)


@pytest.mark.parametrize(
    "row",
    [
        {"ids": [1, 2], "weights": [1, 0]},  # nothing is before the first id to predict it from
        {"messages": [{"role": "user", "content": "nobody answers"}]},
        {"messages": [{"role": "user", "content": "?"}, {"role": "assistant", "content": "!", "train": False}]},
    ],
)
def test_a_dataset_without_a_trained_token_is_an_error(open_rows_as: Open, row: dict[str, Any]) -> None:
    with pytest.raises(DataError, match=r"rows.jsonl: no token of this source is trained\n  samples left out, .*: 2"):
        open_rows_as([row, row])


def test_a_dataset_of_which_every_row_is_skipped_is_an_error_that_says_why(open_rows_as: Open) -> None:
    with pytest.raises(
        DataError, match=r"no token of this source is trained\n  rows skipped: 2 of 2, the first:\n .*messages"
    ):
        open_rows_as([{"messages": 1}, {"messages": 2}], on_bad_row="skip")


def test_columns_that_are_not_used_are_counted(open_rows_as: Open) -> None:
    counts = scan(open_rows_as([GOOD | {"lang": "en"}, GOOD | {"lang": "de", "id": 3}, GOOD]).train)
    assert counts.ignored == {"lang": 2, "id": 1}
    assert "rows with the column `lang`, which is not used: 2" in counts.warnings()


def test_statistics_survive_json(open_rows_as: Open) -> None:
    counts = scan(open_rows_as([GOOD | {"lang": "en"}, {"prompt": "?"}], on_bad_row="skip").train)
    assert Statistics.from_json(json.loads(json.dumps(counts.to_json()))) == counts
    assert counts.trained_tokens == len("C" + "final" + "M" + "4" + "R")  # <|channel|>, <|message|>, <|return|>


def test_the_held_out_rows_are_apart_about_the_share_and_the_rest(open_rows_as: Open, vocab: Vocabulary) -> None:
    train, held_out, whole, notes = open_rows_as(texts(2000), eval={"split": 0.1})
    assert not set(sources(train)) & set(sources(held_out))
    assert sorted(sources(train) + sources(held_out)) == sorted(sources(whole))
    assert 150 < len(sources(held_out)) < 250
    assert f"{len(held_out[0]):,} held out" in notes[-1]
    other = open_rows_as(texts(2000), "same.jsonl", eval={"split": 0.1}, train={"seed": 1})
    assert words(other.held_out, vocab) != words(held_out, vocab)


def test_a_row_stays_on_its_side_when_rows_are_added(open_rows_as: Open, vocab: Vocabulary) -> None:
    before = open_rows_as(texts(300), eval={"split": 0.2})
    after = open_rows_as(texts(200, 5000) + texts(300), "more.jsonl", eval={"split": 0.2})
    assert words(before.held_out, vocab) < words(after.held_out, vocab)
    assert words(before.train, vocab) < words(after.train, vocab)


def test_equal_rows_are_on_the_same_side_across_sources(
    write_rows: Callable[..., str], make_recipe: Callable[..., Recipe], vocab: Vocabulary
) -> None:
    paths = [write_rows(texts(300) * 2, "one.jsonl"), write_rows(texts(300, 150), "two.jsonl")]
    found = open_datasets(make_recipe(*paths, eval={"split": 0.3}), vocab)
    assert not words(found.train, vocab) & words(found.held_out, vocab)
    assert len(found.held_out) == 2


def test_few_rows_split_far_from_the_share_are_told_with_the_way_to_name_them(open_rows_as: Open) -> None:
    for seed in range(20):
        found = open_rows_as(texts(4), f"{seed}.jsonl", eval={"split": 0.25}, train={"seed": seed})
        is_far = len(found.held_out[0]) == 3
        assert found.notes[-1].endswith("name rows in eval.data then") == is_far
        if is_far:
            return
    raise AssertionError("no seed holds out three of four rows")


def test_a_split_that_would_come_to_nothing_holds_one_row_out(open_rows_as: Open) -> None:
    found = open_rows_as(texts(5), eval={"split": 0.0001})
    assert (len(found.train[0]), len(found.held_out[0])) == (4, 1)
    assert found.notes[-1].endswith("1 held out")
    with pytest.raises(DataError, match=r"eval.split 0.5 leaves no row of its 1 to train on"):
        open_rows_as(texts(1), eval={"split": 0.5})


def test_held_out_rows_can_be_a_source_of_their_own(
    write_rows: Callable[..., str], make_recipe: Callable[..., Recipe], vocab: Vocabulary
) -> None:
    recipe = make_recipe(write_rows(texts(3)), eval={"data": {"path": write_rows(texts(2, 50), "held.jsonl")}})
    found = open_datasets(recipe, vocab)
    assert (len(found.train[0]), len(found.held_out[0])) == (3, 2)


def rows_of_epoch(datasets: tuple[Dataset, ...], seed: int, epoch: int) -> list[tuple[int, int]]:
    order = EpochOrder(datasets, seed, epoch)
    return [(datasets.index(dataset), row) for dataset, row in (order[place] for place in range(len(order)))]


def test_a_weight_is_how_often_a_row_is_read_an_epoch(
    write_rows: Callable[..., str], make_recipe: Callable[..., Recipe], vocab: Vocabulary
) -> None:
    weights = {"once": 1.0, "half": 0.5, "twice": 2.0, "odd": 1.25}
    specs = [{"path": write_rows(texts(12), f"{name}.jsonl"), "weight": weight} for name, weight in weights.items()]
    datasets = open_datasets(make_recipe(*specs), vocab).train
    epochs = [rows_of_epoch(datasets, 0, epoch) for epoch in range(4)]
    for rows in epochs:
        assert Counter(source for source, _ in rows) == {0: 12, 1: 6, 2: 24, 3: 15}
        assert Counter(row for source, row in rows if source == 0) == dict.fromkeys(range(12), 1)
        assert Counter(row for source, row in rows if source == 2) == dict.fromkeys(range(12), 2)
    assert {row for source, row in epochs[0] if source == 1} not in (set(range(6)), set(range(6, 12)))
    for first, second in (epochs[:2], epochs[2:]):  # two halves are one whole
        assert Counter(row for source, row in first + second if source == 1) == dict.fromkeys(range(12), 1)
    assert Counter(row for rows in epochs for source, row in rows if source == 3) == dict.fromkeys(range(12), 5)
    kinds = [source for source, _ in epochs[0]]
    assert kinds != sorted(kinds)  # the sources are shuffled into each other
    assert rows_of_epoch(datasets, 0, 0) == epochs[0]
    assert rows_of_epoch(datasets, 1, 0) != epochs[0]
    assert epochs[0] != epochs[1]


def test_a_weight_below_one_row_an_epoch_or_beyond_memory_is_refused(
    write_rows: Callable[..., str], make_recipe: Callable[..., Recipe], vocab: Vocabulary
) -> None:
    datasets = open_datasets(make_recipe({"path": write_rows(texts(5)), "weight": 0.1}), vocab).train
    with pytest.raises(RecipeError, match=r"weight 0.1 of 5 rows is less than one row an epoch"):
        EpochOrder(datasets, 0, 0)
    datasets = open_datasets(make_recipe({"path": write_rows(texts(5)), "weight": 1e300}), vocab).train
    with pytest.raises(RecipeError, match=r"rows.jsonl: weight 1e\+300 of 5 rows is over 4,294,967,296 rows an epoch"):
        EpochOrder(datasets, 0, 0)


def test_statistics_of_a_checkpoint_from_before_notes_were_counted_are_read() -> None:
    record = Statistics(rows=3).to_json()
    del record["noted"]
    assert Statistics.from_json(record) == Statistics(rows=3)
