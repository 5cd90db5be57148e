"""Parts of turns -> OpenAI's chat completions, whole or as chunks.

Reasoning goes out under both names that clients know, `reasoning` and `reasoning_content`. Several visible messages of
a turn (a preamble, an answer) become one content with an empty line between them; so do several stretches of reasoning.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from ossia.engine import Token
from ossia.harmony import Vocabulary
from ossia.web.protocol.errors import ApiError
from ossia.web.protocol.turn import Begin, End, Kind, More, Piece

BETWEEN = "\n\n"


@dataclass(frozen=True, slots=True)
class Head:
    """What every object of one answer repeats."""

    id: str
    created: int
    model: str

    @classmethod
    def new(cls, prefix: str, created: float, model: str) -> Head:
        """A head with an id of its own, `chatcmpl-...`."""
        return cls(f"{prefix}{secrets.token_hex(12)}", int(created), model)

    def about(self, kind: str, fingerprint: str | None) -> dict[str, Any]:
        """The first fields of an object of this kind."""
        found = {"id": self.id, "object": kind, "created": self.created, "model": self.model}
        return found if fingerprint is None else {**found, "system_fingerprint": fingerprint}


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens of an answer: of its prompts, sampled, and sampled inside reasoning."""

    prompt: int
    completion: int
    reasoning: int

    @property
    def chat(self) -> dict[str, Any]:
        """As chat completions and plain completions say it."""
        return {
            "prompt_tokens": self.prompt,
            "completion_tokens": self.completion,
            "total_tokens": self.prompt + self.completion,
            "completion_tokens_details": {"reasoning_tokens": self.reasoning},
        }


_Delta = tuple[dict[str, Any], list[dict[str, Any]]]  # and the log-probabilities of its tokens


class ChatAnswer:
    """A chat completion: chunks from the pieces of its choices; the sum of the chunks is the whole.

    named        whether the events of its stream have names
    fingerprint  `system_fingerprint`; None: left out
    """

    named = False

    def __init__(self, head: Head, vocab: Vocabulary, num: int, *, logprobs: bool, says_usage: bool) -> None:
        self.fingerprint: str | None = None
        self._head, self._says_usage = head, says_usage
        self._choices = [_Choice(vocab, logprobs) for _ in range(num)]

    def begin(self) -> list[dict[str, Any]]:
        """The first chunks: whose message it is, for each choice."""
        role = {"role": "assistant", "content": None}
        return [self._chunk(_chunk_choice(index, role)) for index in range(len(self._choices))]

    def take(self, index: int, pieces: Sequence[Piece], end: End | None) -> list[dict[str, Any]]:
        """The chunks of more pieces of a choice."""
        choice = self._choices[index]
        chunks = [self._chunk(_chunk_choice(index, *delta)) for delta in choice.deltas(pieces)]
        if end is not None:
            choice.end = end
            chunks.append(self._chunk(_chunk_choice(index, {}, [], end)))
        return chunks

    def finish(self, usage: Usage) -> list[dict[str, Any]]:
        """The last chunks."""
        return [self._chunk(usage=usage)] if self._says_usage else []

    def fail(self, error: ApiError) -> list[dict[str, Any]]:
        """The last chunk where something went wrong under way."""
        return [error.body]

    def whole(self, usage: Usage) -> dict[str, Any]:
        """What a client gets that doesn't stream."""
        about = self._head.about("chat.completion", self.fingerprint)
        choices = [choice.whole(index) for index, choice in enumerate(self._choices)]
        return {**about, "choices": choices, "usage": usage.chat}

    def _chunk(self, *choices: dict[str, Any], usage: Usage | None = None) -> dict[str, Any]:
        chunk = {**self._head.about("chat.completion.chunk", self.fingerprint), "choices": list(choices)}
        if self._says_usage:
            chunk["usage"] = None if usage is None else usage.chat
        return chunk


