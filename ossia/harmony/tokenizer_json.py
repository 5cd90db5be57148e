"""What a `tokenizer.json` has to be, checked before the `tokenizers` library sees it.

The library refuses a bad file with a bare `Exception`, and takes some without a word that go wrong later: text cut off
at a saved length, merges left out at random, added tokens moved to other ids. So the file is read here, and the library
is given a text made of the checked parts alone. The released file, known by its sha256, is passed on as it is, because
checking its 446,189 merges takes about as long as loading them.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from ossia.errors import TokenizerError

TOKENIZER = "tokenizer.json"
RELEASED_SHA256 = "0614fe83cadab421296e664e1f48f4261fa8fef6e03e63bb75c20f38e37d07d3"
# How text is cut into words before merging: words by case with an English contraction, numbers of up to three digits,
# runs of punctuation, line ends, spaces.
CONTRACTION = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
UPPER, LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
PATTERN = "|".join(
    [
        rf"[^\r\n\p{{L}}\p{{N}}]?{UPPER}*{LOWER}+{CONTRACTION}",
        rf"[^\r\n\p{{L}}\p{{N}}]?{UPPER}+{LOWER}*{CONTRACTION}",
        r"\p{N}{1,3}",
        r" ?[^\s\p{L}\p{N}]+[\r\n/]*",
        r"\s*[\r\n]+",
        r"\s+(?!\S)",
        r"\s+",
    ]
)
SPLIT = {"type": "Split", "pattern": {"Regex": PATTERN}, "behavior": "Isolated", "invert": False}
_FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")
_LAST_ID = 2**32 - 1


def tokenizer_file(path: Path) -> Path:
    """The `tokenizer.json` that `path`, a checkpoint folder or that file itself, means. Raises TokenizerError."""
    path = Path(path)
    file = path / TOKENIZER if path.is_dir() else path
    if not file.is_file():
        raise TokenizerError(
            f"{file}: no such file; a gpt-oss checkpoint has its {TOKENIZER} beside config.json\n"
            f"  next: name a checkpoint folder or a {TOKENIZER}"
        )
    return file


def read_tokenizer_text(file: Path) -> str:
    """The text of a `tokenizer.json`. Raises TokenizerError if it can't be read or isn't text."""
    try:
        return file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        _fail(str(file), f"is not UTF-8 text ({error.reason} at byte {error.start})")
    except OSError as error:
        raise TokenizerError(f"{file}: can't be read: {error.strerror}; check its permissions and its disk") from error


@dataclass(frozen=True, slots=True)
class TokenizerFile:
    """The parts of a byte-level BPE `tokenizer.json` that decide what text becomes.

    vocab    token in printable form -> id
    added    special tokens beside them, text -> id
    layout   the file as the `tokenizers` library is to read it
    """

    vocab: Mapping[str, int]
    added: Mapping[str, int]
    layout: Mapping[str, Any]

    @classmethod
    def parse(cls, text: str, where: str) -> TokenizerFile:
        """Read and check the text of a file; `where` names it in errors.

        What the ids of text don't depend on (decoder, post-processor) is left out, and so are a saved truncation and
        padding, which belong to another program's batches.
        Raises  TokenizerError saying which part is wrong, what it is and what it has to be
        """
        file = _json(text, where)
        for key in ("model", "added_tokens"):
            if key not in file:
                _fail(where, f"is not a {TOKENIZER}: it has no `{key}`")
        if file.get("normalizer") is not None:
            _wrong(where, "normalizer", file["normalizer"], "null, as in gpt-oss's: text is encoded as it is")
        model, vocab = _model(file["model"], where)
        added = _added_tokens(file["added_tokens"], where)
        layout = {
            "version": "1.0",
            "truncation": None,
            "padding": None,
            "added_tokens": added,
            "normalizer": None,
            "pre_tokenizer": {"type": "Sequence", "pretokenizers": _pre_tokenizers(file.get("pre_tokenizer"), where)},
            "post_processor": None,
            "decoder": None,
            "model": model,
        }
        return cls(vocab, {token["content"]: token["id"] for token in added}, layout)

    def library_text(self, where: str) -> str:
        """What the `tokenizers` library is given. Raises TokenizerError for text that isn't Unicode in the file."""
        text = json.dumps(self.layout, ensure_ascii=False, separators=(",", ":"))
        try:
            text.encode()
        except UnicodeEncodeError as error:
            found = text[max(0, error.start - 20) : error.start + 1]
            _fail(where, f"holds half a character (a lone surrogate) in {found!r}")
        return text


def is_released(text: str) -> bool:
    """Whether this is, byte for byte, the file that gpt-oss-20b and -120b are released with."""
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest() == RELEASED_SHA256


def _fail(where: str, what: str) -> NoReturn:
    raise TokenizerError(f"{where}: {what}\n  next: copy or download it again from the checkpoint it belongs to")


def _wrong(where: str, field: str, found: object, expected: str) -> NoReturn:
    shown = json.dumps(found, ensure_ascii=False)
    _fail(where, f"`{field}` is {shown if len(shown) <= 60 else shown[:57] + '...'}; expected {expected}")


