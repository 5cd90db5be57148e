"""Parts of plain turns -> OpenAI's (legacy) completions, whole or as chunks."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from ossia.harmony import Vocabulary
from ossia.web.protocol.chat import Head, Usage
from ossia.web.protocol.errors import ApiError
from ossia.web.protocol.turn import End, More, Piece, Placed


class TextAnswer:
    """A plain completion: chunks from the pieces of its choices; the sum of the chunks is the whole.

    named        whether the events of its stream have names
    fingerprint  `system_fingerprint`; None: left out
    """

    named = False

    def __init__(self, head: Head, vocab: Vocabulary, num: int, *, logprobs: bool, says_usage: bool) -> None:
        self.fingerprint: str | None = None
        self._head, self._vocab, self._logprobs, self._says_usage = head, vocab, logprobs, says_usage
        self._choices = [_Choice() for _ in range(num)]

    def begin(self) -> list[dict[str, Any]]:
        """Nothing comes before the text."""
        return []

    def take(self, index: int, pieces: Sequence[Piece], end: End | None) -> list[dict[str, Any]]:
        """The chunk of more pieces of a choice."""
        more, whole = _Choice(end=end), self._choices[index]
        for piece in pieces:
            if isinstance(piece, More):
                more.text += piece.text
                more.tokens += piece.tokens
        whole.text, whole.tokens, whole.end = whole.text + more.text, whole.tokens + more.tokens, end
        return [self._object([self._choice(index, more)], None)]

    def finish(self, usage: Usage) -> list[dict[str, Any]]:
        """The last chunks."""
        return [self._object([], usage)] if self._says_usage else []

    def fail(self, error: ApiError) -> list[dict[str, Any]]:
        """The last chunk where something went wrong under way."""
        return [error.body]

    def whole(self, usage: Usage) -> dict[str, Any]:
        """What a client gets that doesn't stream."""
        choices = [self._choice(index, choice) for index, choice in enumerate(self._choices)]
        return {**self._object(choices, None), "usage": usage.chat}

    def _object(self, choices: Iterable[dict[str, Any]], usage: Usage | None) -> dict[str, Any]:
        found = {**self._head.about("text_completion", self.fingerprint), "choices": list(choices)}
        if self._says_usage:
            found["usage"] = None if usage is None else usage.chat
        return found

    def _choice(self, index: int, choice: _Choice) -> dict[str, Any]:
        lps = self._all_logprobs(choice.tokens) if self._logprobs else None
        return {"index": index, "text": choice.text, "logprobs": lps, "finish_reason": choice.end}

    def _all_logprobs(self, tokens: Sequence[Placed]) -> dict[str, Any]:
        decode = self._vocab.decode
        return {
            "tokens": [decode((one.token.id,)) for one in tokens],
            "token_logprobs": [one.token.logprob for one in tokens],
            "top_logprobs": [
                None if one.token.logprob is None else {decode((number,)): value for number, value in one.token.top}
                for one in tokens
            ],
            "text_offset": [one.place for one in tokens],
        }


@dataclass(slots=True)
class _Choice:
    text: str = ""
    tokens: list[Placed] = field(default_factory=list)
    end: End | None = None
