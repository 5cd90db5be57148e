"""`ossia chat`: talk to a model in the terminal, its thinking shown apart from its answer.

Thinking stands under its own heading with a bar before each line, dimmed where the terminal can. Where stdout is no
terminal it gets the answers alone, and everything else goes to stderr, so that a pipe of one question a line works:
`ossia chat MODEL < questions.txt > answers.txt`.
"""

from __future__ import annotations

import signal
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Literal, Protocol, TextIO

from ossia.engine import Engine, Request, Sampling, harmony_stops
from ossia.errors import HarmonyError, UserError
from ossia.harmony import (
    EFFORTS,
    Closed,
    Conversation,
    Delta,
    Effort,
    Message,
    Opened,
    Renderer,
    StreamParser,
    System,
    Vocabulary,
)
from ossia.model.open import DeviceChoice, DtypeName, WeightsChoice, open_model

HELP = """\
/reset            forget the conversation
/effort LEVEL     low, medium or high
/developer TEXT   developer instructions; no text takes them away
/help             this list
/quit             leave, as Ctrl-D does
Ctrl-C stops an answer. Begin with a space to send a line that starts with a slash."""
DIM, PLAIN = "\x1b[2m", "\x1b[0m"
_VISIBLE = {code: f"\\x{code:02x}" for code in (*range(32), *range(127, 160)) if chr(code) not in "\n\t"}


def run_chat(
    model: str,
    *,
    adapter: str | None = None,
    system: str | None = None,
    developer: str | None = None,
    effort: Effort = "medium",
    temperature: float = 1.0,
    top_p: float = 1.0,
    top_k: int = 0,
    max_tokens: int = 4096,
    seed: int | None = None,
    dtype: DtypeName = "bfloat16",
    weights: WeightsChoice = "auto",
    device: DeviceChoice = "auto",
) -> None:
    """Ask and answer until the input ends.

    system  replaces the identity in Harmony's system message
    seed    the same seed and the same questions give the same answers; None: others each time
    Raises  UserError for a model or an option that can't be used; in a pipe also for a question that can't be answered
    """
    sampling = Sampling(temperature, top_p, top_k)
    head = System(reasoning_effort=effort) if system is None else System(system, reasoning_effort=effort)
    transformer, vocab = open_model(model, adapter=adapter, dtype=dtype, weights=weights, device=device)
    source = EngineSource(Engine(transformer), vocab, sampling, max_tokens, seed)
    about = f"{model}, adapter {adapter}" if adapter else model
    converse(
        Chat(source, Screen(), head, developer),
        f"{about} ({transformer.weights.placement} weights, {dtype}, {transformer.device})",
    )


def converse(chat: Chat, about: str) -> None:
    """Ask and answer until the input ends; `about` says with whom."""
    if chat.screen.interactive:
        chat.screen.note(f"{about}. /help for help.")
    while not _talk(chat):
        chat.screen.note("\n(Ctrl-D or /quit leaves)")


def _talk(chat: Chat) -> bool:
    """Ask and answer; True if the input has ended, False if a Ctrl-C came between two answers."""
    try:
        for line in chat.screen.questions():
            if line.startswith("/"):
                if not chat.command(line):
                    return True
            elif line.strip():
                chat.turn(line)
    except KeyboardInterrupt:
        if not chat.screen.interactive:
            raise
        return False
    return True


