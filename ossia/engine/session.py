"""The batch that runs: who waits, who joins, who leaves, and one token for each at every step.

```text
add -> waiting -> its prompt in the cache (equal prompts once, long ones in parts) -> a row of the batch -> finished
                        ^------------------ pause, or no room left: what it has is read again -----|
```
Letters: B sequences, D hidden, V vocabulary, L layers, k experts a token.
"""

from __future__ import annotations

import random
from collections import Counter, deque
from collections.abc import Collection, Generator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import islice

import numpy as np
import torch
from torch import Tensor

from ossia.engine.cache import Cache, Holding
from ossia.engine.decode import Decoder
from ossia.engine.head import Heads, Rules
from ossia.engine.prefill import Prefill, Prompt, Scored, score_prompts
from ossia.engine.request import Constraint, Finish, Request, Token
from ossia.errors import UserError
from ossia.harmony.vocab import Vocabulary
from ossia.model.lora import Lora
from ossia.model.transformer import Transformer

_JOIN_SHARE = 4  # waiting requests join when a quarter of the batch is free, so that prefills are few

_Key = tuple[int, tuple[int, ...], bool]
"""What requests share a prompt by: adapter, ids, and whether its routes are recorded."""


@dataclass(slots=True)
class _Sequence:
    """A request on its way.

    limit   tokens to sample at most
    ids     sampled so far
    room    how long it may get with the blocks it has
    tail    the last bytes of what was sampled, in which a stop text may end
    routes  the experts chosen at each position so far: (positions, L, k) each
    stops, is_watched  the request's stops; and whether more than its last id decides if it goes on
    """

    number: int
    request: Request
    adapter: int
    limit: int
    generator: random.Random
    constraint: Constraint | None
    ids: list[int] = field(default_factory=list)
    tail: bytes = b""
    holding: Holding = field(default_factory=list)
    room: float = 0.0
    routes: list[np.ndarray] = field(default_factory=list)
    key: _Key = (0, (), False)
    stops: Collection[int] = ()
    is_watched: bool = False

    def __post_init__(self) -> None:
        self.stops = self.request.stops
        self.is_watched = bool(self.request.stop_texts) or self.constraint is not None

    @property
    def length(self) -> int:
        """Tokens in the cache while it runs: all but the last sampled one."""
        return len(self.request.ids) + len(self.ids) - 1


