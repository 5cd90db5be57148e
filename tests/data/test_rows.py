"""Rows by number: every kind of file gives the same rows, with the line they stand on, and stays on disk."""

from __future__ import annotations

import errno
import gzip
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import ossia.data.rows
from ossia.data.sources import open_rows
from ossia.errors import DataError, RunError

ROWS = [{"text": text, "n": number} for number, text in enumerate(["plain", "Zürich 🏔", 'say "hi"\n', "", "x" * 50])]


def as_text(rows: list[dict[str, object]]) -> str:
    return "\n".join(json.dumps(row, ensure_ascii=False) for row in rows)


def all_rows(path: Path) -> list[dict[str, object]]:
    rows = open_rows(str(path))
    return [rows.row(index) for index in reversed(range(len(rows)))][::-1]


@pytest.mark.parametrize("chunk_bytes", [1, 7, 64, 1 << 20])
@pytest.mark.parametrize(
    ("text", "lines"),
    [
        (as_text(ROWS), [1, 2, 3, 4, 5]),
        (as_text(ROWS) + "\n", [1, 2, 3, 4, 5]),
        ("\ufeff" + as_text(ROWS), [1, 2, 3, 4, 5]),
        (as_text(ROWS).replace("\n", "\r\n") + "\r\n", [1, 2, 3, 4, 5]),
        ("\n\n" + as_text(ROWS).replace("\n", "\n  \t\n\r\n") + "\n\n   ", [3, 6, 9, 12, 15]),
    ],
    ids=["no last newline", "last newline", "byte order mark", "crlf", "blank lines"],
)
def test_a_row_of_json_lines_is_found_by_its_number_with_its_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, lines: list[int], chunk_bytes: int
) -> None:
    monkeypatch.setattr(ossia.data.rows, "_CHUNK_BYTES", chunk_bytes)
    file = tmp_path / "rows.jsonl"
    file.write_bytes(text.encode())
    assert all_rows(file) == ROWS
    rows = open_rows(str(file))
    assert [rows.where(index) for index in range(len(rows))] == [f"{file}:{line}" for line in lines]


@pytest.mark.parametrize("indent", [None, 2])
def test_a_json_array_gives_its_objects_with_the_lines_they_begin_on(tmp_path: Path, indent: int | None) -> None:
    file = tmp_path / "rows.json"
    file.write_text("\ufeff" + json.dumps(ROWS, ensure_ascii=False, indent=indent) + "\n", encoding="utf-8")
    assert all_rows(file) == ROWS
    rows = open_rows(str(file))
    begins = [1] * len(ROWS) if indent is None else [2 + 4 * number for number in range(len(ROWS))]
    assert [rows.where(index) for index in range(len(rows))] == [f"{file}:{line}" for line in begins]


def test_a_json_file_may_hold_json_lines(tmp_path: Path) -> None:
    file = tmp_path / "rows.json"
    file.write_text(as_text(ROWS), encoding="utf-8")
    assert all_rows(file) == ROWS


def test_gzip_and_parquet_give_the_same_rows_as_json_lines(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    packed, table = tmp_path / "rows.jsonl.gz", tmp_path / "rows.parquet"
    packed.write_bytes(gzip.compress(as_text(ROWS).encode()))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), table, row_group_size=2)
    assert all_rows(packed) == ROWS
    assert all_rows(table) == ROWS
    assert open_rows(str(table)).where(3) == f"{table}:4"


