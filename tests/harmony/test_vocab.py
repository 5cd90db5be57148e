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


def small_vocabulary() -> Vocabulary:
    return Vocabulary.from_text(small_text())


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
        ('{"version": "1.0",\n"model": {', r"is not whole JSON: .* \(line 2, column 11, of 29 characters\)"),
        ("", "is not whole JSON: .*of 0 characters"),
        ("[1, 2]", "is not a tokenizer.json: it holds a JSON list"),
        ('{"model_type": "gpt_oss"}', "is not a tokenizer.json: it has no `model`"),
        ("[" * 100_000, "is JSON that can't be read"),
    ],
)
def test_a_broken_file_is_refused_by_name_with_what_to_do(tmp_path: Path, content: str, found: str) -> None:
    file = tmp_path / "tokenizer.json"
    file.write_text(content, encoding="utf-8")
    with pytest.raises(TokenizerError, match=found) as caught:
        Vocabulary.from_file(tmp_path)
    assert str(file) in str(caught.value)
    assert "next: copy or download it again" in str(caught.value) or "git lfs pull" in str(caught.value)


def test_a_file_that_is_cut_short_anywhere_is_refused() -> None:
    text = small_text()
    for length in range(0, len(text), len(text) // 50):
        with pytest.raises(TokenizerError, match=r"^my\.json: is not whole JSON"):
            Vocabulary.from_text(text[:length], "my.json")


@pytest.mark.parametrize(
    ("path", "value", "words"),
    [
        (("model",), [], r"`model` is \[\]; expected an object"),
        (("model", "type"), "WordPiece", r'`model` is {"type": "WordPiece".*expected an object of "type": "BPE"'),
        (("model", "vocab"), ["a"], r'`model.vocab` is \["a"\]; expected an object'),
        (("model", "vocab", "a"), "x", r'`model.vocab.a` is "x"; expected an id'),
        (("model", "vocab", "a"), 2**32, "`model.vocab.a` is 4294967296; expected an id"),
        (("model", "vocab", "a"), 0, "gives 1 tokens an id that others have"),
        (("model", "merges"), None, "`model.merges` is null; expected a list"),
        (("model", "merges", 0), ["a"], r"`model.merges\[0\]` is .*; expected a pair"),
        (("model", "merges", 0), "a zz", r"`model.merges\[0\]` is .* which lacks 'zz'"),
        (("model", "dropout"), 0.1, "`model.dropout` is 0.1; expected null"),
        (("added_tokens",), {}, "`added_tokens` is {}; expected a list"),
        (("added_tokens", 1), 7, r"`added_tokens\[1\]` is 7; expected an object"),
        (("added_tokens", 1, "id"), "7", r'`added_tokens\[1\].id` is "7"; expected an id'),
        (("added_tokens", 1, "lstrip"), None, r"`added_tokens\[1\].lstrip` is null; expected true or false"),
        (("added_tokens", 1, "id"), 5000, r"<\|endoftext\|> has the id 5,000, but the library .* it 2\d\d: added"),
        (("normalizer",), {"type": "NFC"}, "`normalizer` is .*; expected null"),
        (("pre_tokenizer",), None, "`pre_tokenizer` is null; expected gpt-oss's"),
        (("pre_tokenizer", "pretokenizers", 0, "pattern"), {"Regex": "("}, "`pre_tokenizer` is .*expected gpt-oss's"),
        (("version",), "\ud800", None),
        (("added_tokens", 1, "content"), "\ud800", "half a character"),
    ],
)
def test_a_part_of_the_wrong_shape_is_refused_by_its_name(
    path: tuple[str | int, ...], value: Any, words: str | None
) -> None:
    layout: Any = small_json()
    inside = layout
    for piece in path[:-1]:
        inside = inside[piece]
    inside[path[-1]] = value
    if words is None:  # a part that no id depends on
        assert Vocabulary.from_text(json.dumps(layout)).encode("Hello") == small_vocabulary().encode("Hello")
        return
    with pytest.raises(TokenizerError, match=rf"^my\.json: .*{words}"):
        Vocabulary.from_text(json.dumps(layout), "my.json")


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
    max_leaves=3,
)


@SMALL
@given(st.data())
def test_a_file_in_which_anything_is_replaced_is_read_or_refused_in_words(data: st.DataObject) -> None:
    layout: Any = small_json()
    inside = layout
    while True:
        key = data.draw(st.sampled_from(sorted(inside) if isinstance(inside, dict) else range(len(inside))))
        if not isinstance(inside[key], (dict, list)) or not inside[key] or data.draw(st.booleans()):
            break
        inside = inside[key]
    if isinstance(inside, dict) and data.draw(st.booleans()):
        del inside[key]
    else:
        inside[key] = data.draw(JSON)
    said = "my.json: nothing"
    try:
        Vocabulary.from_text(json.dumps(layout), "my.json")
    except TokenizerError as error:
        said = str(error)
    assert said.startswith("my.json: ")


def test_a_saved_truncation_does_not_cut_text() -> None:
    layout = small_json()
    layout["truncation"] = {"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0}
    layout["padding"] = {
        "strategy": {"Fixed": 9},
        "direction": "Right",
        "pad_id": 0,
        "pad_type_id": 0,
        "pad_token": "!",
    }
    layout["padding"]["pad_to_multiple_of"] = None
    for text in ("Hello world, hello", "H"):
        assert Vocabulary.from_text(json.dumps(layout)).encode(text) == small_vocabulary().encode(text)


def test_merges_in_the_older_form_read_the_same() -> None:
    layout = small_json()
    layout["model"]["merges"] = [" ".join(pair) for pair in layout["model"]["merges"]]
    assert Vocabulary.from_text(json.dumps(layout)).encode("Hello") == small_vocabulary().encode("Hello")


def test_a_file_that_may_not_be_read_is_refused_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path, **_: Any) -> str:
        raise PermissionError(13, "Permission denied", str(path))

    (tmp_path / "tokenizer.json").touch()
    monkeypatch.setattr(Path, "read_text", refuse)
    with pytest.raises(TokenizerError, match=r"tokenizer\.json: can't be read: Permission denied"):
        Vocabulary.from_file(tmp_path)


def test_a_missing_file_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(TokenizerError, match="no such file"):
        Vocabulary.from_file(tmp_path)


def test_a_file_that_is_not_utf8_is_refused(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_bytes(b"{\xff}")
    with pytest.raises(TokenizerError, match="not UTF-8"):
        Vocabulary.from_file(tmp_path)
