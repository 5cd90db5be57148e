"""Prompts into the cache: a packed batch of them, or of their next parts, layer by layer.

Through the decoder where it reads prompts, which on a small model is far faster, else through the training forward,
which can run wherever the model does.
Letters: T packed tokens, N tokens kept, P tokens of a prompt that are in the cache already, D hidden, L layers,
k experts a token, X key and value heads.
"""

from __future__ import annotations

import math
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ossia.engine.cache import Cache, Holding, Lane
from ossia.engine.decode import Decoder
from ossia.engine.head import NOT_FINITE, TopTokens, score_rows
from ossia.engine.request import PromptToken
from ossia.errors import UserError
from ossia.model.transformer import Attend, Context, Layer, Transformer
from ossia.ops.attention import Segments, prefix_attention, sink_attention
from ossia.ops.rope import rope_tables

_CALL_TOKENS = 512  # that a decoder reads at once: its activations stay in the second-level cache or near it


@dataclass(slots=True)
class Prompt:
    """Tokens on their way into the cache.

    adapter    which of the session's models reads it
    done       tokens that are in the cache
    hidden_D   what the last layer says after the last token, once all are done
    routes     of each part: the experts chosen, (tokens, L, k) int16; only where `wants_routes`
    """

    ids: tuple[int, ...]
    adapter: int
    holding: Holding
    wants_routes: bool
    done: int = 0
    hidden_D: Tensor | None = None
    routes: list[np.ndarray] = field(default_factory=list)

    @property
    def num_left(self) -> int:
        return len(self.ids) - self.done


class Prefill:
    """Reads prompts with any of several models that share their weights."""

    def __init__(self, models: Sequence[Transformer], cache: Cache, decoder: Decoder) -> None:
        self._models, self._cache, self._decoder = models, cache, decoder
        self._layers: list[list[Layer]] = []
        self.refresh()

    def refresh(self) -> None:
        """Weights or adapters have changed: take nothing from before."""
        self._layers = [[] for _ in self._models]  # kept where experts are in memory anyway
        table = "model.embed_tokens.weight"
        base = self._models[0]
        self._table_VD = base.trainable.tensors[table] if table in base.trainable else base.weights.raw(table)

    def embed(self, ids_T: Tensor) -> Tensor:
        """Rows of the embedding, looked up where it lies. Returns (T, D)."""
        rows_TD = F.embedding(ids_T.to(self._table_VD.device), self._table_VD)
        return rows_TD.to(device=self._models[0].device, dtype=self._models[0].residual_dtype)

    def run(self, parts: Sequence[tuple[Prompt, int]]) -> None:
        """Take each prompt's next so many tokens into the cache, which has room for them."""
        if self._decoder.reads_prompts:
            for call in _calls(parts):
                self._read(call)
            return
        for adapter in dict.fromkeys(prompt.adapter for prompt, _ in parts):
            self._run(self._models[adapter], [part for part in parts if part[0].adapter == adapter])

    def _read(self, parts: Sequence[tuple[Prompt, int]]) -> None:
        ids = [number for prompt, count in parts for number in prompt.ids[prompt.done : prompt.done + count]]
        arch, routes_LTk = self._models[0].arch, None
        if any(prompt.wants_routes for prompt, _ in parts):
            routes_LTk = torch.full((arch.num_layers, len(ids), arch.experts_per_token), -1, dtype=torch.int16)
        hidden_SD, start = self._decoder.read(self.embed(torch.tensor(ids)), parts, routes_LTk), 0
        for (prompt, count), hidden_D in zip(parts, hidden_SD, strict=True):
            prompt.done += count
            prompt.hidden_D = None if prompt.num_left else hidden_D
            if routes_LTk is not None and prompt.wants_routes:
                prompt.routes.append(routes_LTk[:, start : start + count].transpose(0, 1).numpy())
            start += count

    def _run(self, model: Transformer, parts: list[tuple[Prompt, int]]) -> None:
        counts = [count for _, count in parts]
        ids = [number for prompt, count in parts for number in prompt.ids[prompt.done : prompt.done + count]]
        segments = Segments(torch.tensor([0, *counts]).cumsum(0), model.device)
        before_T = torch.tensor([prompt.done for prompt, _ in parts]).repeat_interleave(torch.tensor(counts))
        positions_T = segments.positions_T + before_T.to(model.device)
        context = Context(segments, *rope_tables(model.yarn, positions_T, model.dtype))
        ends = segments.starts[1:] - 1
        writer = {lane: _Writer(lane, parts, model.device) for lane in self._cache.lanes}
        wants_routes = any(prompt.wants_routes for prompt, _ in parts)
        a = model.arch
        routes_TLk = np.full((len(ids), a.num_layers, a.experts_per_token), -1, np.int16) if wants_routes else None
        x_TD = self.embed(torch.tensor(ids))
        for index, lane in enumerate(self._cache.of_layer):
            rows = ends.to(model.device) if index == a.num_layers - 1 else None

            def note(experts_Tk: Tensor, index: int = index, rows: Tensor | None = rows) -> None:
                if routes_TLk is not None:
                    routes_TLk[slice(None) if rows is None else rows.cpu().numpy(), index] = experts_Tk.cpu().numpy()

            attend = writer[lane].attention(index, context, model)
            layer = self._fetch(parts[0][0].adapter, index, len(ids))
            x_TD = model.layer_forward(layer, x_TD, context, rows=rows, attend=attend, note_experts=note)
        for (prompt, count), hidden_D, (start, end) in zip(
            parts, x_TD, pairwise(segments.starts.tolist()), strict=True
        ):
            prompt.done += count
            prompt.hidden_D = None if prompt.num_left else hidden_D
            if routes_TLk is not None and prompt.wants_routes:
                prompt.routes.append(routes_TLk[start:end])

    def _fetch(self, adapter: int, index: int, num_tokens: int) -> Layer:
        layers, model = self._layers[adapter], self._models[adapter]
        if index < len(layers):
            return layers[index]
        layer = model.fetch(index, experts_at_once=model.experts_at_once(num_tokens))
        if model.keeps_experts:
            layers.append(layer)
        return layer


