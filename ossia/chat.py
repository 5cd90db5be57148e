"""`ossia chat`: talk to a model in the terminal, its thinking shown apart from its answer.

Thinking stands under its own heading with a bar before each line, dimmed where the terminal can. Where stdout is no
terminal it gets the answers alone, and everything else goes to stderr, so that a pipe of one question a line works:
`ossia chat MODEL < questions.txt > answers.txt`.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import TextIO

from ossia.engine import Engine, Request, Sampling, Token, harmony_stops
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
    screen = Screen()
    chat = Chat(Engine(transformer), vocab, screen, head, developer, sampling, max_tokens, seed)
    if screen.interactive:
        about = f"{model}, adapter {adapter}" if adapter else model
        screen.note(
            f"{about} ({transformer.weights.placement} weights, {dtype}, {transformer.device}). /help for help."
        )
    for line in screen.questions():
        if line.startswith("/"):
            if not chat.command(line):
                return
        elif line.strip():
            chat.turn(line)


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

    def questions(self) -> Iterator[str]:
        """Lines of the input, until it ends; an interrupt between them ends nothing."""
        if self.interactive and sys.stdout.isatty():
            try:
                import readline  # noqa: F401 - gives input() history and editing
            except ImportError:
                self.note("(this Python has no readline: no history, no editing)")
        while True:
            try:
                yield self._line()
            except EOFError:
                return
            except KeyboardInterrupt:
                self.note("\n(Ctrl-D or /quit leaves)")

    def _line(self) -> str:
        if self.interactive and self._rest is sys.stdout:
            return input("\nyou> ")
        if self.interactive:
            print("\nyou> ", end="", file=self._rest, flush=True)
        line = sys.stdin.readline()
        if not line:
            raise EOFError
        return line.removesuffix("\n")

    def ask(self, what: str) -> str | None:
        """A line in answer to `what`; None where nobody is there to answer, or nothing is."""
        if not self.interactive:
            return None
        print(f"{what}> ", end="", file=self._rest, flush=True)
        return sys.stdin.readline().strip() or None

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


@dataclass(slots=True)
class Chat:
    """A conversation with a model. A turn that ends without an answer leaves no trace in it."""

    engine: Engine
    vocab: Vocabulary
    screen: Screen
    system: System
    developer: str | None
    sampling: Sampling
    max_tokens: int
    seed: int | None
    messages: list[Message] = field(default_factory=list)
    answers: int = 0

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
            while (call := self._answer()) is not None:
                result = self.screen.ask(f"result of {call.recipient} (empty: none)")
                if result is None:
                    break
                self.messages.append(Message("tool", result, call.channel, "assistant", call.recipient))
        except KeyboardInterrupt:
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

    def _answer(self) -> Message | None:
        """Sample up to the next stop and show it as it comes; the call that waits for its result, if it ends in one."""
        conversation = Conversation(tuple(self.messages), self.system, self.developer)
        ids = Renderer(self.vocab).completion(conversation)
        seed = None if self.seed is None else self.seed * 2**64 + self.answers
        self.answers += 1
        request = Request(ids, replace(self.sampling, seed=seed), self.max_tokens, harmony_stops(self.vocab))
        parser, begun, num_tokens = StreamParser(self.vocab), time.monotonic(), 0
        token: Token | None = None
        try:
            for token in self.engine.stream([request]):
                num_tokens += 1
                self._show(parser.push(token.id))
        finally:
            self._show(parser.finish())
            said = [message for message in parser.messages if message.role == "assistant"]
            self.messages += said
            self.screen.end()
        if token is not None and token.finish == "length":
            self.screen.note(f"[cut off after {num_tokens:,} tokens; --max-tokens allows more]")
        rate = num_tokens / max(time.monotonic() - begun, 1e-9)
        if self.screen.interactive:
            self.screen.note(f"[{num_tokens:,} tokens, {rate:,.0f}/s]")
        return said[-1] if said and said[-1].recipient is not None and parser.stop == "<|call|>" else None

    def _show(self, events: Sequence[Opened | Delta | Closed]) -> None:
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


def _is_answer(message: Message) -> bool:
    return message.role == "assistant" and message.recipient is None and message.channel in ("final", None)
