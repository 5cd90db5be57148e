"""The demo's vocabulary: Harmony's special tokens and the o200k tokens that its rows use, as a tokenizer.json.

The released head has 201,088 rows; at the demo's size it would take nearly all the time. The rows are rendered once
with the full vocabulary and the texts between the special tokens say what to keep, so a row has the same tokens under
both. No torch.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import groupby
from pathlib import Path

from ossia.demo.rows.sorting import Row
from ossia.harmony.chat import conversation_from_messages
from ossia.harmony.messages import Conversation
from ossia.harmony.o200k import o200k_harmony_tokenizer_json, prune
from ossia.harmony.render import Renderer
from ossia.harmony.vocab import Vocabulary


def conversation_of(row: Row) -> Conversation:
    """A row of the demo's files as a Harmony conversation."""
    return conversation_from_messages(
        row["messages"], tools=row.get("tools"), reasoning_effort=row.get("reasoning_effort")
    )


def write_vocabulary(rows: Iterable[Row], file: Path) -> Path:
    """Write a tokenizer.json cut down to what rendering `rows` needs; returns `file`.

    Raises MissingExtraError if the package with the o200k ranks isn't there.
    """
    full = o200k_harmony_tokenizer_json()
    vocab = Vocabulary.from_text(full)
    renderer = Renderer(vocab)
    texts: set[str] = set()
    for row in rows:
        texts.update(_texts(vocab, renderer.completion(conversation_of(row))))
    pruned, _ = prune(full, sorted(texts))
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(pruned, encoding="utf-8")
    return file


def _texts(vocab: Vocabulary, ids: list[int]) -> list[str]:
    """The texts between the special tokens of `ids`."""
    runs = groupby(ids, key=vocab.is_special)
    return [vocab.decode(list(run)) for special, run in runs if not special]
