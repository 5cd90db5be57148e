"""From the last layer's output to a token for each row: final norm, head, rules of sampling, and the token's logprob.

Most requests take the likeliest token or draw from the whole vocabulary at some temperature. For those the decoder
does it all (`Decoder.draw`), which on a CPU never writes the (B, V) logits to memory. Rows that want more (top_k,
top_p, min_p, a bias, a grammar, the likeliest tokens reported, an adapter on the head) get their logits and go through
`BatchSampler`. Which way a row goes depends on its own request alone, never on its batch mates.
Letters: B rows, D hidden, V vocabulary, L rows whose logits are wanted, N rows of one adapter, r rank.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from ossia.engine.request import Request
from ossia.engine.sampler import BatchSampler, where_passed
from ossia.model.transformer import Transformer
from ossia.ops.linear import Linear, linear

if TYPE_CHECKING:
    import random

    from ossia.engine.decode import Decoder

NOT_FINITE = (
    "the model's output is not finite, so there is nothing to sample\n"
    "  next: check the checkpoint and the adapter, or try another dtype"
)

_SCORED_LOGITS = 2**24  # that are in memory at once: 64 MiB
TopTokens = tuple[tuple[int, float], ...]
"""(id, logprob) of the likeliest tokens, the likeliest first."""

Masks = Callable[[dict[int, str]], Mapping[int, Tensor]]
"""What rows may draw, (V,) bool each; rows that can't go on are added to the argument, with the reason."""


@dataclass(frozen=True, slots=True)
class Draw:
    """How tokens are taken.

    temperature_B  float32; 0: the likeliest, of equals the lowest id; above: drawn from all tokens
    uniform_B      float64, from 0 to below 1: where a row's draw falls in its running sum of probabilities
    left           the rows whose logits are wanted instead, in ascending order; no token is taken for them
    """

    temperature_B: Tensor
    uniform_B: Tensor
    left: Sequence[int]


@dataclass(frozen=True, slots=True)
class Drawn:
    """What became of a `Draw`.

    ids_B      int64; of rows in `left` anything
    logprob_B  float32, ln p of each at temperature 1, as in `logprobs`; of rows in `left` anything
    lse_B      float32, ln of the sum of each row's exponentials; not finite where there is nothing to draw from
    logits_LV  float32, rounded to the hidden states' dtype on the way, of the rows in `left`
    """

    ids_B: Tensor
    logprob_B: Tensor
    lse_B: Tensor
    logits_LV: Tensor


def draw_plainly(h_BD: Tensor, head_VD: Tensor, draw: Draw) -> Drawn:
    """`Decoder.draw` in plain torch, on any device: the reference."""
    logits_BV = linear(h_BD, Linear(head_VD)).float()
    lse_B = logits_BV.logsumexp(-1)
    logits_LV = logits_BV[list(draw.left)]
    if not bool(lse_B.isfinite().all()):
        logits_BV = logits_BV.nan_to_num()
    ids_B = logits_BV.argmax(-1)
    if bool((draw.temperature_B > 0).any()):
        warm_B1 = torch.where(draw.temperature_B > 0, draw.temperature_B, 1.0)[:, None]
        passed_B = where_passed((logits_BV / warm_B1).softmax(-1), draw.uniform_B[:, None])
        ids_B = torch.where(draw.temperature_B > 0, passed_B, ids_B)
    own_B = (h_BD.float() * head_VD[ids_B].float()).sum(-1)
    return Drawn(ids_B, logprobs(own_B, logits_BV, lse_B, ids_B), lse_B, logits_LV)


def logprobs(own_B: Tensor, logits_BV: Tensor, lse_B: Tensor, ids_B: Tensor) -> Tensor:
    """ln p of each token from its logit anew: as in `ops.loss` it is left out of the sum of the rounded ones."""
    rounded_B = logits_BV.gather(-1, ids_B[:, None])[:, 0]
    others_B = lse_B + torch.log1p(-(rounded_B - lse_B).exp().clamp(max=1.0))
    return F.logsigmoid(own_B - others_B)


