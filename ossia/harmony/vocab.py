"""A vocabulary: text to token ids and back, from any gpt-oss checkpoint's `tokenizer.json`.

The byte pair encoding itself is the `tokenizers` library's. What is added here: ordinary text can never become a
special token, ids become bytes (a sampled id may hold half a character), and a file that lacks what Harmony needs is
refused.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING

from ossia.errors import HarmonyError, TokenizerError
from ossia.harmony.tokenizer_json import TOKENIZER, TokenizerFile, is_released, read_tokenizer_text, tokenizer_file

if TYPE_CHECKING:
    from tokenizers import Tokenizer

HARMONY_SPECIALS = ("<|start|>", "<|end|>", "<|message|>", "<|channel|>", "<|constrain|>", "<|return|>", "<|call|>")
STOPS = ("<|end|>", "<|return|>", "<|call|>")


def byte_to_char() -> list[str]:
    """The printable character that a byte-level tokenizer writes for each byte value 0..255 (GPT-2's table).

    Printable Latin-1 stands for itself; the other bytes, in order, take the characters from U+0100 on.
    """
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    return [chr(byte if byte in printable else next(others)) for byte in range(256)]


class Vocabulary:
    """Token ids of text, and bytes of token ids. Make one with `from_file` or `from_text`.

    special  name -> id of every special token, `{"<|start|>": 200006, ...}`
    size     number of ids the tokenizer knows; a model may have more rows (201,088 against 200,019), see `decode_bytes`
    """

    def __init__(self, tokenizer: Tokenizer, where: str) -> None:
        """Wrap a loaded byte-level tokenizer; `where` names its file in errors.

        Raises  TokenizerError if one of Harmony's special tokens or of the 256 byte tokens is missing, or if an added
                token is not special (such a token would be matched inside ordinary text)
        """
        added = tokenizer.get_added_tokens_decoder()
        plain = [token.content for token in added.values() if not token.special]
        if plain:
            raise TokenizerError(
                f"{where}: added tokens {plain[:5]} are not marked special, so text could turn into them; "
                'set "special": true on them in added_tokens'
            )
        special = {token.content: number for number, token in sorted(added.items())}
        missing = [name for name in HARMONY_SPECIALS if name not in special]
        if missing:
            raise TokenizerError(
                f"{where}: Harmony's special tokens {', '.join(missing)} are missing; found {list(special)[:8]}. "
                "Use the tokenizer.json of a gpt-oss checkpoint"
            )
        self._byte_of_char = {char: byte for byte, char in enumerate(byte_to_char())}
        lacking = sum(tokenizer.token_to_id(char) is None for char in self._byte_of_char)
        if lacking:
            raise TokenizerError(
                f"{where}: {lacking} of the 256 byte tokens are missing, so some text could not be encoded; "
                "Ossia needs a byte-level BPE tokenizer like gpt-oss's"
            )
        tokenizer.encode_special_tokens = True  # despite its name: text that spells a special token stays text
        self._tokenizer = tokenizer
        self._special_ids = frozenset(special.values())
        self._bytes: dict[int, bytes] = {number: name.encode() for name, number in special.items()}
        self.special: Mapping[str, int] = MappingProxyType(special)
        self.size: int = tokenizer.get_vocab_size(with_added_tokens=True)

    @classmethod
    def from_file(cls, path: Path) -> Vocabulary:
        """Read a checkpoint folder's `tokenizer.json`, or that file itself. Raises TokenizerError."""
        file = tokenizer_file(path)
        return cls.from_text(read_tokenizer_text(file), str(file))

    @classmethod
    def from_text(cls, tokenizer_json: str, where: str = TOKENIZER) -> Vocabulary:
        """Read the text of a `tokenizer.json`; `where` names it in errors. Raises TokenizerError."""
        from tokenizers import Tokenizer

        if is_released(tokenizer_json):
            return cls(Tokenizer.from_str(tokenizer_json), where)
        file = TokenizerFile.parse(tokenizer_json, where)
        tokenizer = Tokenizer.from_str(file.library_text(where))
        vocabulary = cls(tokenizer, where)
        for name, number in file.added.items():
            if (found := tokenizer.token_to_id(name)) != number:
                raise TokenizerError(
                    f"{where}: the added token {name} has the id {number:,}, but the library that encodes text gives "
                    f"it {found:,}: added tokens have the ids right after the vocabulary, in their order\n"
                    "  next: number them so in added_tokens"
                )
        return vocabulary

    def encode(self, text: str) -> list[int]:
        """Ids of ordinary text; text that spells a special token is encoded letter by letter like any other."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of each text, as `encode`. Raises TokenizerError for a text with a lone surrogate (not UTF-8)."""
        try:
            encodings = self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        except TypeError:
            for text in texts:
                check_text(text)
            raise
        return [encoding.ids for encoding in encodings]

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """The bytes behind `ids`; a special token gives its name, an id that the tokenizer lacks `<|reserved_ID|>`."""
        known = self._bytes
        return b"".join([known[number] if number in known else self._look_up(number) for number in ids])

    def decode(self, ids: Iterable[int]) -> str:
        """`decode_bytes` as text; bytes that are not UTF-8 become U+FFFD."""
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def token(self, number: int) -> str:
        """One id for display: its text, or `<0xE2 0x82>` where its bytes are not whole characters."""
        data = self.decode_bytes((number,))
        try:
            return data.decode("utf-8")
        except UnicodeDecodeError:
            return "<" + " ".join(f"0x{byte:02X}" for byte in data) + ">"

    def is_special(self, number: int) -> bool:
        """Whether the id is a special token, or one of the reserved ids above `size` that no text gives."""
        return number in self._special_ids or number >= self.size

    def _look_up(self, number: int) -> bytes:
        if number < 0:
            raise ValueError(f"token id {number} is negative")
        piece = self._tokenizer.id_to_token(number)
        data = f"<|reserved_{number}|>".encode() if piece is None else bytes(map(self._byte_of_char.__getitem__, piece))
        self._bytes[number] = data
        return data


def check_text(text: str) -> None:
    """Raise TokenizerError if `text` holds a lone surrogate (half of a pair, from broken JSON escapes)."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        found = f"U+{ord(text[error.start]):04X}"
        raise TokenizerError(
            f"the text has a lone surrogate {found} at character {error.start}, which no encoding can hold; "
            "repair the \\uD83D-like escape in the data"
        ) from None


def check_field(text: str, field: str) -> None:
    """`check_text` for a part of a conversation: raises HarmonyError that names `field`."""
    try:
        check_text(text)
    except TokenizerError as error:
        raise HarmonyError(str(error), field) from None
