"""Generation for many requests at once over a cache of keys and values.

```text
waiting requests --prefill: their prompts as one packed batch, layer by layer--> first tokens
running requests --decode: one token each, lengths of their own----------------> next tokens, until a stop or max_tokens
```
Nothing is padded. Requests join when rows of the batch are free and leave when they finish; what a request gets doesn't
depend on who else is there. Weights are the trainer's own object, and adapters are read when a stream begins: after an
optimizer step the next stream samples from the new policy.
Letters: B sequences, D hidden, V vocabulary, T packed tokens, N tokens kept, H query heads, K key-value heads.
"""

from __future__ import annotations

import math
import random
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ossia.engine.cache import Lane
from ossia.engine.decode import DecodeLayer, StepContext, keeps_experts, rotary_rows
from ossia.engine.sampler import BatchSampler, Sampling
from ossia.errors import UserError
from ossia.harmony.vocab import Vocabulary
from ossia.model.open import machine_memory
from ossia.model.transformer import Attend, Context, Layer, Transformer
from ossia.ops.attention import sink_attention
from ossia.ops.linear import Linear, linear
from ossia.ops.rope import rope_tables

Finish = Literal["stop", "length"]
_PREFILL_TOKENS = 8192  # of a packed batch of prompts; a longer prompt is one of its own
_FIRST_POSITIONS = 1024  # of the rotary tables, which double when a sequence outgrows them
_JOIN_SHARE = 4  # waiting requests join when a quarter of the batch is free, so that prefills are few


def harmony_stops(vocab: Vocabulary) -> frozenset[int]:
    """The ids that end a Harmony generation: an answer, a call, or the end of all text."""
    return frozenset(vocab.special[name] for name in ("<|return|>", "<|call|>", "<|endoftext|>") if name in vocab.special)


@dataclass(frozen=True, slots=True)
class Request:
    """A prompt, and what may be sampled after it.

    ids         the prompt, at least one token
    max_tokens  tokens sampled at most; the model's last position ends a request too
    stops       ids after which the request is finished; the stop itself is part of the completion
    """

    ids: Sequence[int]
    sampling: Sampling = field(default_factory=Sampling)
    max_tokens: int = 1024
    stops: frozenset[int] = frozenset()


class Token(NamedTuple):
    """A sampled token of requests[request].

    logprob  natural log of its probability under the model itself (temperature 1, nothing left out), float32: what
             training computes for it
    finish   "stop" or "length" with a request's last token, else None
    """

    request: int
    id: int
    logprob: float
    finish: Finish | None


@dataclass(frozen=True, slots=True)
class Completion:
    """What was sampled for a request, the stop included; `logprobs` and `finish` as in Token."""

    ids: list[int]
    logprobs: list[float]
    finish: Finish


class Engine:
    """Generates from a model.

    max_batch    sequences at once, at most
    cache_bytes  bytes that the cache of a batch may grow to; None: a quarter of the memory (of a CUDA device: half of
                 what is free). Fewer sequences run at once where they would need more; a single one always runs.
    """

    def __init__(self, model: Transformer, *, max_batch: int = 64, cache_bytes: int | None = None) -> None:
        assert max_batch >= 1, max_batch
        self.model, self.max_batch = model, max_batch
        if cache_bytes is None and model.device.type == "cuda":
            cache_bytes = torch.cuda.mem_get_info(model.device)[0] // 2
        self.cache_bytes = machine_memory()[0] // 4 if cache_bytes is None else cache_bytes

    def generate(self, requests: Sequence[Request]) -> list[Completion]:
        """A completion of every request, in their order. Raises as `stream`."""
        ids: list[list[int]] = [[] for _ in requests]
        logprobs: list[list[float]] = [[] for _ in requests]
        finishes: dict[int, Finish] = {}
        for token in self.stream(requests):
            ids[token.request].append(token.id)
            logprobs[token.request].append(token.logprob)
            if token.finish is not None:
                finishes[token.request] = token.finish
        return [Completion(ids[i], logprobs[i], finishes[i]) for i in range(len(requests))]

    def stream(self, requests: Sequence[Request]) -> Iterator[Token]:
        """The tokens of all requests as they are sampled.

        Raises  UserError for a prompt that is empty, too long for the model, or holds an id it doesn't have;
                UserError if the model's output isn't finite
        """
        for index, request in enumerate(requests):
            self._check(request, index)
        stream = _Stream(self, requests)
        while not stream.finished:
            yield from stream.step()

    def _check(self, request: Request, index: int) -> None:
        arch = self.model.arch
        if not request.ids:
            raise UserError(f"request {index}: an empty prompt; it needs at least one token")
        if request.max_tokens < 1:
            raise UserError(f"request {index}: max_tokens is {request.max_tokens}; allowed: 1 or more")
        if len(request.ids) >= arch.max_positions:
            raise UserError(
                f"request {index}: a prompt of {len(request.ids):,} tokens; this model has {arch.max_positions:,} "
                "positions, the answer's included"
            )
        wrong = [number for number in request.ids if not 0 <= number < arch.vocab_size]
        if wrong:
            raise UserError(f"request {index}: the model has no token {wrong[0]}; its ids are 0 to {arch.vocab_size - 1}")


@dataclass(slots=True)
class _Row:
    """A running request; its sequence's keys and values are in the cache's row of the same number."""

    request: int
    length: int  # tokens in the cache
    limit: int  # tokens to sample at most
    sampled: int
    last: int  # the token to go in next
    generator: random.Random


@dataclass(frozen=True, slots=True)
class _Prompts:
    """Distinct prompts as one pack, and where their keys and values go.

    ids, starts  as in a training pack
    copies       the rows of the batch that each prompt is for
    """

    ids: Tensor
    starts: Tensor
    copies: list[list[int]]


class _Stream:
    """The state of one `Engine.stream`."""

    def __init__(self, engine: Engine, requests: Sequence[Request]) -> None:
        self._engine, self._model, self._requests = engine, engine.model, requests
        self._waiting = deque(range(len(requests)))
        self._rows: list[_Row] = []
        self._changed = True  # rows came or went since the last decode step
        arch = self._model.arch
        windows = [arch.sliding_window if kind == "sliding_attention" else None for kind in arch.layer_types]
        self._lanes = {
            window: Lane(
                arch, [i for i, w in enumerate(windows) if w == window], window, self._model.dtype, self._model.device
            )
            for window in dict.fromkeys(windows)
        }
        self._lane_of = [self._lanes[window] for window in windows]
        self._fetched: list[Layer] = []  # kept where experts are in memory anyway
        self._layers: list[DecodeLayer] = []
        self._tables = (torch.empty(0), torch.empty(0))

    @property
    def finished(self) -> bool:
        return not self._waiting and not self._rows

    @torch.inference_mode()
    def step(self) -> list[Token]:
        """Prefill of the requests that can join, or one decode step of all that run."""
        if not self._layers:
            self._prepare()
        joining = self._admit()
        if not joining:
            return self._decode()
        first = len(self._rows)
        self._rows += joining
        self._changed = True
        return self._emit(self._prefill(first), first, self._sampler(first))

    def _prepare(self) -> None:
        """What a stream reads of the weights once: layers (without experts, where those are packed), ends, head."""
        model = self._model
        self._embedding_VD = model.tensor("model.embed_tokens.weight") if self._trains_ends() else None
        self._final_norm_D = model.tensor("model.norm.weight")
        self._head = model.head()
        for index in range(model.arch.num_layers):
            layer = model.fetch(index)
            self._layers.append(DecodeLayer(model, layer, self._lane_of[index]))
            if keeps_experts(model):
                self._fetched.append(layer)