class Rules:
    """The rules of a batch as columns. Make a new one when the batch changes; the generators live on.

    requests    of each row
    generators  their random numbers
    adapted_B   whether a row's adapter changes the head
    sampled     what each row has sampled so far
    """

    def __init__(
        self,
        requests: Sequence[Request],
        generators: Sequence[random.Random],
        adapted_B: Sequence[bool],
        sampled: Sequence[Sequence[int]],
        device: torch.device,
    ) -> None:
        rules = [request.sampling for request in requests]
        is_left = [adapted or not _is_plain(one) for one, adapted in zip(requests, adapted_B, strict=True)]
        self.left = [i for i, left in enumerate(is_left) if left]
        self.left_L = torch.tensor(self.left, dtype=torch.int64, device=device)
        self.top = [requests[i].top_logprobs for i in self.left]
        self.sampler = BatchSampler(
            [rules[i] for i in self.left],
            [generators[i] for i in self.left],
            device,
            [sampled[i] for i in self.left],
        )
        self._drawing = [(i, generators[i]) for i, one in enumerate(rules) if one.temperature > 0 and not is_left[i]]
        temperatures = [0.0] * len(rules)
        for i, _ in self._drawing:
            temperatures[i] = rules[i].temperature
        self._temperature_B = torch.tensor(temperatures, dtype=torch.float32, device=device)
        self._uniforms = [0.0] * len(rules)
        self._uniform_B = torch.zeros(len(rules), dtype=torch.float64, device=device)

    def draw(self) -> Draw:
        """The next token's draw: one number from each generator that needs one."""
        if self._drawing:
            for row, generator in self._drawing:
                self._uniforms[row] = generator.random()
            self._uniform_B = torch.tensor(self._uniforms, dtype=torch.float64, device=self._temperature_B.device)
        return Draw(self._temperature_B, self._uniform_B, self.left)


def _is_plain(request: Request) -> bool:
    rules = request.sampling
    shaped = rules.top_k or rules.top_p < 1 or rules.min_p or rules.logit_bias
    shaped = shaped or rules.frequency_penalty or rules.presence_penalty
    return not (shaped or request.top_logprobs or request.constraint is not None)


@dataclass(frozen=True, slots=True)
class Picked:
    """A token for each row.

    ids_B  int64, where the model is; `ids` and `logprobs` are lists of it
    top    of the rows that asked for them, the likeliest tokens and their logprobs
    """

    ids_B: Tensor
    ids: list[int]
    logprobs: list[float]
    top: dict[int, TopTokens]


