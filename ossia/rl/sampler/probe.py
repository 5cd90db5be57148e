"""Before step 1: does a server sample from the very model that is trained, and follow its adapter?

Names and shapes can agree where weights don't, and an adapter's part that a server leaves out shows only once training
has moved it. So the server samples short answers, of the model as it is and with a throwaway adapter that changes every
kind of matrix in the recipe, and the trainer's own forward says how likely it finds them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import torch

from ossia.config.schema import TARGET_GROUPS
from ossia.data.pack import Pack
from ossia.data.sample import Sample
from ossia.engine import Completion, Request, Sampling
from ossia.errors import RunError
from ossia.model.lora import Lora, LoraSpec
from ossia.model.transformer import Transformer
from ossia.ops.policy import divergence
from ossia.rl.sampler.http import HttpSampler
from ossia.train.schedule import forward_logprobs

_MOST_TOKENS = 32  # sampled for each prompt
_EFFECT = 5.0  # of each kind of matrix, in units of `rl.max_mismatch`: well above what is allowed
_STEPS = 4

Asked = Sequence[tuple[Request, Completion]]


def policy_check(
    model: Transformer, prompts: Sequence[Sequence[int]], stops: frozenset[int]
) -> Callable[[HttpSampler], None]:
    """The check of a server for this model and its adapter; see `_Probe.check`."""
    return lambda sampler: _Probe(sampler, model, prompts, stops).check()


class _Probe:
    """One check of a server: prompts of the run, sampled there and looked at here."""

    def __init__(
        self, sampler: HttpSampler, model: Transformer, prompts: Sequence[Sequence[int]], stops: frozenset[int]
    ) -> None:
        self._sampler, self._model, self._served = sampler, model, sampler.served
        rl = self._served.recipe.rl
        self._allowed = rl.max_mismatch
        length = min(_MOST_TOKENS, rl.max_new)
        self._requests = [
            Request(ids, Sampling(seed=number), length, stops, routes=rl.router_replay)
            for number, ids in enumerate(prompts)
        ]

    def check(self) -> None:
        """Raise RunError if the server has another model, or doesn't take or follow an adapter like the recipe's,
        saying which kinds of matrices it does follow."""
        served, model = self._served, self._model
        assert model.lora is not None
        self._sampler.use("base", None)
        asked = self._ask()
        found = self._mismatch(None, asked)
        if not found <= self._allowed:
            raise served.error(
                f"{served.server.base} doesn't serve the recipe's model, {served.recipe.model}: what it samples from "
                f"{served.model!r} differs by {found:.2e} nats a token, allowed are {self._allowed:g} (rl.max_mismatch)"
            )
        groups = _groups(model.lora.spec)
        loras = {name: self._with_effect(spec, asked) for name, spec in groups.items()}
        tensors = {name: tensor for lora in loras.values() for name, tensor in lora.trainable.tensors.items()}
        why = self._why_not("probe", Lora(model.arch, model.lora.spec, tensors))
        if why is None:
            return
        follows = [name for name, lora in loras.items() if self._why_not(f"probe-{name}", lora) is None]
        allowed = "a server that takes the adapter, and follows it"
        if 0 < len(follows) < len(groups):
            allowed = f"on this server: adapter.targets [{', '.join(follows)}]"
        raise RunError(
            f"rl.rollout: {served.server.base} can't sample with the recipe's adapter, on {', '.join(groups)}\n"
            f"  found: {why}\n  allowed: {allowed}\n  next: change `adapter` in the recipe, or the server"
        )

    def _why_not(self, label: str, lora: Lora) -> str | None:
        """What is in the way of sampling with that adapter."""
        try:
            self._sampler.use(label, lora)
            asked = self._ask()
        except RunError as error:
            return str(error).partition("\n")[0].removeprefix("rl.rollout: ")
        found = self._mismatch(lora, asked)
        if found <= _EFFECT / 4 * self._allowed:
            return None
        return (
            f"with an adapter on these its samples differ by {found:.2e} nats a token from the trainer's probabilities"
        )

    def _with_effect(self, spec: LoraSpec, asked: Asked) -> Lora:
        """An adapter with random numbers that moves the answers' probabilities by about `_EFFECT` x what is allowed."""
        lora = Lora.fresh(self._model.arch, spec, seed=1, device=self._model.device)
        sides = [tensor for name, tensor in lora.trainable.tensors.items() if name.endswith("lora_B")]
        generator = torch.Generator().manual_seed(1)
        random = [torch.randn(tensor.shape, generator=generator).to(tensor) for tensor in sides]
        size, wanted = 0.05, _EFFECT * self._allowed
        for _ in range(_STEPS):
            with torch.no_grad():
                for tensor, values in zip(sides, random, strict=True):
                    tensor.copy_(values * size)
            effect = self._mismatch(lora, asked)
            if 0.5 * wanted <= effect <= 2.0 * wanted:
                break
            size *= math.sqrt(min(64.0, max(1 / 64, wanted / max(effect, 1e-12))))
        return lora

    def _ask(self) -> Asked:
        by_number = {self._sampler.add(request): request for request in self._requests}
        return [(by_number[number], answer) for number, answer in self._sampler.answers()]

    def _mismatch(self, lora: Lora | None, asked: Asked) -> float:
        """Nats a token between sampler and trainer, both with that adapter; see `ops.policy.divergence`."""
        model = self._model.with_adapter(lora)
        theirs = torch.tensor([one for _, answer in asked for one in answer.logprobs])
        ours = torch.cat(forward_logprobs(model, [_pack(*one) for one in asked])).cpu()
        return float(divergence(ours, theirs).mean())


def _groups(spec: LoraSpec) -> dict[str, LoraSpec]:
    """Of each kind of matrix (attention, experts, router, lm_head) the part of the adapter that is on it."""
    kind_of = {target: group for group, targets in TARGET_GROUPS.items() for target in targets}
    found: dict[str, dict[str, tuple[int, float]]] = {}
    for target, size in spec.targets.items():
        found.setdefault(kind_of.get(target, target), {})[target] = size
    return {kind: replace(spec, targets=targets) for kind, targets in found.items()}


def _pack(request: Request, answer: Completion) -> Pack:
    ids = np.array([*request.ids, *answer.ids], np.int32)
    weights = np.concatenate((np.zeros(len(request.ids)), np.ones(len(answer.ids)))).astype(np.float32)
    pack = Pack.from_samples([Sample(ids, weights, None, "probe")])
    if answer.routes is None:
        return pack
    last = np.full((1, *answer.routes.shape[1:]), -1, np.int16)
    return replace(pack, routes=torch.from_numpy(np.concatenate((answer.routes, last))))
