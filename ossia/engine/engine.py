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
from itertools import pairwise
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ossia.engine.cache import Lane
from ossia.engine.decode import DecodeLayer, StepContext, keeps_experts, rotary_rows, step_norm
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
    return frozenset(
        vocab.special[name] for name in ("<|return|>", "<|call|>", "<|endoftext|>") if name in vocab.special
    )


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
            raise UserError(
                f"request {index}: the model has no token {wrong[0]}; its ids are 0 to {arch.vocab_size - 1}"
            )


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

    @torch.inference_mode()
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
        table = "model.embed_tokens.weight"
        trained = table in self._model.trainable
        self._embedding_VD = self._model.trainable.tensors[table] if trained else self._model.weights.raw(table)
        self._final_norm_D, self._head = self._model.tensor("model.norm.weight"), self._model.head()
        self._tables = (torch.empty(0), torch.empty(0))
        self._ids_B = self._position_B = torch.empty(0, dtype=torch.int64)
        self._row_sampler = BatchSampler([], [], self._model.device)

    @property
    def finished(self) -> bool:
        return not self._waiting and not self._rows

    @torch.inference_mode()
    def step(self) -> list[Token]:
        """Prefill of the requests that can join, or one decode step of all that run."""
        first = len(self._rows)
        self._rows += self._joining()
        if len(self._rows) == first:
            return self._decode()
        self._changed = True
        return self._emit(self._prefill(first), first, self._sampler(first))

    def _joining(self) -> list[_Row]:
        """Rows for the waiting requests that there is room for now."""
        num_free = self._engine.max_batch - len(self._rows)
        if not self._waiting or (self._rows and num_free < max(1, self._engine.max_batch // _JOIN_SHARE)):
            return []
        joining: list[_Row] = []
        longest = max((row.length + row.limit - row.sampled for row in self._rows), default=0)
        while self._waiting and len(joining) < num_free:
            request = self._requests[self._waiting[0]]
            limit = min(request.max_tokens, self._model.arch.max_positions - len(request.ids))
            longest = max(longest, len(request.ids) + limit)
            num_rows = len(self._rows) + len(joining) + 1
            if num_rows > 1 and self._cache_bytes(num_rows, longest) > self._engine.cache_bytes:
                break
            generator = request.sampling.generator()
            joining.append(_Row(self._waiting.popleft(), len(request.ids), limit, 0, 0, generator))
        return joining

    def _cache_bytes(self, num_rows: int, length: int) -> int:
        arch = self._model.arch
        tokens = sum(length if lane.window is None else lane.window for lane in self._lane_of)
        return num_rows * tokens * 2 * arch.num_kv_heads * arch.head_dim * self._model.dtype.itemsize

    def _prefill(self, first: int) -> Tensor:
        """The prompts of the rows from `first` on, into the cache; the last hidden state of each row, (B, D)."""
        model = self._model
        for row, state in enumerate(self._rows[first:], start=first):
            for lane in self._lanes.values():
                lane.make_room(len(self._rows), state.length + 1)
                lane.see(row, state.length)
        packs = self._packs(first)
        contexts = [model.context(pack) for pack in packs]
        xs = [self._embed(pack.ids) for pack in packs]
        places = [{lane: self._kept(pack, lane) for lane in self._lanes.values()} for pack in packs]
        for index in range(model.arch.num_layers):
            layer, lane = self._fetch(index), self._lane_of[index]
            for p, pack in enumerate(packs):
                attend = self._attend_and_keep(index, contexts[p], *places[p][lane])
                ends = pack.starts[1:] - 1 if index == model.arch.num_layers - 1 else None
                xs[p] = model.layer_forward(layer, xs[p], contexts[p], rows=ends, attend=attend)
        x_BD = xs[0].new_empty(len(self._rows) - first, xs[0].shape[-1])
        for pack, x in zip(packs, xs, strict=True):
            for prompt, rows in enumerate(pack.copies):
                x_BD[[row - first for row in rows]] = x[prompt]
        return x_BD

    def _embed(self, ids_T: Tensor) -> Tensor:
        """Rows of the embedding, looked up where it lies. Returns (T, D)."""
        rows_TD = F.embedding(ids_T.to(self._embedding_VD.device), self._embedding_VD)
        return rows_TD.to(device=self._model.device, dtype=self._model.dtype)

    def _fetch(self, index: int) -> Layer:
        """A layer for a prefill; the first time it is arranged for decoding too."""
        if index < len(self._fetched):
            return self._fetched[index]
        layer = self._model.fetch(index)
        if index == len(self._layers):
            self._layers.append(DecodeLayer(self._model, layer, self._lane_of[index]))
        if keeps_experts(self._model):
            self._fetched.append(layer)
        return layer

    def _packs(self, first: int) -> list[_Prompts]:
        """The prompts of the rows from `first` on, equal ones once, in packs of about _PREFILL_TOKENS."""
        rows_of: dict[tuple[int, ...], list[int]] = {}
        for row, state in enumerate(self._rows[first:], start=first):
            rows_of.setdefault(tuple(self._requests[state.request].ids), []).append(row)
        groups: list[list[tuple[int, ...]]] = []
        room = 0
        for prompt in rows_of:
            if len(prompt) > room:
                groups.append([])
                room = _PREFILL_TOKENS
            groups[-1].append(prompt)
            room -= len(prompt)
        device = self._model.device
        return [
            _Prompts(
                torch.tensor([number for prompt in group for number in prompt], device=device),
                torch.tensor([0, *map(len, group)], device=device).cumsum(0),
                [rows_of[prompt] for prompt in group],
            )
            for group in groups
        ]

    def _kept(self, pack: _Prompts, lane: Lane) -> tuple[Tensor, Tensor]:
        """Which tokens of a pack a lane keeps, and the slots they go to: (N,) int64 each."""
        device = self._model.device
        sources, slots = [], []

        for (start, end), rows in zip(pairwise(pack.starts.tolist()), pack.copies, strict=True):
            kept = end - start if lane.window is None else min(end - start, lane.window)
            position_N = torch.arange(end - start - kept, end - start, device=device)
            for row in rows:
                sources.append(start + position_N)
                slots.append(lane.slots(row, position_N))
        return torch.cat(sources), torch.cat(slots)

    def _attend_and_keep(self, index: int, context: Context, source_N: Tensor, slot_N: Tensor) -> Attend:
        """Attention over the packed prompts themselves, which puts their keys and values into the cache."""
        lane, backend = self._lane_of[index], self._model.backend
        scale = self._model.arch.head_dim**-0.5

        def attend(q: Tensor, k: Tensor, v: Tensor, sinks_H: Tensor, window: int | None) -> Tensor:
            lane.write(index, slot_N, torch.cat((k, v), dim=1).index_select(0, source_N))
            return sink_attention(q, k, v, sinks_H, context.segments, window=window, scale=scale, backend=backend)

        return attend

    def _decode(self) -> list[Token]:
        """One token more for every row."""
        model, num_rows = self._model, len(self._rows)
        if self._changed:
            self._ids_B = torch.tensor([row.last for row in self._rows], device=model.device)
            self._position_B = torch.tensor([row.length for row in self._rows], device=model.device)
            self._row_sampler, self._changed = self._sampler(0), False
        for row in self._rows:
            row.length += 1
        lengths = [row.length for row in self._rows]
        longest, shortest = max(lengths), min(lengths)
        lanes = self._lanes.values()
        for lane in lanes:
            lane.make_room(num_rows, longest)
        cos_T1d, sin_T1d = self._rotary(longest)
        step = StepContext(
            cos_T1d.index_select(0, self._position_B),
            sin_T1d.index_select(0, self._position_B),
            longest,
            {lane: lane.step_slots(self._position_B) for lane in lanes},
            {lane: lane.mask(num_rows, longest, shortest) for lane in lanes},
        )
        x_BD = self._embed(self._ids_B)
        for layer in self._layers:
            x_BD = layer.forward(x_BD, step)
        self._position_B += 1
        return self._emit(x_BD, 0, self._row_sampler)

    def _rotary(self, length: int) -> tuple[Tensor, Tensor]:
        """Rotary tables of at least `length` positions."""
        size = len(self._tables[0])
        if size < length:
            positions_T = torch.arange(max(length, 2 * size, _FIRST_POSITIONS), device=self._model.device)
            self._tables = rotary_rows(*rope_tables(self._model.yarn, positions_T, self._model.dtype))
        return self._tables

    def _sampler(self, first: int) -> BatchSampler:
        rows = self._rows[first:]
        samplings = [self._requests[row.request].sampling for row in rows]
        return BatchSampler(samplings, [row.generator for row in rows], self._model.device)

    def _emit(self, x_BD: Tensor, first: int, sampler: BatchSampler) -> list[Token]:
        """Sample a token for each row from `first` on, and let go of those that are finished."""
        h_BD = step_norm(x_BD, self._final_norm_D, self._model.arch.rms_eps)
        logits_BV = linear(h_BD, self._head).float()
        self._ids_B = sampler.draw(logits_BV)
        logprobs = _logprobs(h_BD, self._head, logits_BV, self._ids_B).tolist()
        if not all(map(math.isfinite, logprobs)):
            raise UserError(
                "the model's output is not finite, so there is nothing to sample\n"
                "  next: check the checkpoint and the adapter, or try another dtype"
            )
        tokens = []
        for row, number, logprob in zip(self._rows[first:], self._ids_B.tolist(), logprobs, strict=True):
            row.last, row.sampled = number, row.sampled + 1
            finish: Finish | None = "length" if row.sampled == row.limit else None
            if number in self._requests[row.request].stops:
                finish = "stop"
            tokens.append(Token(row.request, number, logprob, finish))
        for place in range(len(tokens) - 1, -1, -1):
            if tokens[place].finish is not None:
                self._remove(first + place)
        return tokens

    def _remove(self, row: int) -> None:
        """Give a row up; the last one takes its place."""
        last = self._rows.pop()
        if row < len(self._rows):
            self._rows[row] = last
            for lane in self._lanes.values():
                lane.move(len(self._rows), row)
        self._changed = True


def _logprobs(h_BD: Tensor, head: Linear, logits_BV: Tensor, ids_B: Tensor) -> Tensor:
    """ln p of each token, (B,) float32; its own logit anew in float32 as in `ops.loss`, not rounded to h's dtype."""
    logit_B = (h_BD.float() * head.weight[ids_B].float()).sum(-1)
    if head.lora_a is not None and head.lora_b is not None:
        logit_B += (linear(h_BD, Linear(head.lora_a)).float() * head.lora_b[ids_B].float()).sum(-1)
    return logit_B - logits_BV.logsumexp(-1)
