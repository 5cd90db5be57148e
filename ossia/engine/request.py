"""What is asked of the engine, and what it answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple, Protocol

import numpy as np
from torch import Tensor

from ossia.engine.sampler import Sampling
from ossia.harmony.vocab import Vocabulary

Finish = Literal["stop", "length", "error"]


def harmony_stops(vocab: Vocabulary) -> frozenset[int]:
    """The ids that end a Harmony generation: an answer, a call, or the end of all text."""
    return frozenset(
        vocab.special[name] for name in ("<|return|>", "<|call|>", "<|endoftext|>") if name in vocab.special
    )


class Constraint(Protocol):
    """What may be sampled next, as a grammar says; see `engine/grammar/`. Where it can't go on it raises UserError."""

    def mask(self) -> Tensor | None:
        """The tokens that are allowed now, (V,) bool with at least one; None: all."""

    def push(self, token: int) -> None:
        """This token was sampled."""

    def copy(self) -> Constraint:
        """An independent one in the same state."""


@dataclass(frozen=True, slots=True)
class Request:
    """A prompt, and what may be sampled after it.

    ids           the prompt, at least one token
    max_tokens    tokens sampled at most; the model's last position ends a request too
    stops         ids after which the request is finished; the stop itself is part of the completion
    stop_texts    texts that finish it as soon as one stands in what was sampled, wherever tokens begin and end
    adapter       one of the engine's, by name; None: the model as it is, with its own adapter where it has one
    top_logprobs  how many of the likeliest tokens to report beside each sampled one
    routes        whether to record the experts that were chosen
    constraint    copied when the request starts
    """

    ids: Sequence[int]
    sampling: Sampling = field(default_factory=Sampling)
    max_tokens: int = 1024
    stops: frozenset[int] = frozenset()
    stop_texts: tuple[str, ...] = ()
    adapter: str | None = None
    top_logprobs: int = 0
    routes: bool = False
    constraint: Constraint | None = None


class Token(NamedTuple):
    """A sampled token of a request.

    request  its number: its place in the list given to `Engine.stream`, or what `Session.add` returned
    logprob  natural log of its probability under the model itself (temperature 1, nothing added or left out), float32:
             what training computes for it
    finish   "stop", "length" or "error" with a request's last token, else None
    top      (id, logprob) of the likeliest tokens, where asked for
    routes   with the last token, where asked for: see Completion
    error    why the request can't go on (its constraint can't, or the model's output isn't finite); the token that
             comes with it is not of the answer
    """

    request: int
    id: int
    logprob: float
    finish: Finish | None
    top: tuple[tuple[int, float], ...] = ()
    routes: np.ndarray | None = None
    error: str | None = None


class PromptToken(NamedTuple):
    """A token of a prompt that was scored; `logprob` and `top` as in Token, None and empty for the first one."""

    id: int
    logprob: float | None
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True)
class Completion:
    """What was sampled for a request, the stop included; `logprobs`, `finish` and `top` as in Token.

    routes  (prompt and sampled tokens but the last, layers, k) int16: the experts chosen at each position, in the order
            of their logits; -1 in the last layer where nothing needed them, before the prompt's last token
    """

    ids: list[int]
    logprobs: list[float]
    finish: Finish
    top: list[tuple[tuple[int, float], ...]] = field(default_factory=list)
    routes: np.ndarray | None = None
