"""Fixtures of the data tests: a real vocabulary of single bytes, and files of rows."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest

from ossia.config import Recipe
from ossia.data.dataset import in_order, open_datasets
from ossia.data.sample import Sample
from ossia.harmony.vocab import HARMONY_SPECIALS, Vocabulary, byte_to_char


def byte_tokenizer_json() -> str:
    """A `tokenizer.json` in which every byte is a token: quick to make, and lengths can be counted by eye."""
    specials = ["<|startoftext|>", "<|endoftext|>", *HARMONY_SPECIALS]
    added = [
        {
            "id": 256 + number,
            "content": name,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": True,
        }
        for number, name in enumerate(specials)
    ]
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    return json.dumps(
        {
            "version": "1.0",
            "truncation": None,
            "padding": None,
            "added_tokens": added,
            "normalizer": None,
            "pre_tokenizer": byte_level,
            "post_processor": None,
            "decoder": byte_level,
            "model": {
                "type": "BPE",
                "dropout": None,
                "unk_token": None,
                "continuing_subword_prefix": None,
                "end_of_word_suffix": None,
                "fuse_unk": False,
                "byte_fallback": False,
                "ignore_merges": False,
                "vocab": {char: number for number, char in enumerate(byte_to_char())},
                "merges": [],
            },
        }
    )


@pytest.fixture(scope="session")
def vocab() -> Vocabulary:
    return Vocabulary.from_text(byte_tokenizer_json())


@pytest.fixture
def write_rows(tmp_path: Path) -> Callable[..., str]:
    """Writes rows as JSON Lines and gives the file's path."""

    def write(rows: Iterable[dict[str, Any]], name: str = "rows.jsonl") -> str:
        file = tmp_path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        with file.open("w", encoding="utf-8") as handle:
            for row in rows:
                handle.write(json.dumps(row) + "\n")
        return str(file)

    return write


@pytest.fixture(scope="session")
def make_recipe() -> Callable[..., Recipe]:
    """A recipe over data sources, given as paths or as mappings; other keys by name."""

    def make(*sources: str | dict[str, Any], **keys: Any) -> Recipe:
        data = [{"path": source} if isinstance(source, str) else source for source in sources]
        return Recipe.model_validate({"model": "some/model", "data": data, **keys})

    return make


Read = Callable[..., list[Sample]]


@pytest.fixture
def read(write_rows: Callable[..., str], make_recipe: Callable[..., Recipe], vocab: Vocabulary) -> Read:
    """The samples of rows, read under a recipe whose data source has the given keys."""
    count = iter(range(100))

    def read_(*rows: dict[str, Any], harmony: dict[str, Any] | None = None, **source: Any) -> list[Sample]:
        path = write_rows(rows, f"rows{next(count)}.jsonl")
        recipe = make_recipe({"path": path, **source}, harmony=harmony or {})
        return list(in_order(open_datasets(recipe, vocab).train))

    return read_
