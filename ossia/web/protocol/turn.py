"""Sampled tokens of one choice -> parts that a client sees: reasoning, visible text, calls.

Harmony's channels decide what is what: analysis is reasoning; a message to a recipient is a call; all else of the
assistant is visible, the commentary before a call too. Several calls in one turn are kept as such: the model ends a
call with <|call|>, which ends the turn, or with <|end|> and goes on.
Stop texts are looked for in the visible text alone. Text that could still become one is held back, and so are the
tokens behind it. A turn also ends where the model begins to speak for somebody else.
"""

from __future__ import annotations

import codecs
from collections import deque
from collections.abc import Sequence
from typing import Literal, NamedTuple

from ossia.engine import PromptToken, Token
from ossia.harmony import Closed, Delta, Message, Opened, StreamParser, Vocabulary

Kind = Literal["reasoning", "text", "call"]
End = Literal["stop", "length", "tool_calls"]
EVERYBODY = ("all", "user")  # recipients that are no tools


class Begin(NamedTuple):
    """A part begins. `name` is a call's function; `preamble` is true for what is said before a call."""

    kind: Kind
    name: str
    preamble: bool


class Placed(NamedTuple):
    """A token of visible text, and the place of its first character there."""

    token: Token | PromptToken
    place: int


class More(NamedTuple):
    """More text of the part, whole characters only; `tokens` are those whose first character is in it."""

    text: str
    tokens: tuple[Placed, ...]


class Done(NamedTuple):
    """The part is over; `whole` is false where the turn broke off inside it."""

    whole: bool


Piece = Begin | More | Done


class Turn:
    """Takes one choice's tokens as they come.

    one_call       the turn is over after its first call
    only_final     commentary is reasoning too: the visible text has to be JSON and nothing else
    end            why the turn is over, or None; it may be over before the engine says so, as after a stop text
    num_tokens     sampled so far, the stop among them
    num_reasoning  of those, inside analysis
    """

    def __init__(
        self, vocab: Vocabulary, stops: tuple[str, ...] = (), *, one_call: bool = False, only_final: bool = False
    ) -> None:
        self._only_final = only_final
        self._parser = StreamParser(vocab)
        self._end_of_text = vocab.special.get("<|endoftext|>")
        self._stops, self._one_call = stops, one_call
        self._kind: Kind | None = None
        self._text = Held(stops)
        self._parts = self._calls = 0
        self.end: End | None = None
        self.num_tokens = self.num_reasoning = 0

    def push(self, token: Token) -> list[Piece]:
        """The pieces that became known by this token."""
        assert self.end is None, "a token after the end of the turn"
        self.num_tokens += 1
        self.num_reasoning += self._kind == "reasoning"
        if self._kind == "text":
            self._text.expect(token)
        pieces: list[Piece] = []
        # the end of all text stops the engine, but to the parser it is a token inside a message
        events = [] if token.id == self._end_of_text else self._parser.push(token.id)
        for event in events:
            self._take(event, pieces, whole=True)
            if self.end is not None:
                return pieces
        if token.finish is not None:
            for event in self._rest(token.finish == "length"):
                self._take(event, pieces, whole=token.finish == "stop")
            if self.end is None:
                self.end = "tool_calls" if self._calls and token.finish == "stop" else token.finish
        return pieces

    def _rest(self, cut_off: bool) -> list[Opened | Delta | Closed]:
        """What the parser makes of the end. A header that was cut off is no text to show, unless nothing else came."""
        events = self._parser.finish()
        if cut_off and events and isinstance(events[0], Opened):
            message = self._parser.messages[-1]
            return [] if self._parts or message.channel is not None or not message.content else events
        return events

    def _take(self, event: Opened | Delta | Closed, pieces: list[Piece], *, whole: bool) -> None:
        if isinstance(event, Opened):
            self._open(event.message, pieces)
        elif isinstance(event, Delta) and self._kind == "text":
            text, tokens, stopped = self._text.push(event.text)
            if text or tokens:
                pieces.append(More(text, tokens))
            if stopped:
                pieces.append(Done(True))
                self._kind, self.end = None, "stop"
        elif isinstance(event, Delta) and self._kind is not None:
            pieces.append(More(event.text, ()))
        elif isinstance(event, Closed) and self._kind is not None:
            self._close(pieces, whole)

    def _open(self, message: Message, pieces: list[Piece]) -> None:
        if message.role != "assistant":
            self.end = "tool_calls" if self._calls else "stop"
            return
        self._parts += 1
        if message.recipient is not None and message.recipient not in EVERYBODY:
            self._kind = "call"
            pieces.append(Begin("call", message.recipient.removeprefix("functions."), False))
        elif message.channel == "analysis" or (self._only_final and message.channel == "commentary"):
            self._kind = "reasoning"
            pieces.append(Begin("reasoning", "", False))
        else:
            self._kind, self._text = "text", Held(self._stops)
            pieces.append(Begin("text", "", message.channel == "commentary"))

    def _close(self, pieces: list[Piece], whole: bool) -> None:
        if self._kind == "text":
            text, tokens = self._text.rest()
            if text or tokens:
                pieces.append(More(text, tokens))
        pieces.append(Done(whole))
        if self._kind == "call":
            self._calls += 1
            if self._one_call and whole:
                self.end = "tool_calls"
        self._kind = None


