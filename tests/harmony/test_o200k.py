"""The released tokenizer.json built from ranks, and vocabularies cut out of it."""

from __future__ import annotations

import gzip
import hashlib
import json
from functools import cache
from pathlib import Path
from random import Random
from types import SimpleNamespace

import pytest

from ossia.errors import MissingExtraError, TokenizerError
from ossia.harmony import Renderer, Vocabulary, o200k, prune, write_o200k_harmony
from ossia.harmony.messages import Conversation, Message
from tests.harmony import support

WORDS = [
    "Hello",
    " world",
    " weather",
    "Straße",
    " 你好",
    "🌧",
    "<|end|>",
    " 2024",
    "\n\n",
    "def f(x):",
    "  ",
    "naïve",
    "s's",
]


def test_the_built_file_is_the_released_one_byte_for_byte() -> None:
    data = support.o200k_json().encode()
    assert len(data) == 27_868_174
    assert hashlib.sha256(data).hexdigest() == "0614fe83cadab421296e664e1f48f4261fa8fef6e03e63bb75c20f38e37d07d3"


def test_the_built_file_has_the_vocabulary_merges_and_specials_of_the_released_models() -> None:
    layout = json.loads(support.o200k_json())
    assert len(layout["model"]["vocab"]) == 199_998
    assert len(layout["model"]["merges"]) == 446_189
    assert [token["id"] for token in layout["added_tokens"]] == list(range(199_998, 200_019))


def test_the_file_is_written_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(o200k, "o200k_harmony_tokenizer_json", lambda: "{}")
    assert write_o200k_harmony(tmp_path) == tmp_path / "tokenizer.json"
    assert write_o200k_harmony(tmp_path / "new" / "t.json").read_text() == "{}"
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["new", "t.json", "tokenizer.json"]

    def fail() -> str:
        raise TokenizerError("no ranks")

    monkeypatch.setattr(o200k, "o200k_harmony_tokenizer_json", fail)
    with pytest.raises(TokenizerError):
        write_o200k_harmony(tmp_path / "other.json")
    assert not (tmp_path / "other.json").exists()
    assert not list(tmp_path.glob(".*"))


def test_ranks_that_are_not_the_expected_file_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "data").mkdir()
    file = tmp_path / "data" / "o200k_base.tiktoken.gz"
    file.write_bytes(gzip.compress(b"IQ== 0\n"))
    monkeypatch.setattr(o200k, "find_spec", lambda name: SimpleNamespace(origin=str(tmp_path / "__init__.py")))
    with pytest.raises(TokenizerError, match="sha256"):
        o200k.o200k_ranks_file()
    file.write_bytes(b"not gzip")
    with pytest.raises(TokenizerError, match="can't be read"):
        o200k.o200k_ranks_file()
    monkeypatch.setattr(o200k, "find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match=r"pip install 'ossia\[demo\]'"):
        o200k.o200k_ranks_file()


@cache
def pruned_to(*texts: str) -> tuple[str, list[int]]:
    return prune(support.o200k_json(), texts)


def generated_texts() -> list[str]:
    """Lines of this file, the words above in random strings, and random characters: the same at every run."""
    random = Random(0)
    lines = Path(__file__).read_text(encoding="utf-8").splitlines(keepends=True)
    strings = ["".join(random.choices(WORDS, k=random.randint(1, 12))) for _ in range(300)]
    noise = ["".join(chr(random.randrange(0x20, 0x3000)) for _ in range(random.randint(1, 20))) for _ in range(300)]
    return [*lines, *strings, *noise]


def test_a_pruned_vocabulary_gives_its_texts_the_same_tokens() -> None:
    texts = generated_texts()
    pruned_json, old_ids = pruned_to(*texts)
    pruned, full = Vocabulary.from_text(pruned_json), support.o200k()
    for text in texts:
        assert [old_ids[number] for number in pruned.encode(text)] == full.encode(text)
    assert old_ids == sorted(set(old_ids))
    assert len(old_ids) == pruned.size < 6000
    for number in range(pruned.size):
        assert pruned.decode_bytes([number]) == full.decode_bytes([old_ids[number]])


def test_a_pruned_vocabulary_keeps_all_special_tokens_at_its_end() -> None:
    pruned_json, old_ids = pruned_to()
    pruned = Vocabulary.from_text(pruned_json)
    assert {name: old_ids[number] for name, number in pruned.special.items()} == dict(support.o200k().special)
    assert list(pruned.special.values()) == list(range(256, 256 + 21))


def test_a_pruned_vocabulary_still_encodes_any_text_and_renders() -> None:
    pruned = Vocabulary.from_text(pruned_to()[0])
    assert pruned.decode(pruned.encode("Something else: 🎻 ünseen")) == "Something else: 🎻 ünseen"
    conversation = Conversation((Message("user", "Hello"), Message("assistant", "Hello", "final")))
    (sample,) = Renderer(pruned).samples(conversation)
    full = Renderer(support.o200k()).samples(conversation)[0]
    assert pruned.decode(sample.ids) == support.o200k().decode(full.ids)
    trained = [number for number, weight in zip(sample.ids, sample.weights, strict=True) if weight]
    assert pruned.decode(trained) == "<|channel|>final<|message|>Hello<|return|>"


def test_a_pruned_vocabulary_can_be_pruned_again_and_older_merge_forms_are_read() -> None:
    layout = json.loads(pruned_to(*generated_texts())[0])
    layout["model"]["merges"] = [" ".join(pair) for pair in layout["model"]["merges"]]
    again_json, old_ids = prune(json.dumps(layout), ["Hello"])
    once, again = Vocabulary.from_text(json.dumps(layout)), Vocabulary.from_text(again_json)
    assert [old_ids[number] for number in again.encode("Hello")] == once.encode("Hello")
    assert again.size < once.size
