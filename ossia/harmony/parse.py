"""Sampled token ids back to messages, one id at a time.

Well-formed ids give the messages that openai-harmony's `StreamableParser` gives. Where that parser stops with an
error, or takes a token for what it isn't, this one goes on: the text ends up in a message as far as it belongs to one,
and every departure from the format is listed in `problems` with the text that found no place. A model in training
samples all of it.

    <|start|> header <|message|> content <|end|>     also ended by <|call|> or <|return|>
"""

from __future__ import annotations

import codecs
import re
from collections.abc import Iterable
from dataclasses import replace
from typing import NamedTuple

from ossia.harmony.messages import ROLES, Message, Role
from ossia.harmony.vocab import STOPS, Vocabulary

CHANNEL, CONSTRAIN = "<|channel|>", "<|constrain|>"


class Opened(NamedTuple):
    """A message's header is complete; `message` has no content yet."""

    message: Message


class Delta(NamedTuple):
    """More content of the open message: whole characters only."""

    text: str


class Closed(NamedTuple):
    """A message is complete, or the ids ended."""

    message: Message


class Problem(NamedTuple):
    """A departure from the format at ids[position]; `text` is what was found there, verbatim."""

    position: int
    what: str
    text: str


Event = Opened | Delta | Closed


class StreamParser:
    """Takes the ids that follow a `<|start|>ROLE` prompt; with role None, ids that begin with `<|start|>` themselves.

    messages  complete messages so far
    current   the open message with its content so far, or None
    problems  departures from the format so far; empty for well-formed ids
    stop      the token that ended the last message, "<|return|>"; None while one is open
    """

    def __init__(self, vocab: Vocabulary, role: Role | None = "assistant") -> None:
        self._vocab = vocab
        self._stops = {vocab.special[name]: name for name in STOPS}
        self._start, self._channel = vocab.special["<|start|>"], vocab.special["<|channel|>"]
        self._message = vocab.special["<|message|>"]
        self._state = "between" if role is None else "header"
        self._role = role
        self._pending: list[int] = []  # ids of the header, or of text between messages
        self._position = -1
        self._open: Message | None = None
        self._content: list[str] = []
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self.messages: list[Message] = []
        self.problems: list[Problem] = []
        self.stop: str | None = None

    @property
    def current(self) -> Message | None:
        """The open message with its content so far; None between messages and inside a header."""
        return None if self._open is None else replace(self._open, content="".join(self._content))

    def push(self, number: int) -> list[Event]:
        """Take one id; returns what became known by it, oldest first."""
        self._position += 1
        if self._state == "content":
            return self._in_content(number)
        if number == self._start:
            return self._restart()
        if self._state == "between":
            self._pending.append(number)
            return []
        if number == self._message:
            return self._open_message()
        if number in self._stops:
            events = self._without_content(f"a header ended by {self._stops[number]} before its <|message|>")
            self.stop = self._stops[number]
            return events
        self._pending.append(number)
        return []

    def finish(self) -> list[Event]:
        """The ids are over: close the open message, and say what is unfinished. Call it once."""
        self._position += 1
        if self._state == "content":
            self.problems.append(Problem(self._position, "the ids end inside a message", ""))
            return self._close()
        if self._state == "header":
            return self._without_content("the ids end inside a header")
        self._stray()
        return []

    def _in_content(self, number: int) -> list[Event]:
        if number in self._stops:
            self.stop = self._stops[number]
            return self._close()
        data = self._vocab.decode_bytes((number,))
        if self._vocab.is_special(number):
            self.problems.append(Problem(self._position, "a special token inside a message", data.decode()))
        return self._text(self._utf8.decode(data))

    def _text(self, text: str) -> list[Event]:
        if not text:
            return []
        self._content.append(text)
        return [Delta(text)]

    def _close(self) -> list[Event]:
        events = self._text(self._utf8.decode(b"", True))
        message = self.current
        assert message is not None
        self.messages.append(message)
        self._utf8.reset()
        self._open, self._content, self._state = None, [], "between"
        return [*events, Closed(message)]

    def _restart(self) -> list[Event]:
        """`<|start|>` outside of content: a new header begins, whatever came before it."""
        events: list[Event] = []
        if self._state == "header" and (self._pending or self._role is None):
            events = self._without_content("<|start|> inside a header")
        self._stray()
        self._state, self._role, self.stop = "header", None, None
        return events

    def _stray(self) -> None:
        if self._pending:
            text = self._vocab.decode(self._pending)
            self.problems.append(Problem(self._position, "text between messages", text))
            self._pending = []

    def _open_message(self) -> list[Event]:
        channel, text = self._split_channel()
        words = [word for word in re.split(r"[ \t\n\f\r]+", text.replace(CONSTRAIN, f" {CONSTRAIN}")) if word]
        role, name = self._take_author(words)
        recipient, content_type = _take_recipient(words)
        if words:
            self.problems.append(Problem(self._position, "a header with words that mean nothing", " ".join(words)))
        return self._begin(Message(role, "", channel, recipient, name, content_type))

    def _begin(self, message: Message) -> list[Event]:
        self._open, self._state, self._pending, self.stop = message, "content", [], None
        return [Opened(message)]

    def _without_content(self, what: str) -> list[Event]:
        """A header that never reached `<|message|>`: what is not role or channel becomes the content."""
        self.problems.append(Problem(self._position, what, self._vocab.decode(self._pending)))
        if not self._pending:
            self._state = "between"
            return []
        channel, text = self._split_channel()
        words = text.split(maxsplit=1)
        role: Role = self._role or "assistant"
        if words and words[0] in ROLES and (self._role is None or words[0] == role):
            role = words[0] if words[0] != "tool" else role  # a tool would need its own name
            text = words[1] if len(words) > 1 else ""
        return [*self._begin(Message(role, "", channel)), *self._text(text.strip()), *self._close()]

    def _split_channel(self) -> tuple[str | None, str]:
        """The channel's name, and the header's text without it. Clears nothing."""
        ids = self._pending
        if self._channel not in ids:
            return None, self._vocab.decode(ids)
        at = ids.index(self._channel)
        after = self._vocab.decode(ids[at + 1 :])
        name = re.match(r"[^\s<]*", after)
        assert name is not None
        if not name[0]:
            self.problems.append(Problem(self._position, "<|channel|> without a channel's name", after))
        rest = after[name.end() :]
        if CHANNEL in rest:  # the first one holds: a recipient is never read out of another
            self.problems.append(Problem(self._position, "a header with more than one <|channel|>", after))
            rest = re.sub(rf"{re.escape(CHANNEL)}[^\s<]*", "", rest)
        return name[0] or None, self._vocab.decode(ids[:at]) + rest

    def _take_author(self, words: list[str]) -> tuple[Role, str | None]:
        """Take role and name off the front of a header's words: `assistant`, `user:Ann`, or a tool's own name."""
        if self._role is not None:
            if words and words[0] == self._role:
                del words[0]
            return self._role, None
        if not words:
            self.problems.append(Problem(self._position, "a header without a role", ""))
            return "assistant", None
        first, colon, name = words.pop(0).partition(":")
        if first in ROLES and first != "tool":
            return first, name if colon else None
        author = first + colon + name
        if not words and not author.startswith("to="):
            self.problems.append(
                Problem(self._position, "a header whose author is no role, without a recipient", author)
            )
        return "tool", author


def _take_recipient(words: list[str]) -> tuple[str | None, str | None]:
    """Take recipient and content type off the end of a header's words: `to=functions.f <|constrain|>json`.

    A single word that is neither is a recipient without its `to=`, as the library has it; but the library takes even a
    lone `<|constrain|>json` for one, which here is the content type it is.
    """
    if not words:
        return None, None
    last = words.pop()
    if last.startswith("to="):
        return last.removeprefix("to="), None
    if not words:
        return (None, last) if last.startswith(CONSTRAIN) else (last, None)
    return words.pop().removeprefix("to="), last


def parse_completion(vocab: Vocabulary, ids: Iterable[int], role: Role | None = "assistant") -> list[Message]:
    """Messages of sampled ids, the last one too if the ids end inside it. Use a StreamParser to see the problems.

    role  whose message the ids continue (`completion` ends in `<|start|>assistant`); None: they begin with `<|start|>`
    """
    parser = StreamParser(vocab, role)
    for number in ids:
        parser.push(number)
    parser.finish()
    return parser.messages
