"""A GGUF file's tokenizer as the `tokenizer.json` that it was made of.

The file holds tokens, their kinds and the merges; how text is cut into words it names, by `tokenizer.ggml.pre`. The
released tokenizer comes back byte for byte.
Source: llama.cpp's `conversion/base.py` for the keys and for what a row without a token is.
"""

from __future__ import annotations

from pathlib import Path

from gguf import TokenType

from ossia.errors import TokenizerError
from ossia.export.gguf.file import GgufFile
from ossia.harmony.o200k import tokenizer_json_text
from ossia.harmony.tokenizer_json import TOKENIZER, TokenizerFile, is_released

_NEXT = "next: name gpt-oss's own with --tokenizer FOLDER, a checkpoint's folder or a tokenizer.json"
_FIXED = {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "gpt-4o"}


def write_tokenizer(file: GgufFile, folder: Path) -> None:
    """Write `tokenizer.json`, and `chat_template.jinja` where the file has a template, into a folder.

    Raises  TokenizerError for another kind of tokenizer than gpt-oss's, or one whose parts don't go together
    """
    for key, only in _FIXED.items():
        if (found := file.value(key)) != only:
            raise TokenizerError(f"{file.path}: `{key}` is {found!r}; allowed: {only!r}, as gpt-oss has it\n  {_NEXT}")
    tokens, kinds, merges = (file.value(f"tokenizer.ggml.{part}") for part in ("tokens", "token_type", "merges"))
    if not tokens or not merges or not kinds or len(kinds) != len(tokens):
        raise TokenizerError(f"{file.path}: has no whole tokenizer (tokens, token_type, merges)\n  {_NEXT}")
    numbers = {TokenType.NORMAL: dict[str, int](), TokenType.CONTROL: dict[str, int]()}
    for number, (token, kind) in enumerate(zip(tokens, kinds, strict=True)):
        if kind == TokenType.UNUSED:
            continue
        if kind == TokenType.USER_DEFINED:  # what llama.cpp's converter calls an added token that isn't special
            kind = TokenType.CONTROL
        if kind not in numbers or token in numbers[kind]:
            raise TokenizerError(
                f"{file.path}: token {number}, {token!r}, is of kind {kind} or there twice; allowed: normal, control "
                f"and user-defined ones\n  {_NEXT}"
            )
        numbers[kind][token] = number
    pairs = []
    for merge in merges:
        left, _, right = merge.partition(" ")
        pairs.append((left, right))
    text = tokenizer_json_text(numbers[TokenType.NORMAL], pairs, numbers[TokenType.CONTROL])
    if not is_released(text):
        TokenizerFile.parse(text, f"the tokenizer of {file.path}")
    (folder / TOKENIZER).write_text(text, encoding="utf-8")
    template = file.value("tokenizer.chat_template")
    if template is not None:
        (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
