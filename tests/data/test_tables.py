"""Columns of tables whose values JSON has no type for: never trained as their Python text."""

from __future__ import annotations

from collections.abc import Callable
from datetime import date, datetime, time, timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pyarrow.parquet
import pytest

from ossia.config import Recipe
from ossia.data.dataset import Dataset, open_datasets, scan
from ossia.data.formats import Encoder, build
from ossia.data.layout import recognise
from ossia.data.sources import HubRows, open_rows
from ossia.errors import DataError
from ossia.harmony.render import Renderer, TrainOn
from ossia.harmony.vocab import Vocabulary
from tests.data.test_formats import ANSWER, USER

Open = Callable[[pyarrow.Table], Dataset]


@pytest.fixture
def open_table(tmp_path: Path, make_recipe: Callable[..., Recipe], vocab: Vocabulary) -> Open:
    """A Parquet file as a dataset."""

    def open_(table: pyarrow.Table) -> Dataset:
        pyarrow.parquet.write_table(table, tmp_path / "t.parquet")
        return open_datasets(make_recipe(str(tmp_path / "t.parquet")), vocab, check=False).train[0]

    return open_


def calling(arguments: Any) -> dict[str, Any]:
    call = {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": arguments}}]}
    return {"messages": [[USER, call]]}


@pytest.mark.parametrize(
    "value", [b"abc", Decimal("1.5"), datetime(2020, 1, 2), date(2020, 1, 2), time(1), timedelta(1)]
)
def test_a_value_that_json_has_no_type_for_is_never_taken_for_text(
    open_table: Open, make_recipe: Callable[..., Recipe], vocab: Vocabulary, value: object
) -> None:
    kind = type(value).__name__
    message = f"{kind}, which JSON doesn't have; store it as text"
    table = pyarrow.table({"text": pyarrow.array([value])})
    with pytest.raises(DataError, match=rf"t.parquet:1: text: expected text, found a value of the type {message}"):
        open_table(table).read(0)
    rows = HubRows("owner/rows", datasets.Dataset(table))
    layout, _ = recognise(rows, make_recipe("some/rows").data[0], make_recipe("some/rows").harmony)
    with pytest.raises(DataError, match=message):
        build(layout, rows.row(0), rows.where(0), Encoder(vocab, Renderer(vocab), TrainOn()))
    with pytest.raises(DataError, match=rf"completion: expected text or a list of messages, found a value .*{kind}"):
        open_table(pyarrow.table({"prompt": ["?"], "completion": pyarrow.array([value])})).read(0)
    with pytest.raises(DataError, match=rf"arguments.x: can't be written as JSON: found TableValue <{kind}; store"):
        open_table(pyarrow.table(calling({"x": value}))).read(0)


def test_inside_messages_tools_and_ids_too(open_table: Open) -> None:
    said = {"messages": [[{"role": "user", "content": b"?"}, {"role": "assistant", "content": b"!"}]]}
    with pytest.raises(DataError, match=r"messages\[0\].content: expected text .* found TableValue <bytes; sto"):
        open_table(pyarrow.table(said)).read(0)
    with pytest.raises(DataError, match=r"tools: expected a list of tools, found a value of the type bytes"):
        open_table(pyarrow.table({"messages": [[USER, ANSWER]], "tools": [b"[]"]})).read(0)
    default = {"type": "object", "properties": {"x": {"type": "string", "default": b"a"}}}
    tools = [[{"function": {"name": "f", "parameters": default}}]]
    with pytest.raises(DataError, match=r"parameters.properties.x.default: can't be written as JSON: found TableValue"):
        open_table(pyarrow.table({"messages": [[USER, ANSWER]], "tools": tools})).read(0)
    with pytest.raises(DataError, match=r"ids\[0\]: expected a list of whole numbers, found 1.0"):
        open_table(pyarrow.table({"ids": [[1.0, 2.0]], "weights": [[0.0, 1.0]]})).read(0)
    with pytest.raises(DataError, match=r"weights\[0\]: expected a list of numbers, found a value of the type Decimal"):
        open_table(pyarrow.table({"ids": [[1, 2]], "weights": [[Decimal("0"), Decimal("1")]]})).read(0)
    with pytest.raises(DataError, match=r"completion: expected text or a list of messages, found an object"):
        open_table(pyarrow.table({"prompt": ["?"], "completion": [{"a": "b"}]})).read(0)


def test_a_map_is_no_object_and_says_so(open_table: Open) -> None:
    function = pyarrow.struct(
        [("name", pyarrow.string()), ("arguments", pyarrow.map_(pyarrow.string(), pyarrow.string()))]
    )
    call = pyarrow.struct([("function", function)])
    kind = pyarrow.list_(pyarrow.struct([("role", pyarrow.string()), ("tool_calls", pyarrow.list_(call))]))
    rows = [[{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": [("x", "1")]}}]}]]
    with pytest.raises(DataError, match=r"function.arguments: expected a JSON object or its text, found list"):
        open_table(pyarrow.table({"messages": pyarrow.array(rows, kind)})).read(0)


def test_a_column_that_is_not_used_may_hold_anything(open_table: Open) -> None:
    counts = scan([open_table(pyarrow.table({"text": ["abc"], "image": [b"\xff\xd8"]}))])
    assert counts.samples == 1
    assert counts.ignored == {"image": 1}


def test_two_columns_of_one_name_are_refused(open_table: Open) -> None:
    columns = [pyarrow.array([letter]) for letter in "abc"]
    with pytest.raises(DataError, match=r"t.parquet: two columns are called 'completion'\n  next: rename or drop"):
        open_table(pyarrow.table(columns, names=["prompt", "completion", "completion"]))


def test_a_broken_page_is_told_by_its_file(tmp_path: Path) -> None:
    file = tmp_path / "t.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"text": [f"{n} abc" for n in range(10_000)]}), file, compression="zstd")
    raw = bytearray(file.read_bytes())
    raw[200:4000] = b"\xff" * 3800
    file.write_bytes(raw)
    with pytest.raises(DataError, match=r"t.parquet: not a Parquet file that can be read: .+\n  next: write it again"):
        open_rows(str(file))
