"""What may be sampled in an assistant's turn: Harmony's structure, and JSON where a schema asks for it.

```text
compiler = GrammarCompiler(vocab, num_rows)                       once for a model (seconds for o200k)
constraint = compiler.answer(schema, tools=..., tool_choice=...)  for a request; a schema is refused here
constraint.mask(), constraint.push(id)                            before and after every token; copy() for n samples
```
After the prompt's `<|start|>assistant`, a turn is any number of

    <|channel|>analysis<|message|> free text <|end|> <|start|>assistant
    <|channel|>commentary<|message|> free text <|end|> <|start|>assistant

and then one of

    <|channel|>final<|message|> free text, or JSON that matches the schema <|return|>
    <|channel|>commentary to=functions.NAME <|constrain|>json<|message|> JSON that matches its parameters <|call|>

The recipient may also stand before the channel, as openai-harmony writes it; ` <|constrain|>json` may be missing. The
headers are a finite set of id sequences, in the tokens that the renderer gives them; only JSON needs a library
(`json_text.py`). Free text is any text, without special tokens. Letters: V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ossia.engine.grammar.json_text import JsonCompiler, JsonText
from ossia.errors import UserError
from ossia.harmony.messages import Tool
from ossia.harmony.vocab import Vocabulary

ANY_OBJECT: Mapping[str, Any] = {"type": "object"}  # the schema of `response_format: {"type": "json_object"}`
NO_ARGUMENTS: Mapping[str, Any] = {"type": "object", "properties": {}, "additionalProperties": False}


@dataclass(slots=True, eq=False)
class _Header:
    """A place in a header, or between messages: the ids that can come next, and where they lead."""

    next: dict[int, _Header | _Content] = field(default_factory=dict)

    def add(self, ids: Sequence[int], to: _Header | _Content) -> None:
        """Allow `ids` from here on; after the last of them comes `to`."""
        node = self
        for number in ids[:-1]:
            follower = node.next.setdefault(number, _Header())
            assert isinstance(follower, _Header)
            node = follower
        node.next[ids[-1]] = to


@dataclass(slots=True, eq=False)
class _Content:
    """A message's content.

    ends  the ids that end it, and what comes after each; None: the turn is over
    text  (V,) bool, what free text allows, the ends too; or the beginning of the JSON that it has to be
    """

    ends: Mapping[int, _Header | None]
    text: Tensor | JsonText


class GrammarCompiler:
    """Makes constraints for one vocabulary. `num_rows` is V, the rows of the model's head.

    Raises  MissingExtraError if llguidance isn't installed
    """

    def __init__(self, vocab: Vocabulary, num_rows: int) -> None:
        self._json = JsonCompiler(vocab, num_rows)
        self._vocab, self._num_rows = vocab, num_rows
        text_V = torch.zeros(num_rows, dtype=torch.bool)
        text_V[: vocab.size] = True
        text_V[list(vocab.special.values())] = False
        self._message_V, self._answer_V = text_V.clone(), text_V
        self._message_V[vocab.special["<|end|>"]] = True
        self._answer_V[vocab.special["<|return|>"]] = True

    def answer(
        self,
        schema: Mapping[str, Any] | None = None,
        *,
        tools: Sequence[Tool] = (),
        tool_choice: str = "auto",
        parallel: bool = False,
    ) -> Constraint:
        """The constraint of one request, at the beginning of the turn.

        schema       what the final channel's content has to match; None: free text (ANY_OBJECT: any JSON object)
        tools        what may be called. Arguments match `parameters`; for a tool whose arguments aren't to be held to
                     them, pass ANY_OBJECT there
        tool_choice  "auto": an answer or a call; "none": no call; "required": a call, no answer; a tool's name: a call
                     of that one
        parallel     a call may also end in `<|end|>`, and then another has to follow: several calls in one turn
        Raises       UserError for a tool that isn't there, and for a schema that can't be enforced, with the keyword
        """
        called = self._callable(tools, tool_choice)
        final = None
        if tool_choice in ("auto", "none"):
            where = "response_format.json_schema.schema"
            text = self._answer_V if schema is None else self._json.compile(schema, where)
            final = _Content({self._vocab.special["<|return|>"]: None}, text)
        calls = {}
        for tool in called:
            parameters = NO_ARGUMENTS if tool.parameters is None else tool.parameters
            calls[tool.name] = self._json.compile(parameters, f"tools.{tool.name}.parameters")
        return Constraint(self._turn(final, calls, parallel), self._num_rows)

    def _callable(self, tools: Sequence[Tool], tool_choice: str) -> list[Tool]:
        """The tools that may be called."""
        if tool_choice in ("auto", "none"):
            return list(tools) if tool_choice == "auto" else []
        found = [tool for tool in tools if tool_choice in ("required", tool.name)]
        if not found:
            known = ", ".join(tool.name for tool in tools) or "none given"
            raise UserError(
                f"tool_choice: is {tool_choice!r}; allowed: auto, none, required, or a tool's name ({known})"
            )
        return found

    def _turn(self, final: _Content | None, calls: Mapping[str, JsonText], parallel: bool) -> _Header:
        """The beginning of a turn. `later` is where a turn of several calls goes on after one: without an answer."""
        first, later = _Header(), _Header()
        self._fill(first, final, calls, later if parallel else None)
        if parallel:
            self._fill(later, None, calls, later)
        return first

    def _fill(
        self, header: _Header, final: _Content | None, calls: Mapping[str, JsonText], later: _Header | None
    ) -> None:
        """Everything that can come after `<|start|>assistant`; after a message the same again, after a call `later`."""
        special, encode = self._vocab.special, self._vocab.encode
        channel, start = special["<|channel|>"], special["<|message|>"]
        thinking, commentary = encode("analysis"), encode("commentary")
        message = _Content({special["<|end|>"]: self._next_message(header)}, self._message_V)
        header.add([channel, *thinking, start], message)
        header.add([channel, *commentary, start], message)
        if final is not None:
            header.add([channel, *encode("final"), start], final)
        ends: dict[int, _Header | None] = {special["<|call|>"]: None}
        if later is not None:
            ends[special["<|end|>"]] = self._next_message(later)
        recipients = self._vocab.encode_batch([f" to=functions.{name}" for name in calls])
        kind = [*encode(" "), special["<|constrain|>"], *encode("json")]
        for recipient, json in zip(recipients, calls.values(), strict=True):
            content = _Content(ends, json)
            for content_type in (kind, []):
                header.add([*recipient, channel, *commentary, *content_type, start], content)
                header.add([channel, *commentary, *recipient, *content_type, start], content)

    def _next_message(self, header: _Header) -> _Header:
        """`<|start|>assistant`, then `header`."""
        begin = _Header()
        begin.add([self._vocab.special["<|start|>"], *self._vocab.encode("assistant")], header)
        return begin


class Constraint:
    """What may be sampled next in one turn. Copies are independent."""

    def __init__(self, place: _Header | _Content | None, num_rows: int, json: JsonText | None = None) -> None:
        self._place, self._num_rows, self._json = place, num_rows, json

    @property
    def finished(self) -> bool:
        """Whether the turn is over; nothing can be sampled then."""
        return self._place is None

    def mask(self) -> Tensor:
        """(V,) bool on the CPU, True for what may be sampled; at least one is. Shared: don't write into it.

        Raises  UserError if a schema turns out to be too complex to enforce; nothing but this request is concerned
        """
        place = self._place
        assert place is not None, "the turn is over"
        if isinstance(place, _Header):
            mask_V = torch.zeros(self._num_rows, dtype=torch.bool)
            mask_V[list(place.next)] = True
            return mask_V
        if isinstance(place.text, Tensor):
            return place.text
        assert self._json is not None
        mask_V, complete = self._json.mask()
        mask_V[list(place.ends)] = complete
        return mask_V

    def push(self, token: int) -> None:
        """A token was sampled; it has to be one that `mask` allows. Raises as `mask`."""
        place, allowed = self._place, True
        if isinstance(place, _Header):
            allowed = token in place.next
            self._enter(place.next.get(token))
        elif place is not None and token in place.ends:
            allowed = self._json is None or self._json.complete
            self._enter(place.ends[token])
        elif self._json is not None:
            self._json.push(token)
        else:
            allowed = place is not None and isinstance(place.text, Tensor) and bool(place.text[token])
        assert allowed, f"token {token} was not allowed"

    def copy(self) -> Constraint:
        """An independent one in the same state."""
        return Constraint(self._place, self._num_rows, None if self._json is None else self._json.copy())

    def _enter(self, place: _Header | _Content | None) -> None:
        self._place, self._json = place, None
        if isinstance(place, _Content) and isinstance(place.text, JsonText):
            self._json = place.text.copy()