class Screen:
    """Input lines, and where words go: answers to stdout; the rest there too in a terminal, else to stderr."""

    def __init__(self) -> None:
        self.interactive = sys.stdin.isatty()
        self._answers = sys.stdout
        self._rest = sys.stdout if sys.stdout.isatty() else sys.stderr
        self._dim = self._rest.isatty()
        self._file: TextIO = self._answers
        self._bar = False
        self._fresh = True  # nothing stands on the current line yet
        if self.interactive and self._rest is sys.stdout:
            try:
                import readline  # noqa: F401 - gives input() history and editing
            except ImportError:
                self.note("(this Python has no readline: no history, no editing)")

    def questions(self) -> Iterator[str]:
        """Lines of the input, until it ends."""
        while (line := self._line("\nyou> ")) is not None:
            yield line

    def _line(self, prompt: str) -> str | None:
        """The next line of the input; None if it has ended."""
        if not self.interactive:
            return _read_line()
        with _ticking():
            if self._rest is sys.stdout:
                try:
                    return input(prompt)
                except EOFError:
                    return None
            print(prompt, end="", file=self._rest, flush=True)
            return _read_line()

    def ask(self, what: str) -> str | None:
        """A line in answer to `what`; None where nobody is there to answer, or nothing is."""
        if not self.interactive:
            return None
        return (self._line(f"{what}> ") or "").strip() or None

    def note(self, words: str) -> None:
        """A remark of the program's own."""
        self.end()
        self._style(f"{words}\n")

    def begin(self, label: str | None, *, bar: bool = False) -> None:
        """What `write` writes from now on: the answer (no label), or something beside it, maybe with a bar a line."""
        self.end()
        self._file, self._bar = (self._answers, False) if label is None else (self._rest, bar)
        if label is not None:
            self._style(f"[{label}]\n")
        elif self._rest is self._answers:
            self._style("[answer]\n")

    def write(self, text: str) -> None:
        """More of what began; control characters are spelled out, they could move the cursor or worse."""
        for line in text.translate(_VISIBLE).splitlines(keepends=True):
            if self._bar:
                self._style(f"| {line}" if self._fresh else line)
            else:
                print(line, end="", file=self._file, flush=True)
            self._fresh = line.endswith("\n")

    def end(self) -> None:
        """Finish the line."""
        if not self._fresh:
            print(file=self._file, flush=True)
        self._fresh = True

    def _style(self, text: str) -> None:
        print(f"{DIM}{text}{PLAIN}" if self._dim else text, end="", file=self._rest, flush=True)


Event = Opened | Delta | Closed


class Source(Protocol):
    """Where answers come from.

    finish  why the last one ended: "stop", "length", or "call" where it waits for results; None if it was broken off
    """

    finish: Literal["stop", "length", "call"] | None

    def answer(self, conversation: Conversation) -> Iterator[Sequence[Event]]:
        """The next messages of the assistant, as they come: one item a token."""

    def rest(self) -> Sequence[Event]:
        """What is still open when there is no more of an answer. Called once after each."""


class EngineSource:
    """Answers of a model in this process, each with a seed of its own."""

    def __init__(
        self, engine: Engine, vocab: Vocabulary, sampling: Sampling, max_tokens: int, seed: int | None
    ) -> None:
        self._engine, self._vocab, self._sampling = engine, vocab, sampling
        self._max_tokens, self._seed, self._answers = max_tokens, seed, 0
        self._renderer, self._parser = Renderer(vocab), StreamParser(vocab)
        self.finish: Literal["stop", "length", "call"] | None = None

    def answer(self, conversation: Conversation) -> Iterator[Sequence[Event]]:
        """Sample up to the next stop. Raises HarmonyError for what can't be rendered, UserError as the engine does."""
        self._parser, self.finish = StreamParser(self._vocab), None
        ids = self._renderer.completion(conversation)
        seed = None if self._seed is None else self._seed * 2**64 + self._answers
        self._answers += 1
        rules, stops = replace(self._sampling, seed=seed), harmony_stops(self._vocab)
        for token in self._engine.stream([Request(ids, rules, self._max_tokens, stops)]):
            yield self._parser.push(token.id)
            if token.finish is not None:
                self.finish = "call" if self._parser.stop == "<|call|>" else token.finish

    def rest(self) -> Sequence[Event]:
        """What is open where the tokens ended."""
        return self._parser.finish()


