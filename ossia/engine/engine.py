"""Generation for many requests at once over a cache of keys and values.

```text
waiting requests --prefill: their prompts as one packed batch, layer by layer--> first tokens
running requests --decode: one token each, lengths of their own----------------> next tokens, until a stop or max_tokens
```
Nothing is padded. Requests join when rows of the batch are free and leave when they finish; what a request gets doesn't
depend on who else is there. Weights are the trainer's own object, and adapters are read in place: after an optimizer
step the next token comes from the new policy.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Literal, get_args

from ossia.engine.cache import Cache
from ossia.engine.decode import Decoder, TorchDecoder, fuses
from ossia.engine.graphs import GraphDecoder
from ossia.engine.native import NativeDecoder, Panels, find_kernels
from ossia.engine.request import Completion, Finish, Request, Token
from ossia.engine.session import Session
from ossia.errors import UserError
from ossia.harmony.vocab import Vocabulary
from ossia.kernels.cpu.native import Unavailable
from ossia.model.lora import Lora
from ossia.model.transformer import Transformer
from ossia.ops.memory import gpu_memory, machine_memory

CacheDtype = Literal["model", "int8"]
DecoderChoice = Literal["auto", "torch", "native"]


class Engine:
    """Generates from a model.

    vocab           needed for `Request.stop_texts` alone
    adapters        beside the model's own, by the names that requests choose them by; None: the model without one
    max_batch       sequences at once, at most
    cache_bytes     bytes that the cache may grow to; None: a quarter of the memory (of a CUDA device: half of what is
                    free). Fewer sequences run at once where they would need more; a single one always runs.
    prefill_tokens  of prompts at once: what runs already waits for no more than these; a longer prompt goes in parts
    cache_dtype     int8 halves the cache of a bfloat16 model, at the cost of exactness; model: the model's own dtype
    decoder         torch: any device. native: C on a CPU. auto: native where it can be
    """

    def __init__(
        self,
        model: Transformer,
        *,
        vocab: Vocabulary | None = None,
        adapters: Mapping[str, Lora | None] | None = None,
        max_batch: int = 64,
        cache_bytes: int | None = None,
        prefill_tokens: int = 8192,
        cache_dtype: CacheDtype = "model",
        decoder: DecoderChoice = "auto",
    ) -> None:
        assert max_batch >= 1, max_batch
        assert prefill_tokens >= 1, prefill_tokens
        assert cache_dtype in get_args(CacheDtype), cache_dtype
        assert decoder in get_args(DecoderChoice), decoder
        self.model, self.vocab, self.adapters = model, vocab, dict(adapters or {})
        self.max_batch, self.prefill_tokens = max_batch, prefill_tokens
        self._int8, self._decoder = cache_dtype == "int8", decoder
        self._panels = Panels.wanted(model)
        self.cache_bytes = default_cache_bytes(model) if cache_bytes is None else cache_bytes

    def generate(self, requests: Sequence[Request]) -> list[Completion]:
        """A completion of every request, in their order. Raises as `stream`."""
        # columns of numbers, not tokens: tens of thousands of tuples would keep Python's garbage collector busy
        ids, logprobs, top = ([[] for _ in requests] for _ in range(3))
        last: dict[int, Token] = {}
        for token in self.stream(requests):
            ids[token.request].append(token.id)
            logprobs[token.request].append(token.logprob)
            if token.top:
                top[token.request].append(token.top)
            if token.finish is not None:
                last[token.request] = token
        return [
            Completion(ids[number], logprobs[number], _ended(last[number]), top[number], last[number].routes)
            for number in range(len(requests))
        ]

    def stream(self, requests: Sequence[Request]) -> Iterator[Token]:
        """The tokens of all requests as they are sampled.

        Raises  UserError for a prompt that is empty, too long for the model, or holds an id it doesn't have, for an
                unknown adapter, for a constraint that can't go on, and if the model's output isn't finite
        """
        session = self.session()
        for request in requests:
            session.add(request)
        while not session.idle:
            for token in session.step():
                if token.error is not None:
                    raise UserError(f"request {token.request}: {token.error}")
                yield token

    def session(self) -> Session:
        """A batch of its own that requests can join and leave at any time."""
        model = self.model
        cache = Cache(model.arch, model.dtype, model.device, self.cache_bytes, int8=self._int8)
        return Session(
            model,
            cache,
            self._make_decoder(cache),
            self.adapters,
            vocab=self.vocab,
            max_batch=self.max_batch,
            prefill_tokens=self.prefill_tokens,
        )

    def _make_decoder(self, cache: Cache) -> Decoder:
        """The fastest that can, or the one that was asked for. Raises UserError where that one can't."""
        model, adapters = self.model, [self.model.lora, *self.adapters.values()]
        captured = model.keeps_experts or fuses(model, cache.of_layer)
        if self._decoder == "auto" and model.device.type == "cuda" and captured:
            return GraphDecoder(model, cache.of_layer, adapters)
        if self._decoder != "torch":
            kernels = find_kernels(model, adapters)
            if not isinstance(kernels, Unavailable):
                return NativeDecoder(model, cache.of_layer, adapters, kernels, self._panels)
            if self._decoder == "native":
                raise UserError(f"decoder: native can't be used here: {kernels.reason}\n  next: use auto or torch")
        return TorchDecoder(model, cache.of_layer, adapters)


def default_cache_bytes(model: Transformer) -> int:
    """What the cache of an engine may grow to if nothing is said: see `Engine`."""
    if model.device.type == "cuda":
        return gpu_memory(model.device)[1] // 2
    return machine_memory()[0] // 4


def completion(tokens: Sequence[Token]) -> Completion:
    """A finished request's tokens as one answer."""
    return Completion(
        [token.id for token in tokens],
        [token.logprob for token in tokens],
        _ended(tokens[-1]),
        [token.top for token in tokens] if tokens[0].top else [],
        tokens[-1].routes,
    )


def _ended(token: Token) -> Finish:
    assert token.finish is not None
    return token.finish
