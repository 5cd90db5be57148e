"""Sampling with a vLLM server: token ids go there, token ids and their logprobs come back, nothing is tokenised again.

One request a sample, all of a batch at once: the server batches them itself and computes a group's prompt once. Its
logprobs are those of the model itself, at temperature 1, as the engine's are. An adapter is handed over as a folder in
PEFT's format under a name of its own for every version, which the server reads from the disk.
Source: vLLM's OpenAI-compatible server, /v1/completions and /v1/load_lora_adapter, read and tried in version 0.32.
"""

from __future__ import annotations

import base64
import hashlib
import io
import math
import queue
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

from ossia.engine import Completion, Request
from ossia.engine.request import Finish
from ossia.errors import ServerError
from ossia.model.arch import Arch
from ossia.model.lora import Lora
from ossia.model.transformer import Transformer
from ossia.rl.sampler.served import Adapters, Served, told

_AT_ONCE = 256  # requests in flight; vLLM's own batch is as large by default
_PAUSE_S = 1.0  # before a request is tried again


class HttpSampler:
    """A server with a policy's adapter as a rollout's sampler: threads of its own ask, one thread owns it."""

    def __init__(self, served: Served, model: Transformer, check: Callable[[HttpSampler], None]) -> None:
        """model  with the adapter that is trained
        check  called with this sampler before it is first used; raises where the server can't have the policy
        """
        assert model.lora is not None
        self.served, self._lora, self._arch, self._check = served, model.lora, model.arch, check
        self._adapters = Adapters(served)
        self._waiting: list[tuple[int, Request]] = []
        self._next, self._retries, self._counting = 0, 0, threading.Lock()
        self._checked = False

    @property
    def counts(self) -> Mapping[str, int]:
        """Requests that were asked a second time."""
        return {"rollout_retries": self._retries}

    def refresh(self, version: int) -> None:
        """See Sampler. The first time, the server is checked."""
        if not self._checked:
            self._adapters.clear()
            self._check(self)
            self._checked = True
        self.use(f"v{version}", self._lora)

    def use(self, label: str, lora: Lora | None) -> None:
        """Sample with that adapter from here on; None: with the model as it is. Raises RunError if it isn't taken."""
        self._adapters.use(label, lora)

    def add(self, request: Request) -> int:
        """See Sampler."""
        number, self._next = self._next, self._next + 1
        self._waiting.append((number, request))
        return number

    def answers(self) -> Iterator[tuple[int, Completion]]:
        """See Sampler. Raises RunError if a request failed twice, or for an answer that can't be used."""
        jobs: queue.SimpleQueue[tuple[int, Request]] = queue.SimpleQueue()
        done: queue.SimpleQueue[tuple[int, Completion | ServerError]] = queue.SimpleQueue()
        mine, self._waiting = self._waiting, []
        for job in mine:
            jobs.put(job)
        model, over = self._adapters.model, threading.Event()

        def work() -> None:
            while not over.is_set():
                try:
                    number, request = jobs.get_nowait()
                except queue.Empty:
                    return
                done.put((number, self._ask(model, request)))

        for _ in range(min(len(mine), _AT_ONCE)):
            threading.Thread(target=work, name="rollout", daemon=True).start()
        try:
            for _ in mine:
                number, answer = done.get()
                if isinstance(answer, ServerError):
                    raise self.served.error(told(answer)) from answer
                yield number, answer
        finally:
            over.set()

    def _ask(self, model: str, request: Request) -> Completion | ServerError:
        """An answer, of the second attempt where the first one broke off; or what the server has against it."""
        body = completion_body(model, request)
        for attempt in (1, 2):
            try:
                return read_completion(self.served.server.post("/completions", body), request, self._arch)
            except ServerError as error:
                if attempt == 2 or (error.status is not None and error.status < 500):
                    return error
                with self._counting:
                    self._retries += 1
                time.sleep(_PAUSE_S)
        raise AssertionError