def test_members_that_arrow_fills_with_null_are_absent(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    rows = [{"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "thinking": "hm", "content": "ho"}]}]
    file = tmp_path / "rows.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), file)
    assert pyarrow.parquet.read_table(file).to_pylist() != rows  # Arrow gives the user a `thinking` too
    assert all_rows(file) == rows


def test_a_hub_dataset_gives_the_same_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    from ossia.data.sources import _open_hub

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "set"
    folder.mkdir()
    (folder / "train.jsonl").write_text(as_text(ROWS), encoding="utf-8")
    rows = _open_hub(str(folder), "train")  # the same loader that takes a hub name
    assert [rows.row(index) for index in range(len(rows))] == ROWS
    assert rows.where(1) == f"{folder}/train:2"
    assert len(set(rows.hashes(0).tolist())) == len(ROWS)
    with pytest.raises(DataError, match="split `nope`"):
        _open_hub(str(folder), "nope")


def test_a_hub_that_cannot_be_reached_is_told_in_two_lines(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import datasets
    from huggingface_hub.utils import logging

    def unreachable(name: str, **_: object) -> None:
        logging.get_logger("huggingface_hub.utils._http").warning("Retrying in 1s [Retry 1/5].")
        raise ConnectionError(f"Couldn't reach '{name}' on the Hub")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    before = logging.get_verbosity()
    with pytest.raises(DataError, match=r"owner/rows: neither a file or folder here, nor a hub .*Couldn't reach"):
        open_rows("owner/rows")
    assert capsys.readouterr().err == "owner/rows: not a file or folder here; asking the Hugging Face hub for it\n"
    assert logging.get_verbosity() == before


def test_a_folder_is_its_data_files_one_after_the_other(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "2.jsonl").write_text(as_text(ROWS[:2]))
    (tmp_path / "1.json").write_text(json.dumps(ROWS[2:]))
    (tmp_path / "README.md").write_text("not data")
    (tmp_path / ".hidden.jsonl").write_text("{}")
    rows = open_rows(str(tmp_path))
    assert [rows.row(index) for index in range(len(rows))] == ROWS[2:] + ROWS[:2]
    assert rows.where(3) == f"{tmp_path}/b/2.jsonl:1"
    assert len(rows.hashes(0)) == len(ROWS)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("rows.jsonl", b'{"text": "a"}\n{"text": "b"\n', r"rows.jsonl:2: not valid JSON: .* at column 13"),
        ("rows.jsonl", b'{"text": "a"}\n["b"]\n', r"rows.jsonl:2: expected a JSON object .* found list"),
        ("rows.jsonl", b'{"text": "a"}\n{"text": "\xff"}\n', r"rows.jsonl:2: not UTF-8 text at byte 11 of the row"),
        ("rows.jsonl", b'{"text": ' + b"[" * 100_000, r"rows.jsonl:1: not valid JSON: nested too deeply"),
        ("rows.jsonl", b'{"n": ' + b"9" * 5000 + b"}", r"rows.jsonl:1: not valid JSON: .*digits"),
        ("rows.json", b"[" * 100_000, r"rows.json:1: not valid JSON: .*recursion"),
        ("rows.jsonl", b" \n\n", r"rows.jsonl: the file holds no rows"),
        ("rows.json", b"[]", r"rows.json: the file holds no rows"),
        ("rows.json", b'[{"text": "a"},\n {"text" "b"}]', r"rows.json:2: not valid JSON: .* at column 10"),
        ("rows.json", b'[{"text": "a"}\n {"text": "b"}]', r"rows.json:2: not valid JSON: expected ',' or ']'"),
        ("rows.json", b'[{"text": "a"}] x', r"rows.json:1: not valid JSON: text after the end"),
        ("rows.json", b'[{"text": "a"}', r"rows.json:1: not valid JSON: expected ',' or ']'"),
        ("rows.json", b'[{"text": "a"},\n 3]', r"rows.json:2: expected a JSON object .* found int"),
        ("rows.jsonl.gz", gzip.compress(b'{"text": "a"}\n', mtime=0)[:-9], r"rows.jsonl.gz: not a whole gzip file"),
        ("rows.parquet", b"nonsense", r"rows.parquet: not a Parquet file"),
        ("rows.csv", b"a,b", r"rows.csv: unknown kind of data file\n  allowed: .jsonl"),
        ("rows.jsonl.zst", b"", r"rows.jsonl.zst: unknown .*\n.*\n  next: unpack it first"),
    ],
)
def test_a_broken_file_is_an_error_with_its_place(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        all_rows(tmp_path / name)


def test_a_file_that_is_not_there_is_an_error_that_says_what_may_be(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no such data file or folder\n  allowed: a file \(.jsonl"):
        open_rows(str(tmp_path / "nothing.jsonl"))
    with pytest.raises(DataError, match="no data file in this folder"):
        open_rows(str(tmp_path))


def test_a_file_that_changes_while_it_is_read_is_an_error(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text(as_text(ROWS))
    rows = open_rows(str(file))
    rows.row(0)
    file.write_text(as_text(ROWS[1:]))
    with pytest.raises(RunError, match="changed while it was in use"):
        rows.row(0)
    file.unlink()
    with pytest.raises(RunError, match="can't be read any more: No such file"):
        rows.hashes(0)


def test_hashes_are_the_rows_own_and_depend_on_the_seed(tmp_path: Path) -> None:
    one, two = tmp_path / "one.jsonl", tmp_path / "two.jsonl"
    one.write_text(as_text(ROWS))
    two.write_text("\ufeff" + as_text(ROWS[::-1]).replace("\n", " \r\n") + "\n")
    hashes = open_rows(str(one)).hashes(7)
    assert np.array_equal(hashes, open_rows(str(two)).hashes(7)[::-1])
    assert len(set(hashes.tolist())) == len(ROWS)
    assert not set(hashes.tolist()) & set(open_rows(str(one)).hashes(8).tolist())


MEASURE = """
import sys
from ossia.config import Recipe
from ossia.data.dataset import EpochOrder, open_datasets
from ossia.harmony.vocab import Vocabulary

def peak_bytes():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM"))

vocab = Vocabulary.from_file(sys.argv[1])
recipe = Recipe.model_validate({"model": "some/model", "data": {"path": sys.argv[2]}, "eval": {"split": 0.01}})
before = peak_bytes()
(dataset,), (held_out,), _, _ = open_datasets(recipe, vocab)
order = EpochOrder([dataset], 0, 0)
tokens = sum(len(sample) for position in range(0, len(order), 1000) for sample in dataset.samples(order[position][1]))
print(len(dataset) + len(held_out), tokens, peak_bytes() - before)
"""


def test_300_mb_of_rows_grow_the_process_by_less_than_60_mb(tmp_path: Path) -> None:
    from tests.data.conftest import byte_tokenizer_json

    (tmp_path / "tokenizer.json").write_text(byte_tokenizer_json())
    num_rows, block = 300_000, 1000
    with (tmp_path / "big.jsonl").open("w") as handle:
        for start in range(0, num_rows, block):
            handle.writelines(f'{{"text": "{number:>980}"}}\n' for number in range(start, start + block))
    assert (tmp_path / "big.jsonl").stat().st_size > 297_000_000
    found = subprocess.run(
        [sys.executable, "-c", MEASURE, str(tmp_path), str(tmp_path / "big.jsonl")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert found.returncode == 0, found.stderr
    rows, tokens, growth_bytes = map(int, found.stdout.split())
    (tmp_path / "big.jsonl").unlink()
    assert rows == num_rows
    assert tokens > 250 * 981
    assert growth_bytes < 60_000_000


def test_a_folder_tells_what_it_leaves_out_and_what_it_cannot_read(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n')
    for name in ("b.csv", "c.jsonl.zst", "D.JSONL"):
        (tmp_path / name).write_text("x")
    rows = open_rows(str(tmp_path))
    assert len(rows) == 1
    assert rows.remarks == ("not read, because no data file ends so: D.JSONL, b.csv, c.jsonl.zst",)
    (tmp_path / "e.jsonl").symlink_to(tmp_path / "nothing")
    with pytest.raises(DataError, match=r"e.jsonl: can't be read: No such file.*\n  next: mend or remove it"):
        open_rows(str(tmp_path))
    (tmp_path / "e.jsonl").unlink()
    (tmp_path / "e.jsonl").symlink_to(tmp_path / "e.jsonl")
    with pytest.raises(DataError, match=r"e.jsonl: can't be read: Too many levels"):
        open_rows(str(tmp_path))
    (tmp_path / "e.jsonl").unlink()
    os.mkfifo(tmp_path / "e.jsonl")
    with pytest.raises(DataError, match=r"e.jsonl: neither a file nor a folder\n  next: write its rows into a file"):
        open_rows(str(tmp_path))
    with pytest.raises(DataError, match=r"e.jsonl: neither a file nor a folder"):
        open_rows(str(tmp_path / "e.jsonl"))


def test_folders_behind_links_are_read_once_and_loops_end(tmp_path: Path) -> None:
    data, other = tmp_path / "data", tmp_path / "other"
    data.mkdir()
    other.mkdir()
    (data / "a.jsonl").write_text('{"text": "a"}\n')
    (other / "b.jsonl").write_text('{"text": "b"}\n')
    for name, target in (("loop", data), ("more", other), ("more-again", other)):
        (data / name).symlink_to(target)
    rows = open_rows(str(data))
    assert [rows.where(index) for index in range(len(rows))] == [f"{data}/a.jsonl:1", f"{data}/more/b.jsonl:1"]
    assert rows.remarks == ()


def test_a_folder_that_may_not_be_read_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n')
    (tmp_path / "closed").mkdir()
    scan = os.scandir

    def refusing(path: str) -> object:
        if str(path).endswith("closed"):
            raise PermissionError(errno.EACCES, "Permission denied", path)
        return scan(path)

    monkeypatch.setattr(os, "scandir", refusing)  # the tests may run as root, who may read everything
    with pytest.raises(DataError, match=r"closed: can't be read: Permission denied\n  next: mend or remove it"):
        open_rows(str(tmp_path))


def test_a_name_that_is_no_text_can_be_printed(tmp_path: Path) -> None:
    file = Path(os.fsdecode(bytes(tmp_path) + b"/a\xff.jsonl"))
    file.write_text('{"text": "a"}\n')
    rows = open_rows(str(file))
    assert rows.where(0) == f"{tmp_path}/a\\udcff.jsonl:1"
    assert rows.row(0) == {"text": "a"}
