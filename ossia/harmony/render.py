"""A conversation to token ids with one weight per token: trained is what the model would have sampled, where it would.

Ids equal openai-harmony 0.0.8's, its dropping of old analysis included (the oracle tests hold that). What the library
doesn't say is which tokens to train. A *generation* is what the model samples in one go: assistant messages one after
another, up to a call (`<|call|>`), an answer (`<|return|>`) or the next message of someone else. Its context is what
`completion` gives for the messages before it; its sampled tokens start right after that context's `<|start|>assistant`.

Because earlier analysis is dropped once an answer was given, generations of one conversation can have contexts that are
not prefixes of each other. Each generation joins the longest sample that its context continues, else it starts a new
one. All contexts either keep the analysis before the first answer or lack it, so two samples are always enough.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from ossia.errors import HarmonyError, TokenizerError
from ossia.harmony.messages import CHANNELS, Conversation, Message, System, Tool
from ossia.harmony.tools import builtin_tools, function_tools
from ossia.harmony.vocab import Vocabulary, check_field

CONSTRAIN = "<|constrain|>"
CACHE_ENTRIES = 4096
MOST_SAMPLES = 2  # of one conversation, as above


@dataclass(frozen=True, slots=True)
class TrainOn:
    """Which assistant messages are trained, unless their own `train` says otherwise.

    turns     "all", or "last": those after the last user (or developer) message that was answered
    channels  messages of other channels keep weight 0
    """

    turns: Literal["all", "last"] = "all"
    channels: tuple[str, ...] = CHANNELS

    def __post_init__(self) -> None:
        if self.turns not in ("all", "last"):
            raise HarmonyError(f"is {self.turns!r}; allowed: all, last", "turns")
        unknown = [channel for channel in self.channels if channel not in CHANNELS]
        if unknown or not self.channels:
            raise HarmonyError(f"is {list(self.channels)}; allowed: one or more of {', '.join(CHANNELS)}", "channels")


class Span(NamedTuple):
    """Positions start..end of one message, from its `<|start|>` to its end token."""

    start: int
    end: int
    role: str
    channel: str | None


@dataclass(frozen=True, slots=True)
class Rendered:
    """One training sample. `weights`, and `targets` where there are any, are as long as `ids`; `spans` cover it.

    weights[i] says how much predicting targets[i] (ids[i] where `targets` is None) from ids[:i] counts; 0: not trained.
    """

    ids: list[int]
    weights: list[float]
    targets: list[int] | None
    spans: list[Span]


class _Part(NamedTuple):
    """An encoded message; `ends_turn` for what ends a generation (a call, or the assistant's final message)."""

    ids: list[int]
    role: str
    channel: str | None
    is_answer: bool
    ends_turn: bool


class Renderer:
    """Renders conversations with one vocabulary; remembers the ids of headers and of system and developer texts."""

    def __init__(self, vocab: Vocabulary) -> None:
        self._vocab = vocab
        special = vocab.special
        self._start, self._end = special["<|start|>"], special["<|end|>"]
        self._channel, self._message = special["<|channel|>"], special["<|message|>"]
        self._constrain, self._call = special[CONSTRAIN], special["<|call|>"]
        self._return = special["<|return|>"]
        self._prompt = [self._start, *vocab.encode("assistant")]
        self._headers: dict[tuple[str | None, ...], list[int]] = {}
        self._texts: dict[tuple[str, str], _Part] = {}

    def completion(self, conversation: Conversation) -> list[int]:
        """Ids to sample from: the conversation, then `<|start|>assistant`.

        Raises  HarmonyError, naming the field, for what can't be rendered
        Source  `render_conversation_for_completion` of openai-harmony 0.0.8
        """
        parts = self._encode(conversation)
        ids = [number for index in _context(parts, len(parts)) for number in parts[index].ids]
        return ids + self._prompt

    def continuation(self, messages: Sequence[Message]) -> list[int]:
        """Ids to sample from after a turn that was sampled: these messages (tool results), then `<|start|>assistant`.

        What was sampled stays as it is: its ids come before these. Raises as `completion`
        """
        ids = [
            number for message in messages for number in self._part(message, self._vocab.encode(message.content)).ids
        ]
        return ids + self._prompt

    def training_ids(self, conversation: Conversation) -> list[int]:
        """Ids of the whole conversation as openai-harmony 0.0.8's `render_conversation_for_training` gives them.

        Only for comparison and display: with several turns, `samples` is what trains. Raises as `completion`.
        """
        parts = self._encode(conversation)
        ids = [number for index in _context(parts, len(parts)) for number in parts[index].ids]
        if parts[-1].is_answer:
            ids[-1] = self._return
        return ids

    def samples(self, conversation: Conversation, train_on: TrainOn | None = None) -> list[Rendered]:
        """The fewest samples that train every wanted message once, in the context it is sampled in.

        train_on  which messages (default: every assistant message)
        Returns   0, 1 or 2 samples; none if nothing is to be trained. Messages after the last trained one are left out.
                  Where an answer is followed by more, its id is `<|end|>` and its target `<|return|>`.
        Raises    as `completion`
        """
        parts = self._encode(conversation)
        offset = len(parts) - len(conversation.messages)
        weights = [0.0] * offset + message_weights(conversation.messages, train_on or TrainOn())
        chains: list[tuple[list[int], dict[int, bool]]] = []  # message indices; trained ones -> opens its generation
        for start, stop in _generations(parts):
            if not any(weights[start:stop]):
                continue
            context = _context(parts, start)
            fitting = [chain for chain in chains if context[: len(chain[0])] == chain[0]]
            indices, trained = max(fitting, key=lambda chain: len(chain[0]), default=([], {}))
            if not fitting:
                chains.append((indices, trained))
            indices[:] = [*context, *range(start, stop)]
            trained.update({index: index == start for index in range(start, stop) if weights[index]})
        return [self._sample(parts, weights, indices, trained) for indices, trained in chains]

    def _sample(
        self, parts: Sequence[_Part], weights: Sequence[float], indices: Sequence[int], trained: dict[int, bool]
    ) -> Rendered:
        ids: list[int] = []
        token_weights: list[float] = []
        spans: list[Span] = []
        answers: list[int] = []
        for index in indices:
            part = parts[index]
            start, count = len(ids), len(part.ids)
            ids += part.ids
            spans.append(Span(start, start + count, part.role, part.channel))
            if index not in trained:
                token_weights += [0.0] * count
                continue
            given = len(self._prompt) if trained[index] else 0
            token_weights += [0.0] * given + [weights[index]] * (count - given)
            if part.is_answer:
                answers.append(start + count - 1)
        if parts[indices[-1]].is_answer:
            ids[-1] = self._return
        targets = None
        if any(ids[position] != self._return for position in answers):
            targets = ids.copy()
            for position in answers:
                targets[position] = self._return
        return Rendered(ids, token_weights, targets, spans)

    def _encode(self, conversation: Conversation) -> list[_Part]:
        """Every message's ids, the system and developer messages' first; one batch for all texts not met before."""
        parts = [self._plain("system", system_text(conversation.system, bool(conversation.tools)))]
        developer = developer_text(conversation.instructions, conversation.tools)
        if developer is not None:
            parts.append(self._plain("developer", developer))
        messages = conversation.messages
        texts = [message.content for message in messages]
        try:
            bodies = self._vocab.encode_batch(texts)
        except TokenizerError:
            for index, text in enumerate(texts):
                check_field(text, f"messages[{index}].content")
            raise
        parts += [self._part(message, body) for message, body in zip(messages, bodies, strict=True)]
        return parts

    def _part(self, message: Message, body: Sequence[int]) -> _Part:
        assistant = message.role == "assistant"
        calls = assistant and message.recipient is not None
        ids = [*self._header(message), *body, self._call if calls else self._end]
        answer = assistant and message.channel == "final"
        return _Part(ids, message.role, message.channel, answer, answer or calls)

    def _plain(self, role: Literal["system", "developer"], text: str) -> _Part:
        """A system or developer message; it is remembered, because a data set repeats few of them."""
        part = self._texts.get((role, text))
        if part is None:
            check_field(text, role)
            if len(self._texts) >= CACHE_ENTRIES:
                self._texts.clear()
            ids = [*self._header(Message(role, "")), *self._vocab.encode(text), self._end]
            part = self._texts[role, text] = _Part(ids, role, None, False, False)
        return part

    def _header(self, message: Message) -> list[int]:
        """`<|start|>` to `<|message|>`; each piece of text is encoded by itself, as the library does."""
        key = (message.role, message.name, message.recipient, message.channel, message.content_type)
        ids = self._headers.get(key)
        if ids is None:
            if len(self._headers) >= CACHE_ENTRIES:
                self._headers.clear()
            ids = self._headers[key] = self._encode_header(*key)
        return ids

    def _encode_header(
        self, role: str, name: str | None, recipient: str | None, channel: str | None, content_type: str | None
    ) -> list[int]:
        encode = self._vocab.encode
        if role == "tool":
            ids = [self._start, *encode(name or "")]
        else:
            ids = [self._start, *encode(role), *(encode(f":{name}") if name is not None else ())]
        if recipient is not None and recipient != "all":
            ids += encode(f" to={recipient}")
        if channel is not None:
            ids += [self._channel, *encode(channel)]
        if content_type is not None and content_type.startswith(CONSTRAIN):
            ids += [*encode(" "), self._constrain, *encode(content_type.removeprefix(CONSTRAIN))]
        elif content_type is not None:
            ids += encode(f" {content_type}")
        return [*ids, self._message]


def system_text(system: System, has_functions: bool) -> str:
    """The text of the system message; `has_functions` adds the line that sends calls to the commentary channel."""
    top = [system.identity]
    if system.knowledge_cutoff is not None:
        top.append(f"Knowledge cutoff: {system.knowledge_cutoff}")
    if system.current_date is not None:
        top.append(f"Current date: {system.current_date}")
    sections = ["\n".join(top), f"Reasoning: {system.reasoning_effort}"]
    if system.builtin_tools:
        sections.append(builtin_tools(system.builtin_tools))
    channels = f"# Valid channels: {', '.join(CHANNELS)}. Channel must be included for every message."
    if has_functions:
        channels += "\nCalls to these tools must go to the commentary channel: 'functions'."
    return "\n\n".join([*sections, channels])


def developer_text(instructions: str | None, tools: Sequence[Tool]) -> str | None:
    """The text of the developer message: instructions, then function tools; None where there are neither."""
    sections = [] if instructions is None else ["# Instructions", instructions]
    if tools:
        sections.append(function_tools(tools))
    return "\n\n".join(sections) if sections else None


def _context(parts: Sequence[_Part], stop: int) -> list[int]:
    """Indices of the messages that the library keeps of parts[:stop].

    If the last assistant message is an answer, analysis before the *first* answer is dropped (and only that).
    """
    last = next((part for part in reversed(parts[:stop]) if part.role == "assistant"), None)
    if last is None or not last.is_answer:
        return list(range(stop))
    first = next(index for index, part in enumerate(parts) if part.channel == "final")
    return [index for index in range(stop) if index >= first or parts[index].channel != "analysis"]


def _generations(parts: Sequence[_Part]) -> list[tuple[int, int]]:
    """start, stop of each stretch of messages that the model samples in one go."""
    found: list[tuple[int, int]] = []
    start = None
    for index, part in enumerate(parts):
        if part.role != "assistant":
            if start is not None:
                found.append((start, index))
            start = None
            continue
        start = index if start is None else start
        if part.ends_turn:
            found.append((start, index + 1))
            start = None
    return found if start is None else [*found, (start, len(parts))]


def message_weights(messages: Sequence[Message], train_on: TrainOn) -> list[float]:
    """The weight of each message's tokens if the model samples it: its own `train` first, then `train_on`."""
    first = 0
    if train_on.turns == "last":
        last = max((index for index, message in enumerate(messages) if message.role == "assistant"), default=0)
        asked = (index for index in range(last) if messages[index].role not in ("assistant", "tool"))
        first = max(asked, default=0)
    weights = []
    for index, message in enumerate(messages):
        wanted = message.train
        if wanted is None:
            wanted = index >= first and (message.channel is None or message.channel in train_on.channels)
        weights.append(message.weight if wanted else 0.0)
    return weights
