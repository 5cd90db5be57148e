"""Vocabulary: text to ids and back, and the files it refuses."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ossia.errors import TokenizerError
from ossia.harmony import Vocabulary, prune
from tests.harmony.support import TEXTS, o200k, o200k_json

SMALL = settings(max_examples=200, derandomize=True, deadline=None, database=None)


@cache
def small_text() -> str:
    """A whole gpt-oss-like tokenizer.json of a few hundred tokens, to break in the tests."""
    return prune(o200k_json(), ["Hello world"])[0]


def small_json() -> dict[str, Any]:
    return json.loads(small_text())


def test_the_special_tokens_have_the_ids_of_the_released_models() -> None:
    special = o200k().special
    assert special["<|return|>"] == 200002
    assert special["<|constrain|>"] == 200003
    assert [special[f"<|{name}|>"] for name in ("channel", "start", "end", "message", "call")] == [
        200005,
        200006,
        200007,
        200008,
        200012,
    ]
    assert o200k().size == 200019


@SMALL
@given(TEXTS)
def test_text_decodes_to_itself_and_never_holds_a_special_token(text: str) -> None:
    ids = o200k().encode(text)
    assert o200k().decode(ids) == text
    assert not any(o200k().is_special(number) for number in ids)


@pytest.mark.parametrize("name", ["<|start|>", "<|end|>", "<|call|>", "<|return|>", "<|endoftext|>", "<|endofprompt|>"])
def test_text_that_spells_a_special_token_is_encoded_as_text(name: str) -> None:
    ids = o200k().encode(f"a{name}b")
    assert o200k().special[name] not in ids
    assert o200k().decode(ids) == f"a{name}b"


@SMALL
@given(st.lists(st.integers(0, 201_087), max_size=20))
def test_any_ids_decode_to_the_bytes_of_each_one(ids: list[int]) -> None:
    assert o200k().decode_bytes(ids) == b"".join(o200k().decode_bytes([number]) for number in ids)


def test_ids_above_the_tokenizer_show_as_reserved() -> None:
    assert o200k().token(201_087) == "<|reserved_201087|>"
    assert o200k().is_special(201_087)


def test_a_part_of_a_character_shows_as_its_bytes() -> None:
    ids = o200k().encode("🌧")
    assert len(ids) > 1
    assert o200k().token(ids[0]).startswith("<0xF0")
    assert o200k().decode(ids) == "🌧"


def test_a_lone_surrogate_is_refused_by_position() -> None:
    with pytest.raises(TokenizerError, match=r"U\+D83D at character 2"):
        o200k().encode("ab\ud83d")


def test_a_checkpoint_folder_is_read_by_its_tokenizer_file(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text(json.dumps(small_json()), encoding="utf-8")
    from_folder, from_file = Vocabulary.from_file(tmp_path), Vocabulary.from_file(tmp_path / "tokenizer.json")
    assert from_folder.encode("Hello") == from_file.encode("Hello") != []


def test_missing_harmony_tokens_are_named() -> None:
    layout = small_json()
    layout["added_tokens"] = [token for token in layout["added_tokens"] if token["content"] != "<|call|>"]
    with pytest.raises(TokenizerError, match=r"my\.json: .*<\|call\|> are missing"):
        Vocabulary.from_text(json.dumps(layout), "my.json")


def test_an_added_token_that_text_could_become_is_refused() -> None:
    layout = small_json()
    layout["added_tokens"][0]["special"] = False
    with pytest.raises(TokenizerError, match="not marked special"):
        Vocabulary.from_text(json.dumps(layout))


def test_a_vocabulary_without_all_bytes_is_refused() -> None:
    layout = small_json()
    layout["model"]["vocab"].pop("Ā")
    with pytest.raises(TokenizerError, match="1 of the 256 byte tokens"):
        Vocabulary.from_text(json.dumps(layout))


@pytest.mark.parametrize(
    ("content", "found"),
    [
        ("version https://git-lfs.github.com/spec/v1\noid sha256:0", "Git LFS pointer"),
        ('{"version": "1.0", "model": {', "not a whole JSON object"),
        ("", "not a whole JSON object"),
        ('{"model_type": "gpt_oss"}', "not a tokenizer.json"),
    ],
)
def test_a_broken_file_is_refused_by_name(tmp_path: Path, content: str, found: str) -> None:
    file = tmp_path / "tokenizer.json"
    file.write_text(content, encoding="utf-8")
    with pytest.raises(TokenizerError, match=found) as caught:
        Vocabulary.from_file(tmp_path)
    assert str(file) in str(caught.value)


def test_a_missing_file_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(TokenizerError, match="no such file"):
        Vocabulary.from_file(tmp_path)


def test_a_file_that_is_not_utf8_is_refused(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_bytes(b"{\xff}")
    with pytest.raises(TokenizerError, match="not UTF-8"):
        Vocabulary.from_file(tmp_path)