def _json(text: str, where: str) -> dict[str, Any]:
    if text.lstrip().startswith("version https://git-lfs"):
        raise TokenizerError(f"{where}: is a Git LFS pointer, not the file; run `git lfs pull` in that folder")
    try:
        found = json.loads(text)
    except json.JSONDecodeError as error:
        place = f"line {error.lineno}, column {error.colno}, of {len(text):,} characters"
        _fail(where, f"is not whole JSON: {error.msg} ({place})")
    except (ValueError, RecursionError) as error:
        _fail(where, f"is JSON that can't be read: {error}")
    if not isinstance(found, dict):
        _fail(where, f"is not a {TOKENIZER}: it holds a JSON {type(found).__name__}, expected an object")
    return found


def _model(model: Any, where: str) -> tuple[dict[str, Any], dict[str, int]]:
    """The checked `model`, reduced to what decides ids, and its vocabulary."""
    if not isinstance(model, dict) or model.get("type", "BPE") != "BPE":
        _wrong(where, "model", model, 'an object of "type": "BPE"')
    fixed = ("dropout", (None, 0)), ("continuing_subword_prefix", (None, "")), ("end_of_word_suffix", (None, ""))
    for key, allowed in fixed:
        if model.get(key) not in allowed:
            _wrong(where, f"model.{key}", model[key], "null")
    ignore_merges = model.get("ignore_merges", False)
    if not isinstance(ignore_merges, bool):
        _wrong(where, "model.ignore_merges", ignore_merges, "true or false")
    vocab = model.get("vocab")
    if not isinstance(vocab, dict) or not vocab:
        _wrong(where, "model.vocab", vocab, "an object of tokens and their ids")
    for token, number in vocab.items():
        if type(number) is not int or not 0 <= number <= _LAST_ID:
            _wrong(where, f"model.vocab.{token}", number, "an id, a whole number from 0")
    if len(set(vocab.values())) != len(vocab):
        _fail(where, f"`model.vocab` gives {len(vocab) - len(set(vocab.values())):,} tokens an id that others have")
    merges = _merges(model.get("merges"), vocab, where)
    return {"type": "BPE", "ignore_merges": ignore_merges, "vocab": vocab, "merges": merges}, vocab


def _merges(merges: Any, vocab: Mapping[str, int], where: str) -> list[list[str]]:
    """Pairs of tokens that join to a token; a pair is a list of two, or in older files a text with a space."""
    if not isinstance(merges, list):
        _wrong(where, "model.merges", merges, "a list of pairs of tokens")
    pairs = []
    for index, merge in enumerate(merges):
        pair = merge.split(" ") if isinstance(merge, str) else merge
        if not isinstance(pair, list) or len(pair) != 2 or not all(isinstance(token, str) for token in pair):
            _wrong(where, f"model.merges[{index}]", merge, "a pair of tokens")
        for token in (*pair, "".join(pair)):
            if token not in vocab:
                _wrong(where, f"model.merges[{index}]", merge, f"tokens of model.vocab, which lacks {token!r}")
        pairs.append(pair)
    return pairs


def _added_tokens(added: Any, where: str) -> list[dict[str, Any]]:
    if not isinstance(added, list):
        _wrong(where, "added_tokens", added, "a list of objects")
    checks: dict[str, tuple[Callable[[Any], bool], str]] = {
        "id": (lambda found: type(found) is int and 0 <= found <= _LAST_ID, "an id, a whole number from 0"),
        "content": (lambda found: isinstance(found, str) and found != "", "the token's text"),
        **dict.fromkeys(_FLAGS, (lambda found: isinstance(found, bool), "true or false")),
    }
    for index, token in enumerate(added):
        if not isinstance(token, dict):
            _wrong(where, f"added_tokens[{index}]", token, "an object with id and content")
        for key, (is_right, expected) in checks.items():
            if not is_right(token.get(key)):
                _wrong(where, f"added_tokens[{index}].{key}", token.get(key), expected)
    return [{key: token[key] for key in checks} for token in added]


def _pre_tokenizers(found: Any, where: str) -> list[dict[str, Any]]:
    """The steps before merging: maybe the split into words, then bytes, without which not all text has tokens."""
    steps = found.get("pretokenizers") if isinstance(found, dict) and found.get("type") == "Sequence" else [found]
    byte_level = {"type": "ByteLevel", "add_prefix_space": False}
    ours = isinstance(steps, list) and all(isinstance(step, dict) for step in steps) and len(steps) in (1, 2)
    if ours:
        *splits, last = steps
        ours = all(step == SPLIT for step in splits) and byte_level.items() <= last.items()
        ours = ours and all(isinstance(last.get(key, True), bool) for key in ("trim_offsets", "use_regex"))
    if not ours:
        _wrong(where, "pre_tokenizer", found, "gpt-oss's: ByteLevel without a prefix space, maybe after its Split")
    use_regex = last.get("use_regex", True)
    return [*splits, {**byte_level, "trim_offsets": False, "use_regex": use_regex}]