class Heads:
    """The head, with the adapters that several models may have on it."""

    def __init__(self, models: Sequence[Transformer], decoder: Decoder) -> None:
        self._models, self._decoder = models, decoder
        self.refresh()

    def refresh(self) -> None:
        """Weights or adapters have changed: read them again."""
        model = self._models[0]
        self._norm_D, self._eps = model.tensor("model.norm.weight"), model.arch.rms_eps
        self._heads = [one.head() for one in self._models]

    def is_adapted(self, adapter: int) -> bool:
        """Whether this model has an adapter on its head."""
        return self._heads[adapter].lora_a is not None

    def pick(
        self, x_BD: Tensor, rules: Rules, adapter_B: Sequence[int], failed: dict[int, str], masks: Masks
    ) -> Picked:
        """A token for each row.

        x_BD     (B, D), the last layer's output
        rules    of these rows
        failed   rows that can't go on are added, with the reason
        masks    called if there are rows whose logits are wanted
        """
        h_BD, head_VD = step_norm(x_BD, self._norm_D, self._eps), self._heads[0].weight
        drawn = self._decoder.draw(h_BD, head_VD, rules.draw())
        if not rules.left:
            found = drawn.lse_B.tolist()
            if not math.isfinite(sum(found)):
                failed.update({i: NOT_FINITE for i, lse in enumerate(found) if not math.isfinite(lse)})
            return Picked(drawn.ids_B, drawn.ids_B.tolist(), drawn.logprob_B.tolist(), {})
        lse_B, logits_LV, h_LD = drawn.lse_B, drawn.logits_LV, h_BD[rules.left_L]
        adapted = self._adapted(h_LD, [adapter_B[i] for i in rules.left])
        for mine_N, a_Nr, b_Vr in adapted:
            logits_LV[mine_N] += linear(a_Nr, Linear(b_Vr)).float()
        if adapted:
            lse_B = lse_B.index_copy(0, rules.left_L, logits_LV.logsumexp(-1))
        lse_L = lse_B[rules.left_L]
        failed.update({i: NOT_FINITE for i, lse in enumerate(lse_B.tolist()) if not math.isfinite(lse)})
        if failed:
            logits_LV = logits_LV.nan_to_num()
        place_of = {row: place for place, row in enumerate(rules.left)}
        ids_L = rules.sampler.draw(logits_LV, {place_of[row]: mask_V for row, mask_V in masks(failed).items()})
        # the sampled tokens' logits anew, in float32 as in `ops.loss`, not rounded to h's dtype
        own_L = (h_LD.float() * head_VD[ids_L].float()).sum(-1)
        for mine_N, a_Nr, b_Vr in adapted:
            own_L[mine_N] += (a_Nr.float() * b_Vr[ids_L[mine_N]].float()).sum(-1)
        ids_B = drawn.ids_B.index_copy(0, rules.left_L, ids_L)
        logprob_B = drawn.logprob_B.index_copy(0, rules.left_L, logprobs(own_L, logits_LV, lse_L, ids_L))
        ids, lps = ids_B.tolist(), logprob_B.tolist()
        tops = zip(rules.left, _top(logits_LV, lse_L, rules.top), strict=True) if any(rules.top) else ()
        return Picked(ids_B, ids, lps, {row: _with_own(top, ids[row], lps[row]) for row, top in tops})

    def _adapted(self, h_LD: Tensor, adapter_L: Sequence[int]) -> list[tuple[Tensor, Tensor, Tensor]]:
        """Of each adapter on the head: its rows (N,) int64, what its A makes of them (N, r), and its B (V, r)."""
        found = []
        for adapter in sorted(set(adapter_L)):
            head = self._heads[adapter]
            if head.lora_a is not None and head.lora_b is not None:
                mine_N = torch.tensor([i for i, one in enumerate(adapter_L) if one == adapter], device=h_LD.device)
                found.append((mine_N, linear(h_LD[mine_N], Linear(head.lora_a)), head.lora_b))
        return found


def score_rows(
    h_ND: Tensor, head: Linear, targets_N: Tensor, top: int
) -> Iterator[tuple[list[float], list[TopTokens]]]:
    """ln p of a given token for each row, float32 as training computes it, and the `top` likeliest beside it; in
    pieces whose logits fit into a cache.

    h_ND       (N, D) normed
    targets_N  (N,) int64
    """
    at_once = max(1, _SCORED_LOGITS // len(head.weight))
    for h, ids in zip(h_ND.split(at_once), targets_N.split(at_once), strict=True):
        logits = linear(h, head).float()
        lse = logits.logsumexp(-1)
        own = (h.float() * head.weight[ids].float()).sum(-1)
        if head.lora_a is not None and head.lora_b is not None:
            own += (linear(h, Linear(head.lora_a)).float() * head.lora_b[ids].float()).sum(-1)
        tops = _top(logits, lse, [top] * len(h)) if top and len(h) else [()] * len(h)
        found = logprobs(own, logits, lse, ids).tolist()
        yield found, [_with_own(*one) for one in zip(tops, ids.tolist(), found, strict=True)]


def step_norm(x_BD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """`ops.linear.rms_norm` without its gradient, in one operation."""
    if x_BD.dtype == weight_D.dtype == torch.float32:
        return F.rms_norm(x_BD, weight_D.shape, weight_D, eps)
    return F.rms_norm(x_BD.float(), weight_D.shape, weight_D.float(), eps).to(weight_D.dtype)


def _top(logits_LV: Tensor, lse_L: Tensor, wanted: Sequence[int]) -> list[TopTokens]:
    """The likeliest tokens of each row, as many as it wants."""
    values, ids = logits_LV.topk(max(wanted), dim=-1)
    lps = (values - lse_L[:, None]).tolist()
    return [
        tuple(zip(mine[:count], theirs[:count], strict=True))
        for mine, theirs, count in zip(ids.tolist(), lps, wanted, strict=True)
    ]


def _with_own(top: TopTokens, number: int, logprob: float) -> TopTokens:
    """The likeliest tokens, of which the one that was drawn has the logprob that is told for it, not a rounded one."""
    return tuple((other, logprob if other == number else found) for other, found in top)