@dataclass(slots=True)
class Chat:
    """A conversation with a model. A turn that ends without an answer leaves no trace in it."""

    source: Source
    screen: Screen
    system: System
    developer: str | None
    messages: list[Message] = field(default_factory=list)

    def command(self, line: str) -> bool:
        """Do what a line that begins with a slash says; False if that is to leave."""
        name, _, rest = line.strip().partition(" ")
        if name in ("/quit", "/exit"):
            return False
        if name == "/reset":
            self.messages.clear()
            self.screen.note("the conversation is forgotten")
        elif name == "/effort" and rest in EFFORTS:
            self.system = replace(self.system, reasoning_effort=rest)
            self.screen.note(f"reasoning effort: {rest}")
        elif name == "/effort":
            self.screen.note(f"reasoning effort is {self.system.reasoning_effort}; allowed: {', '.join(EFFORTS)}")
        elif name == "/developer":
            self.developer = rest or None
            self.screen.note("developer instructions " + ("are set" if rest else "are gone"))
        else:
            self.screen.note(HELP if name == "/help" else f"there is no command {name}\n{HELP}")
        return True

    def turn(self, question: str) -> None:
        """One question and its answer, with a tool's results in between where the user gives them."""
        before = len(self.messages)
        self.messages.append(Message("user", question))
        try:
            while (calls := self._answer()) and self._get_results(calls):
                pass
        except KeyboardInterrupt:
            if not self.screen.interactive:
                raise
            self.screen.note("[stopped]")
        except (HarmonyError, UserError) as error:
            del self.messages[before:]
            if not self.screen.interactive:
                raise
            self.screen.note(f"{error}\n(this turn is left out of the conversation; /reset begins a new one)")
            return
        if not any(map(_is_answer, self.messages[before:])):
            del self.messages[before:]
            self.screen.note("(no answer, so this turn is left out of the conversation)")

    def _get_results(self, calls: Sequence[Message]) -> bool:
        """Ask the user for each call's result; False as soon as there is none."""
        for call in calls:
            result = self.screen.ask(f"result of {call.recipient} (empty: none)")
            if result is None:
                return False
            self.messages.append(Message("tool", result, call.channel, "assistant", call.recipient))
        return True

    def _answer(self) -> list[Message]:
        """Show an answer as it comes; the calls that wait for their results, if it ends in some."""
        conversation = Conversation(tuple(self.messages), self.system, self.developer)
        begun, num_tokens, said = time.monotonic(), 0, list[Message]()
        try:
            for events in self.source.answer(conversation):
                num_tokens += 1
                said += self._show(events)
        finally:
            said += self._show(self.source.rest())
            self.messages += said
            self.screen.end()
        if self.source.finish == "length":
            self.screen.note(f"[cut off after {num_tokens:,} tokens; --max-tokens allows more]")
        rate = num_tokens / max(time.monotonic() - begun, 1e-9)
        if self.screen.interactive:
            self.screen.note(f"[{num_tokens:,} tokens, {rate:,.0f}/s]")
        return [message for message in said if message.recipient is not None] if self.source.finish == "call" else []

    def _show(self, events: Sequence[Event]) -> list[Message]:
        """Show what came; the assistant's messages that are complete by it."""
        said = []
        for event in events:
            if isinstance(event, Opened):
                message = event.message
                if message.recipient is not None:
                    self.screen.begin(f"call of {message.recipient}", bar=True)
                elif message.channel in ("analysis", "commentary"):
                    self.screen.begin("thinking" if message.channel == "analysis" else "commentary", bar=True)
                else:
                    self.screen.begin(None)
            elif isinstance(event, Delta):
                self.screen.write(event.text)
            else:
                self.screen.end()
                said += [event.message] if event.message.role == "assistant" else []
        return said


def _read_line() -> str | None:
    line = sys.stdin.readline()
    return line.removesuffix("\n") if line else None


@contextmanager
def _ticking() -> Iterator[None]:
    """While entered, whatever waits for a key is woken ten times a second.

    A Ctrl-C that comes after the prompt is shown and before the system call that waits is only noted; without another
    signal it would take effect with the next key.
    """
    before = signal.signal(signal.SIGALRM, lambda *_: None)
    signal.setitimer(signal.ITIMER_REAL, 0.1, 0.1)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def _is_answer(message: Message) -> bool:
    return message.role == "assistant" and message.recipient is None and message.channel in ("final", None)
