"""Regions of files and the journal of those that are whole, without a model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ossia.errors import CheckpointError
from ossia.pieces import Journal, Region, RegionWriter

REGIONS = {"a": Region("1", 4, 10), "b": Region("1", 14, 10), "c": Region("2", 4, 20)}
HEADS = {"1": b"one:", "2": b"two:"}
IDENTITY = {"from": "here"}


def write(target: Path, *names: str, half: str = "") -> dict[str, Region]:
    """Write some regions, and half of another; what was whole before."""
    with Journal.open(target, IDENTITY, [].append) as journal:
        target.mkdir(exist_ok=True)
        with RegionWriter(target, HEADS, REGIONS, journal=journal) as writer:
            for name in names:
                size = REGIONS[name].num_bytes // 2
                for piece in (name.encode() * size, name.upper().encode() * size):
                    writer.write(name, memoryview(piece))
            if half:
                writer.write(half, memoryview(half.encode()))
        return journal.whole


def test_pieces_come_to_their_places_in_any_order_of_regions(tmp_path: Path) -> None:
    steps = list[tuple[int, int]]()
    with RegionWriter(tmp_path, HEADS, REGIONS, progress=lambda *step: steps.append(step)) as writer:
        for name, text in (("c", b"c" * 20), ("a", b"a" * 3), ("b", b"b" * 10), ("a", b"A" * 7)):
            writer.write(name, memoryview(text))
        writer.finish({"2": 30})
    assert (tmp_path / "1").read_bytes() == b"one:aaaAAAAAAA" + b"b" * 10
    assert (tmp_path / "2").read_bytes() == b"two:" + b"c" * 20 + bytes(6)
    assert steps == [(20, 40), (23, 40), (33, 40), (40, 40)]


def test_only_whole_regions_are_kept_also_behind_a_line_that_was_torn(tmp_path: Path) -> None:
    target = tmp_path / "x"
    assert write(target, "a", half="b") == {}
    journal = tmp_path / "x.journal"
    with journal.open("ab") as file:
        file.write(b'{"name": "b", "reg')
    assert write(target, "c").keys() == {"a"}
    assert write(target).keys() == {"a", "c"}
    with pytest.raises(AssertionError, match="c is whole already"):
        write(target, "c")
    assert write(target, "b").keys() == {"a", "c"}
    assert (target / "1").read_bytes() == b"one:aaaaaAAAAAbbbbbBBBBB"
    assert [json.loads(line)["name"] for line in journal.read_text().splitlines()[1:]] == ["a", "c", "b"]


def test_where_nothing_can_be_written_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match=r"x: could not be begun: (Not a directory|File exists)"):
        Journal.open(tmp_path / "file" / "x", IDENTITY, [].append)