def completion_body(model: str, request: Request) -> dict[str, Any]:
    """The body of a completion request that samples from the model itself: nothing of its defaults is left to decide.

    Stop texts, constraints, penalties and the likeliest tokens beside each are not a rollout's.
    """
    sampling = request.sampling
    plain = not (request.stop_texts or request.constraint or request.top_logprobs or sampling.logit_bias)
    assert plain
    assert request.adapter is None
    return {
        "model": model,
        "prompt": list(request.ids),
        "max_tokens": request.max_tokens,
        "temperature": sampling.temperature,
        "top_p": 1.0,
        "top_k": 0,
        "min_p": 0.0,
        "repetition_penalty": 1.0,
        "frequency_penalty": 0.0,
        "presence_penalty": 0.0,
        "seed": None if sampling.seed is None else seed_63(sampling.seed),
        "stop_token_ids": sorted(request.stops),
        "skip_special_tokens": False,
        "logprobs": 0,
        "return_token_ids": True,
    }


def seed_63(seed: int) -> int:
    """A seed of any size as one of 63 bits, which is what fits into the request."""
    digest = hashlib.blake2b(str(seed).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def read_completion(said: Any, request: Request, arch: Arch) -> Completion:
    """What a server answered.

    Raises  ServerError with status 400 (to ask again changes nothing) if it lacks ids or logprobs, or they can't be
            those of an answer to this request; with none if the server broke the answer off
    """
    try:
        choice = said["choices"][0]
        ids, finish = choice["token_ids"], choice["finish_reason"]
        logprobs = choice["logprobs"]["token_logprobs"]
    except (KeyError, IndexError, TypeError):
        ids = finish = logprobs = None
    if ids is None or logprobs is None:
        raise ServerError(
            "the rollout server's answers have no `token_ids` with their `logprobs`, and text isn't tokenised again\n"
            "  allowed: a vLLM server that knows `return_token_ids` (tried: 0.32)",
            400,
        )
    if finish not in ("stop", "length"):
        raise ServerError(f"the rollout server broke an answer off: finish_reason {finish!r}")
    ended = bool(ids) and ids[-1] in request.stops
    wrong = None
    if not ids or len(ids) != len(logprobs) or len(ids) > request.max_tokens:
        wrong = f"{len(ids)} token ids with {len(logprobs)} logprobs, of {request.max_tokens} asked for"
    elif not all(isinstance(one, int) and 0 <= one < arch.vocab_size for one in ids):
        wrong = f"token ids that the model doesn't have: it has 0 to {arch.vocab_size - 1}"
    elif not all(isinstance(one, (int, float)) and math.isfinite(one) and one < 0.01 for one in logprobs):
        wrong = "logprobs that aren't finite"
    elif (finish == "stop") != ended:
        wrong = f"an answer with finish_reason {finish!r} that ends in id {ids[-1]}; stops are {sorted(request.stops)}"
    elif finish == "length" and len(ids) < request.max_tokens:
        wrong = f"an answer cut off after {len(ids)} tokens, of {request.max_tokens} asked for"
    if wrong is not None:
        raise ServerError(f"the rollout server answered what can't be used: {wrong}", 400)
    ended_as: Finish = "stop" if ended else "length"
    routes = _routes(choice, request, len(ids), arch) if request.routes else None
    return Completion(ids, [min(0.0, float(one)) for one in logprobs], ended_as, routes=routes)


def _routes(choice: Mapping[str, Any], request: Request, num_sampled: int, arch: Arch) -> np.ndarray:
    """The experts of each position, see Completion; vLLM sends a .npy file in base64."""
    said = choice.get("routed_experts")
    if not isinstance(said, str):
        raise ServerError(
            "the rollout server's answers don't say which experts were chosen, which `rl.router_replay` needs\n"
            "  next: start it with --enable-return-routed-experts, or leave `rl.router_replay` out",
            400,
        )
    routes = np.load(io.BytesIO(base64.b64decode(said)), allow_pickle=False)
    shape = (len(request.ids) + num_sampled - 1, arch.num_layers, arch.experts_per_token)
    if routes.shape != shape or (routes.size and int(routes.max()) >= arch.num_experts):
        raise ServerError(f"the rollout server's chosen experts have shape {routes.shape}, not {shape}", 400)
    return routes.astype(np.int16)
