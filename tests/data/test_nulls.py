"""A table has no absent keys, only nulls; what was exported from one has to say what the rows said before."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pyarrow.parquet

from ossia.config import Recipe
from ossia.data.dataset import in_order, open_datasets, scan
from ossia.data.sources import HubRows
from ossia.harmony.vocab import Vocabulary
from tests.data.conftest import Read
from tests.data.test_formats import CALL, USER, messages, same, turns


def as_a_table(*rows: dict[str, Any]) -> list[dict[str, Any]]:
    """The rows after a table had them: every object has the keys of all, null where it had none."""
    return pyarrow.Table.from_pylist(list(rows)).to_pylist()


def function(name: str, properties: dict[str, Any], **rest: Any) -> dict[str, Any]:
    return {
        "type": "function",
        "function": {"name": name, "parameters": {"type": "object", "properties": properties, **rest}},
    }


def test_rows_that_a_table_filled_up_with_nulls_say_what_they_said(read: Read) -> None:
    plain = [
        messages(
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "?", "name": "eve"},
            {"role": "assistant", "thinking": "hm", "tool_calls": [CALL], "train": True},
            {"role": "tool", "tool_call_id": "1", "content": "19C"},
            {"role": "assistant", "content": "19C.", "weight": 0.5},
            developer="Be kind.",
            tools=[
                function("weather", {"city": {"type": "string", "enum": ["Oslo"]}}, required=["city"]),
                function("find", {"where": {"type": "object", "properties": {"x": {"description": "X"}}}}),
            ],
        ),
        messages(
            USER,
            {"role": "assistant", "tool_calls": [{"name": "f", "arguments": "{}"}]},
            {"role": "tool", "name": "f", "content": "1"},
            {"role": "assistant", "channel": "final", "content": "!"},
        ),
    ]
    filled = as_a_table(*plain)
    assert filled[1]["messages"][0]["tool_calls"] is None
    assert filled[0]["tools"][0]["function"]["parameters"]["properties"]["where"] is None
    assert same(read(*filled), read(*plain))
    talk = [turns(("human", "?"), ("gpt", "!")), {"conversations": [{"from": "human", "value": "?", "name": "eve"}]}]
    talk[1]["conversations"].append({"from": "gpt", "value": "!", "weight": 2})
    assert same(read(*as_a_table(*talk)), read(*talk))


def test_a_null_among_arguments_is_kept_and_counted_in_json_and_absent_and_said_in_a_table(
    tmp_path: Path, write_rows: Callable[..., str], make_recipe: Callable[..., Recipe], vocab: Vocabulary
) -> None:
    def calling(**arguments: Any) -> dict[str, Any]:
        return messages(
            USER, {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": arguments}}]}
        )

    def shown(path: str) -> tuple[list[str], list[str], list[str]]:
        opened = open_datasets(make_recipe(path), vocab)
        texts = [vocab.decode(sample.ids.tolist()) for sample in in_order(opened.train)]
        found = [text.rpartition("<|message|>")[2].removesuffix("<|call|>") for text in texts]
        return found, opened.notes, scan(opened.train).warnings()

    rows = [calling(x=1), calling(y={"z": None, "w": "a"}), calling(x=2)]
    found, notes, warnings = shown(write_rows(rows))
    assert found == ['{"x":1}', '{"y":{"z":null,"w":"a"}}', '{"x":2}']
    assert len(notes) == 1
    assert warnings[0].startswith("rows whose tool calls have null among their arguments, kept as written: 1\n")
    table = tmp_path / "rows.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), table)
    found, notes, warnings = shown(str(table))
    assert found == ['{"x":1}', '{"y":{"w":"a"}}', '{"x":2}']
    assert "nulls are read as absent (to keep them, store arguments as JSON text)" in notes[1]
    assert warnings == []
    folder = tmp_path / "tables"
    folder.mkdir()
    for name in ("a.parquet", "b.parquet"):
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), folder / name)
    notes = shown(str(folder))[1]
    assert len(notes) == 2  # said once for all files
    assert HubRows("owner/rows", datasets.Dataset.from_list(rows)).remarks
    assert not HubRows("owner/rows", datasets.Dataset.from_list([messages(USER)])).remarks