Scored = list[PromptToken]
"""A prompt's tokens with their logprobs."""


@dataclass(frozen=True, slots=True)
class _Packed:
    ids: Tensor
    starts: Tensor
    unfold: Tensor | None = None


def score_prompts(
    model: Transformer, prompts: Sequence[Sequence[int]], top: int
) -> Generator[None, None, list[Scored]]:
    """Every token's logprob given those before it, and the `top` likeliest in its place; all prompts as one pack.

    Yields   after each layer and each piece of the head's rows, so that something else can be done between
    Returns  what was found
    Raises   UserError if the model's output isn't finite
    """
    lengths = torch.tensor([0, *map(len, prompts)])
    ids_T = torch.tensor([number for prompt in prompts for number in prompt])
    pack = _Packed(ids_T.to(model.device), lengths.cumsum(0))
    context, x_TD = model.context(pack), model.embed(pack.ids)
    for index in range(model.arch.num_layers):
        x_TD = model.layer_forward(model.fetch(index), x_TD, context)
        yield
    ends = lengths.cumsum(0)[1:] - 1
    before = torch.ones(len(ids_T), dtype=torch.bool).index_fill_(0, ends, False).nonzero()[:, 0]
    h_ND, targets_N = model.final_norm(x_TD)[before.to(model.device)], ids_T[before + 1].to(model.device)
    lps, tops = list[float](), list[TopTokens]()
    for some_lps, some_tops in score_rows(h_ND, model.head(), targets_N, top):
        lps += some_lps
        tops += some_tops
        yield
    if not all(map(math.isfinite, lps)):
        raise UserError(NOT_FINITE)
    found, others = [], zip(lps, tops, strict=True)
    for prompt in prompts:
        rest = [PromptToken(number, *next(others)) for number in prompt[1:]]
        found.append([PromptToken(prompt[0], None), *rest])
    return found


def _calls(parts: Sequence[tuple[Prompt, int]]) -> Iterator[list[tuple[Prompt, int]]]:
    """Parts of a decoder's size, in the order of the prompts, one of each in a call.

    A long prompt is cut at multiples of that size, so where it is cut doesn't depend on its mates: 8 bits show it.
    """
    call: list[tuple[Prompt, int]] = []
    room = _CALL_TOKENS
    for prompt, count in parts:
        at, last = prompt.done, prompt.done + count
        for end in (*range(at + _CALL_TOKENS - at % _CALL_TOKENS, last, _CALL_TOKENS), last):
            if end - at > room or (call and call[-1][0] is prompt):
                yield call
                call, room = [], _CALL_TOKENS
            call.append((prompt, end - at))
            room -= end - at
            at = end
    if call:
        yield call


class _Writer:
    """Where the tokens of a packed batch go in one lane, and which came before them."""

    def __init__(self, lane: Lane, parts: Sequence[tuple[Prompt, int]], device: torch.device) -> None:
        self._lane = lane
        which = lane.index
        sources, slots, start = [], [], 0
        self._before: list[Tensor] = []
        for prompt, count in parts:
            blocks, end = prompt.holding[which], prompt.done + count
            kept = count if lane.window is None else min(count, lane.window)
            sources.append(torch.arange(start + count - kept, start + count))
            slots.append(lane.slots(blocks, torch.arange(end - kept, end)))
            num_before = prompt.done if lane.window is None else min(prompt.done, lane.window - 1)
            self._before.append(lane.slots(blocks, torch.arange(prompt.done - num_before, prompt.done)).to(device))
            start += count
        self._source_N, self._slot_N = torch.cat(sources).to(device), torch.cat(slots).to(device)

    def attention(self, index: int, context: Context, model: Transformer) -> Attend:
        """Attention of layer `index` over the batch and what came before, which puts its keys and values away."""
        scale = model.arch.head_dim**-0.5

        def attend(q: Tensor, k: Tensor, v: Tensor, sinks_H: Tensor, window: int | None) -> Tensor:
            # read before the ring is written: a part that is longer than the window overwrites what it has to see
            before = [self._lane.at(index, slot_P).chunk(2, dim=1) for slot_P in self._before]
            self._lane.write(index, self._slot_N, torch.cat((k, v), dim=1).index_select(0, self._source_N))
            if not any(len(slot_P) for slot_P in self._before):
                return sink_attention(
                    q, k, v, sinks_H, context.segments, window=window, scale=scale, backend=model.backend
                )
            outs = []
            for (k_P, v_P), (start, end) in zip(before, pairwise(context.segments.starts.tolist()), strict=True):
                keys, values = torch.cat((k_P, k[start:end])), torch.cat((v_P, v[start:end]))
                outs.append(
                    prefix_attention(
                        q[start:end], keys, values, sinks_H, window=window, scale=scale, backend=model.backend
                    )
                )
            return torch.cat(outs)

        return attend