class Session:
    """Requests that join and leave a running batch. Not safe for threads: one owns it.

    num_running, num_waiting  requests with and without a row
    """

    @torch.inference_mode()
    def __init__(
        self,
        model: Transformer,
        cache: Cache,
        decoder: Decoder,
        adapters: Mapping[str, Lora | None],
        *,
        vocab: Vocabulary | None,
        max_batch: int,
        prefill_tokens: int,
    ) -> None:
        self.cache, self._model, self._decoder, self._vocab = cache, model, decoder, vocab
        self._max_batch, self._prefill_tokens = max_batch, prefill_tokens
        others = [model.with_adapter(lora) for lora in adapters.values()]
        self._models = [model, *others]
        self._adapter_of: dict[str | None, int] = {None: 0, **{name: i for i, name in enumerate(adapters, start=1)}}
        self._replaced: dict[int, str] = {}  # places of adapters that only older requests use
        self._free: list[int] = []  # places that nothing uses
        self._prefill = Prefill(self._models, cache, decoder)
        self._trained = _tensors(self._models)
        self._next = 0
        self._waiting: deque[_Sequence] = deque()
        self._paused: dict[int, _Sequence] = {}
        self._prompts: dict[_Key, Prompt] = {}
        self._rows: list[_Sequence] = []
        self._changed = True  # rows came or went since the last decode step
        self._num_slots = 0.0  # that every row has beyond the next one
        self._row_rules = Rules([], [], [], [], model.device)
        self._heads = Heads(self._models, decoder)
        self._versions = [tensor._version for tensor in self._trained]

    @property
    def idle(self) -> bool:
        """Nothing is left to do; paused requests wait for `resume`."""
        return not self._waiting and not self._rows

    @property
    def num_running(self) -> int:
        return len(self._rows)

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    def add(self, request: Request) -> int:
        """Take a request; its number, counted from 0.

        Raises  UserError if it can never be answered
        """
        self._check(request)
        number, self._next = self._next, self._next + 1
        sequence = _Sequence(
            number,
            request,
            self._adapter_of[request.adapter],
            min(request.max_tokens, self._model.arch.max_positions - len(request.ids)),
            request.sampling.generator(),
            None if request.constraint is None else request.constraint.copy(),
        )
        sequence.key = (sequence.adapter, tuple(request.ids), request.routes)
        self._waiting.append(sequence)
        return number

    @torch.inference_mode()
    def cancel(self, number: int) -> None:
        """Drop a request: no token of it comes any more, and its blocks are free. Of a finished one: nothing."""
        self._paused.pop(number, None)
        self._take_out(number)
        if self._replaced:
            self._let_go()

    @torch.inference_mode()
    def pause(self, number: int) -> None:
        """Stop a request for a while; its blocks are free, and `resume` reads its tokens again. Finished: nothing."""
        sequence = self._take_out(number)
        if sequence is not None:
            self._paused[number] = sequence

    def resume(self, number: int) -> None:
        """Let a paused request go on, before all that wait. Anything else: nothing."""
        sequence = self._paused.pop(number, None)
        if sequence is not None:
            self._waiting.appendleft(sequence)

    @torch.inference_mode()
    def replace(self, name: str, lora: Lora | None) -> None:
        """From the next request on, `name` is this adapter. Requests that are here keep the one they were added with,
        to their end; it is let go when the last of them is done.

        Raises  UserError for a name that isn't there
        """
        if name not in self._adapter_of:
            raise UserError(f"no adapter {name!r} here to replace; there are: {self._names()}")
        model = self._model.with_adapter(lora)
        if self._free:
            place = self._free.pop()
            self._models[place] = model
        else:
            place = len(self._models)
            self._models.append(model)
        self._replaced[self._adapter_of[name]] = name
        self._adapter_of[name] = place
        self._arrange()
        self._let_go()

    def is_replacing(self, name: str) -> bool:
        """Whether requests are here that still use what `name` was before."""
        return name in self._replaced.values()

    def _arrange(self) -> None:
        """The adapters are others: let all that reads them know. No place that a request uses has changed."""
        self._trained = _tensors(self._models)
        self._versions = [tensor._version for tensor in self._trained]
        self._decoder.use([model.lora for model in self._models])
        self._prefill.refresh()
        self._heads.refresh()

    def _let_go(self) -> None:
        """Forget replaced adapters that no request uses any more."""
        used = {one.adapter for one in (*self._rows, *self._waiting, *self._paused.values())}
        unused = self._replaced.keys() - used
        for place in unused:
            del self._replaced[place]
            self._free.append(place)
            self._models[place] = self._model.with_adapter(None)
        if unused:
            self._arrange()

    @torch.inference_mode()
    def step(self) -> list[Token]:
        """Prompts of what can join, then a token for every request that runs."""
        versions = [tensor._version for tensor in self._trained]
        if versions != self._versions:
            self._decoder.refresh()
            self._prefill.refresh()
            self._keep_prompts(set())
            self._heads.refresh()
            self._versions = versions
        tokens = self._step()
        if self._replaced:
            self._let_go()
        return tokens

    def _step(self) -> list[Token]:
        first = len(self._rows)
        self._read_prompts()
        hidden = self._start()
        tokens = self._emit(torch.stack(hidden), first, self._rules(first)) if hidden else []
        if self._rows and not (hidden and first == 0):
            tokens += self._decode()
        return tokens

    def _check(self, request: Request) -> None:
        arch, where = self._model.arch, f"request {self._next}"
        if not request.ids:
            raise UserError(f"{where}: an empty prompt; it needs at least one token")
        if request.max_tokens < 1:
            raise UserError(f"{where}: max_tokens is {request.max_tokens}; allowed: 1 or more")
        if len(request.ids) >= arch.max_positions:
            raise UserError(
                f"{where}: a prompt of {len(request.ids):,} tokens; this model has {arch.max_positions:,} "
                "positions, the answer's included"
            )
        wrong = [number for number in (*request.ids, *request.sampling.logit_bias) if not 0 <= number < arch.vocab_size]
        if wrong:
            raise UserError(f"{where}: the model has no token {wrong[0]}; its ids are 0 to {arch.vocab_size - 1}")
        if request.adapter not in self._adapter_of:
            raise UserError(f"{where}: no adapter {request.adapter!r} here; there are: {self._names()}")
        if not 0 <= request.top_logprobs <= arch.vocab_size:
            raise UserError(f"{where}: top_logprobs is {request.top_logprobs}; allowed: 0 to {arch.vocab_size}")
        if request.stop_texts and self._vocab is None:
            raise UserError(f"{where}: stop texts need the engine's `vocab`, which it was made without")
        if "" in request.stop_texts:
            raise UserError(f"{where}: an empty stop text would stop everything; give at least one character")

    def _names(self) -> str:
        return ", ".join(name for name in self._adapter_of if name is not None) or "none"

    def score(self, prompts: Sequence[Sequence[int]], *, adapter: str | None = None, top: int = 0) -> list[Scored]:
        """Each token's logprob given those before it, by the training forward; no part of the cache is used.

        top     how many of the likeliest tokens to report beside each
        Raises  UserError for prompts and adapters as in `add`, and if the model's output isn't finite
        """
        work = self.scoring(prompts, adapter=adapter, top=top)
        while True:
            try:
                next(work)
            except StopIteration as done:
                found: list[Scored] = done.value
                return found

    @torch.inference_mode()
    def scoring(
        self, prompts: Sequence[Sequence[int]], *, adapter: str | None = None, top: int = 0
    ) -> Generator[None, None, list[Scored]]:
        """`score` in parts: it yields after each layer, and steps may come between, as long as the adapter stays."""
        for ids in prompts:
            self._check(Request(ids[: self._model.arch.max_positions - 1], adapter=adapter, top_logprobs=top))
            if len(ids) > self._model.arch.max_positions:
                raise UserError(f"a prompt of {len(ids):,} tokens; allowed: {self._model.arch.max_positions:,}")
        model = self._models[self._adapter_of[adapter]]
        return (yield from score_prompts(model, prompts, top))

    # --- who waits, joins and leaves

    def _read_prompts(self) -> None:
        """Take prompts of waiting requests into the cache, `prefill_tokens` at most, first come, first served."""
        room = self._prefill_tokens
        parts: list[tuple[Prompt, int]] = []
        for prompt in self._prompts.values():
            if prompt.num_left:
                parts.append((prompt, min(prompt.num_left, room)))
                room -= parts[-1][1]
        for sequence in islice(self._waiting, self._num_joining()):
            if room <= 0:
                break
            if sequence.key in self._prompts:
                continue
            prompt = self._new_prompt(sequence, alone=not self._rows and not parts)
            if prompt is None:
                break
            parts.append((prompt, min(prompt.num_left, room)))
            room -= parts[-1][1]
        if parts:
            self._prefill.run(parts)

    def _num_joining(self) -> int:
        """How many may join now."""
        num_free = self._max_batch - len(self._rows)
        return 0 if self._rows and num_free < max(1, self._max_batch // _JOIN_SHARE) else num_free

    def _new_prompt(self, sequence: _Sequence, alone: bool) -> Prompt | None:
        """A prompt with its blocks; None where there is no room for them and for what the running ones will need."""
        adapter, ids, wants_routes = sequence.key
        if not alone and not self.cache.has_room(len(ids) + 1, spare_blocks=len(self._rows)):
            return None
        prompt = Prompt(ids, adapter, self.cache.new(), wants_routes)
        self.cache.extend(prompt.holding, len(ids), force=True)
        self._prompts[sequence.key] = prompt
        return prompt

    def _start(self) -> list[Tensor]:
        """Give a row to each that waits at the front and whose prompt is read. Returns their hidden states, (D,)."""
        hidden: list[Tensor] = []
        if not self._prompts:  # nothing can start; counting who waits for what costs more than a decode step
            return hidden
        num_waiting = Counter(sequence.key for sequence in self._waiting)
        while self._waiting and len(self._rows) < self._max_batch:
            sequence = self._waiting[0]
            prompt = self._prompts.get(sequence.key)
            if prompt is None or prompt.num_left:
                break
            num_waiting[sequence.key] -= 1
            if num_waiting[sequence.key]:
                if self._rows and not self.cache.has_room(len(prompt.ids) + 1):
                    break
                sequence.holding = self.cache.fork(prompt.holding, len(prompt.ids))
            else:
                sequence.holding = prompt.holding
                del self._prompts[sequence.key]
            assert prompt.hidden_D is not None
            hidden.append(prompt.hidden_D)
            sequence.room = self.cache.room(sequence.holding)
            sequence.routes = list(prompt.routes)
            self._waiting.popleft()
            self.cache.set_row(len(self._rows), sequence.holding)
            self._rows.append(sequence)
            self._changed = True
        return hidden

    def _take_out(self, number: int) -> _Sequence | None:
        """Take a request from where it is, its blocks given back; it could wait again as it is now."""
        for row, sequence in enumerate(self._rows):
            if sequence.number == number:
                self._remove(row)
                # what was sampled is read again like a prompt
                sequence.key = (sequence.adapter, (*sequence.request.ids, *sequence.ids), sequence.request.routes)
                sequence.routes = []
                return sequence
        for sequence in self._waiting:
            if sequence.number == number:
                self._waiting.remove(sequence)
                self._keep_prompts({one.key for one in self._waiting})
                return sequence
        return None

    def _keep_prompts(self, wanted: set[_Key]) -> None:
        """Let go of all other prompts; who needs one reads it again."""
        for key in self._prompts.keys() - wanted:
            self.cache.release(self._prompts.pop(key).holding)

    def _remove(self, row: int) -> None:
        """Give a row up; the last one takes its place."""
        self.cache.release(self._rows[row].holding)
        last = self._rows.pop()
        if row < len(self._rows):
            self._rows[row] = last
            self.cache.set_row(row, last.holding)
        self.cache.clear_row(len(self._rows))
        self._changed = True

    def _make_room(self) -> None:
        """A slot for the next token of every row; the youngest rows wait again where there aren't enough."""
        if self._num_slots > 0 and not self._changed:
            self._num_slots -= 1
            return
        row = 0
        while row < len(self._rows):
            sequence = self._rows[row]
            if sequence.length < sequence.room:
                row += 1
            elif self.cache.extend(sequence.holding, sequence.length + 1, force=len(self._rows) == 1):
                sequence.room = self.cache.room(sequence.holding)
                self.cache.set_row(row, sequence.holding)
            elif self._prompts:  # read again later; better than to stop what runs
                self._keep_prompts(set())
            else:
                youngest = self._take_out(max(self._rows, key=lambda one: one.number).number)
                assert youngest is not None
                self._waiting.appendleft(youngest)
        self._num_slots = min((row.room - row.length for row in self._rows), default=0) - 1

    # --- tokens

    def _decode(self) -> list[Token]:
        """One token more for every row."""
        self._make_room()
        device, rows = self._model.device, self._rows
        if self._changed:
            self._ids_B = torch.tensor([row.ids[-1] for row in rows], device=device)
            self._position_B = torch.tensor([row.length for row in rows], device=device)
            self._adapter_B = [row.adapter for row in rows]
            self._row_rules, self._changed = self._rules(0), False
            self._wants_routes = any(row.request.routes for row in rows)
        arch = self._model.arch
        routes_LBk = None
        if self._wants_routes:
            routes_LBk = torch.empty(
                arch.num_layers, len(rows), arch.experts_per_token, dtype=torch.int16, device=device
            )  # fmt: skip
        x_BD = self._decoder.forward(self._prefill.embed(self._ids_B), self._position_B, self._adapter_B, routes_LBk)
        if routes_LBk is not None:
            routes = routes_LBk.cpu().numpy()
            for number, row in enumerate(rows):
                if row.request.routes:
                    row.routes.append(routes[None, :, number])
        self._position_B += 1
        return self._emit(x_BD, 0, self._row_rules)

    def _rules(self, first: int) -> Rules:
        rows = self._rows[first:]
        adapted = [self._heads.is_adapted(row.adapter) for row in rows]
        return Rules(
            [row.request for row in rows],
            [row.generator for row in rows],
            adapted,
            [row.ids for row in rows],
            self._model.device,
        )

    def _emit(self, x_BD: Tensor, first: int, rules: Rules) -> list[Token]:
        """Sample a token for each row from `first` on, and let go of those that are finished."""
        rows, failed = self._rows[first:], dict[int, str]()
        picked = self._heads.pick(x_BD, rules, [row.adapter for row in rows], failed, partial(_masks, rows))
        self._ids_B = picked.ids_B
        tokens, finished, plain = [], [], not (failed or picked.top)
        for i, (row, number, logprob) in enumerate(zip(rows, picked.ids, picked.logprobs, strict=True)):
            ids = row.ids
            ids.append(number)
            if plain and len(ids) < row.limit and number not in row.stops and not row.is_watched:
                tokens.append(Token(row.number, number, logprob, None))
                continue
            tokens.append(
                self._looked_at(row, Token(row.number, number, logprob, None, picked.top.get(i, ())), i, failed)
            )
            if tokens[-1].finish is not None:
                finished.append(first + i)
        for place in reversed(finished):
            self._remove(place)
        return tokens

    def _looked_at(self, row: _Sequence, token: Token, i: int, failed: dict[int, str]) -> Token:
        """A token that may be its request's last, with what belongs to a last one; `i`: its place among the failed."""
        finish: Finish | None = "length" if len(row.ids) == row.limit else None
        if token.id in row.request.stops or (row.request.stop_texts and self._says_stop(row, token.id)):
            finish = "stop"
        if row.constraint is not None and i not in failed:
            _push(row.constraint, token.id, i, failed)
        if i in failed:
            finish = "error"
        routes = np.concatenate(row.routes) if finish is not None and row.request.routes else None
        return token._replace(finish=finish, routes=routes, error=failed.get(i))

    def _says_stop(self, row: _Sequence, number: int) -> bool:
        assert self._vocab is not None
        stops = [text.encode() for text in row.request.stop_texts]
        said = row.tail + self._vocab.decode_bytes([number])
        longest = max(map(len, stops)) - 1
        row.tail = said[-longest:] if longest else b""
        return any(stop in said for stop in stops)


def _tensors(models: Sequence[Transformer]) -> list[Tensor]:
    """What can be trained of all these, each tensor once."""
    return list({id(tensor): tensor for one in models for tensor in one.trainable.tensors.values()}.values())


def _masks(rows: Sequence[_Sequence], failed: dict[int, str]) -> dict[int, Tensor]:
    """What each row with a constraint may draw. A grammar that can't go on fails its own request and no other."""
    masks = {}
    for i, row in enumerate(rows):
        if row.constraint is None:
            continue
        try:
            mask = row.constraint.mask()
        except UserError as error:
            failed[i] = str(error)
            continue
        if mask is not None:
            masks[i] = mask
    return masks


def _push(constraint: Constraint, token: int, row: int, failed: dict[int, str]) -> None:
    try:
        constraint.push(token)
    except UserError as error:
        failed[row] = str(error)