class PlainTurn:
    """A turn without Harmony, for plain completions: all text is visible, special tokens by their names.

    end, num_tokens  as in Turn
    """

    def __init__(self, vocab: Vocabulary, stops: tuple[str, ...], stop_ids: frozenset[int]) -> None:
        self._vocab, self._stops, self._stop_ids, self._text = vocab, stops, stop_ids, Held(stops)
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self.end: End | None = None
        self.num_tokens = self.num_reasoning = 0

    def echo(self, prompt: Sequence[PromptToken], whole: bool) -> list[Piece]:
        """The prompt as the first text, in which no stop is looked for; `whole`: nothing comes after it."""
        text, tokens = "", []
        for number, token in enumerate(prompt, start=1):
            tokens.append(Placed(token, len(text)))
            text += self._utf8.decode(self._vocab.decode_bytes((token.id,)), whole and number == len(prompt))
        self._text = Held(self._stops, len(text))
        if whole:
            self.end = "length"
        return [More(text, tuple(tokens))]

    def push(self, token: Token) -> list[Piece]:
        """The pieces that became known by this token."""
        assert self.end is None, "a token after the end of the turn"
        self.num_tokens += 1
        stop, last = token.id in self._stop_ids, token.finish is not None
        if not stop:
            self._text.expect(token)
        data = b"" if stop else self._vocab.decode_bytes((token.id,))
        text, tokens, stopped = self._text.push(self._utf8.decode(data, last))
        self.end = "stop" if stopped else token.finish
        if last and not stopped:
            rest, others = self._text.rest()
            text, tokens = text + rest, tokens + others
        return [More(text, tokens)] if text or tokens else []


class Held:
    """Text on its way out: what could still become a stop text stays until it can't. `before`: characters of other text
    that came before it."""

    def __init__(self, stops: tuple[str, ...], before: int = 0) -> None:
        self._stops = stops
        self._text = ""
        self._seen = self._out = before  # characters that came, and that went
        self._tokens: deque[Placed] = deque()

    def expect(self, token: Token) -> None:
        """The next text comes from this token."""
        self._tokens.append(Placed(token, self._seen))

    def push(self, text: str) -> tuple[str, tuple[Placed, ...], bool]:
        """More text. Returns what can go out, its tokens, and whether a stop text came: then that was all."""
        self._text += text
        self._seen += len(text)
        found = min((at for stop in self._stops if (at := self._text.find(stop)) >= 0), default=-1)
        if found >= 0:
            out = self._release(found)
            return out[0], out[1], True
        return *self._release(len(self._text) - self._partial()), False

    def rest(self) -> tuple[str, tuple[Placed, ...]]:
        """All that is left: nothing comes any more."""
        text, tokens = self._release(len(self._text))
        others = tuple(waiting for waiting in self._tokens if waiting.place < self._seen)
        return text, tokens + others

    def _partial(self) -> int:
        """Characters at the end of the text that begin a stop text, at most."""
        for size in range(min(len(self._text), max(map(len, self._stops), default=1) - 1), 0, -1):
            if any(stop.startswith(self._text[-size:]) for stop in self._stops):
                return size
        return 0

    def _release(self, size: int) -> tuple[str, tuple[Placed, ...]]:
        text, self._text = self._text[:size], self._text[size:]
        self._out += size
        tokens = []
        while self._tokens and self._tokens[0].place < self._out:
            tokens.append(self._tokens.popleft())
        return text, tuple(tokens)