class _Choice:
    """One choice: deltas from pieces, and the message that they add up to."""

    def __init__(self, vocab: Vocabulary, logprobs: bool) -> None:
        self._vocab, self._wants_logprobs = vocab, logprobs
        self._content: str | None = None
        self._reasoning: str | None = None
        self._made: list[dict[str, Any]] = []
        self._logprobs: list[dict[str, Any]] = []
        self.end: End | None = None
        self._kind: Kind = "text"

    def deltas(self, pieces: Iterable[Piece]) -> list[_Delta]:
        """What the pieces say, neighbours of a kind joined: a reader who is behind gets fewer, longer ones."""
        found: list[_Delta] = []
        for delta, logprobs in filter(None, map(self._delta, pieces)):
            self._add(delta, logprobs)
            if found and "tool_calls" not in delta and found[-1][0].keys() == delta.keys():
                before, old = found[-1]
                found[-1] = ({key: before[key] + text for key, text in delta.items()}, old + logprobs)
            else:
                found.append((delta, logprobs))
        return found

    def whole(self, index: int) -> dict[str, Any]:
        """The choice of a chat completion."""
        content = self._content
        if content is None and not self._made and self._reasoning is None:
            content = ""
        message: dict[str, Any] = {"role": "assistant", "content": content, "refusal": None}
        message |= {"reasoning": self._reasoning, "reasoning_content": self._reasoning}
        message |= {"tool_calls": self._made} if self._made else {}
        lps = {"content": self._logprobs, "refusal": None} if self._wants_logprobs else None
        return {"index": index, "message": message, "logprobs": lps, "finish_reason": self.end}

    def _delta(self, piece: Piece) -> _Delta | None:
        if isinstance(piece, Begin):
            return self._begin(piece), []
        if not isinstance(piece, More):
            return None
        if self._kind == "call":
            return {"tool_calls": [{"index": len(self._made) - 1, "function": {"arguments": piece.text}}]}, []
        logprobs = [token_logprob(self._vocab, one.token) for one in piece.tokens] if self._wants_logprobs else []
        return self._said(piece.text), logprobs

    def _begin(self, piece: Begin) -> dict[str, Any]:
        self._kind = piece.kind
        if piece.kind == "call":
            call = {"id": call_id(), "type": "function", "function": {"name": piece.name, "arguments": ""}}
            return {"tool_calls": [{"index": len(self._made), **call}]}
        before = self._reasoning if piece.kind == "reasoning" else self._content
        return self._said(BETWEEN if before is not None else "")

    def _said(self, text: str) -> dict[str, Any]:
        return {"content": text} if self._kind == "text" else {"reasoning": text, "reasoning_content": text}

    def _add(self, delta: dict[str, Any], logprobs: list[dict[str, Any]]) -> None:
        self._logprobs += logprobs
        for call in delta.get("tool_calls", ()):
            if "id" in call:
                self._made.append({**call, "function": dict(call["function"])})
                del self._made[-1]["index"]
            else:
                self._made[-1]["function"]["arguments"] += call["function"]["arguments"]
        if "content" in delta:
            self._content = (self._content or "") + delta["content"]
        elif "reasoning" in delta:
            self._reasoning = (self._reasoning or "") + delta["reasoning"]


def _chunk_choice(
    index: int, delta: dict[str, Any], logprobs: Sequence[dict[str, Any]] = (), end: End | None = None
) -> dict[str, Any]:
    lps = {"content": list(logprobs), "refusal": None} if logprobs else None
    return {"index": index, "delta": delta, "logprobs": lps, "finish_reason": end}


def call_id() -> str:
    """A new id of a call."""
    return f"call_{secrets.token_hex(12)}"


def token_logprob(vocab: Vocabulary, token: Token) -> dict[str, Any]:
    """A token's log-probability as chat and responses show it, the likeliest others beside it."""
    others = [_one(vocab, number, logprob) for number, logprob in token.top]
    return {**_one(vocab, token.id, token.logprob), "top_logprobs": others}


def _one(vocab: Vocabulary, number: int, logprob: float) -> dict[str, Any]:
    data = vocab.decode_bytes((number,))
    return {"token": data.decode("utf-8", "replace"), "logprob": logprob, "bytes": list(data)}
