"""Next tokens from logits, every request by its own rules and its own random numbers.

A request draws one uniform number a token from a generator of its own, and takes the token where the cumulative
probability passes it: what it gets depends on its seed and its logits, never on its batch mates.
Own code because of that, and because without top-k and top-p (the default) nothing has to be sorted.
Letters: B sequences, V vocabulary, C candidates, likeliest first, N blocks of the vocabulary, S tokens of a block,
P sequences with penalties.
"""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ossia.errors import UserError

_CANDIDATES = 1024  # looked at first for top_p; all tokens where these don't add up to it
_BLOCK = 512  # tokens added up at once before one is looked for: running sums over a large vocabulary are slow


@dataclass(frozen=True, slots=True)
class Sampling:
    """How a request's tokens are drawn; the defaults are OpenAI's.

    temperature        divides the logits; 0 always takes the likeliest token (of equals the lowest id)
    top_k              keep the k likeliest tokens; 0 keeps all
    top_p              of those, keep the fewest likeliest whose probabilities add up to at least this share
    min_p              of those, keep tokens at least this fraction as likely as the likeliest
    seed               of the request's own generator; None: drawn from the system, another result each time
    logit_bias         added to the logits of these tokens, before everything else
    frequency_penalty  taken off a token's logit as often as the request has sampled it (the prompt doesn't count)
    presence_penalty   taken off once, if the request has sampled it at all

    Raises  UserError for a value out of range
    Source  of the penalties: OpenAI's API reference, logit[j] -= count[j] * frequency + (count[j] > 0) * presence
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0

    def __post_init__(self) -> None:
        rules = (
            ("temperature", self.temperature, 0 <= self.temperature < float("inf"), "a number >= 0"),
            ("top_p", self.top_p, 0 <= self.top_p <= 1, "a share from 0 to 1"),
            ("top_k", self.top_k, self.top_k >= 0, "0 (all tokens) or a positive number"),
            ("min_p", self.min_p, 0 <= self.min_p <= 1, "a share from 0 to 1"),
            ("frequency_penalty", self.frequency_penalty, math.isfinite(self.frequency_penalty), "a finite number"),
            ("presence_penalty", self.presence_penalty, math.isfinite(self.presence_penalty), "a finite number"),
        )
        for name, found, holds, allowed in rules:
            if not holds:
                raise UserError(f"{name}: is {found}; allowed: {allowed}")
        if wrong := [token for token, bias in self.logit_bias.items() if not math.isfinite(bias)]:
            raise UserError(
                f"logit_bias: that of token {wrong[0]} is {self.logit_bias[wrong[0]]}; allowed: finite numbers"
            )

    def generator(self) -> random.Random:
        """The request's random numbers, from their beginning."""
        return random.Random(self.seed)


class BatchSampler:
    """The rules of a batch as columns. Make a new one when the batch changes; the generators live on.

    sampled  what each sequence has sampled so far, for its penalties; None: nothing yet
    """

    def __init__(
        self,
        samplings: Sequence[Sampling],
        generators: Sequence[random.Random],
        device: torch.device,
        sampled: Sequence[Sequence[int]] | None = None,
    ) -> None:
        def column(values: Sequence[float], dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.tensor(values, dtype=dtype, device=device)[:, None]

        self._device = device
        self._drawing = [
            (row, generator)
            for row, (rules, generator) in enumerate(zip(samplings, generators, strict=True))
            if rules.temperature > 0
        ]
        self._greedy = not self._drawing
        self._greedy_B = torch.tensor([rules.temperature == 0 for rules in samplings], device=device)
        self._temperature_B1 = column([rules.temperature or 1.0 for rules in samplings])
        self._plain = all(rules.temperature in (0, 1) for rules in samplings)
        self._uniforms = [0.0] * len(samplings)
        has_top = [bool(rules.top_k or rules.top_p < 1) for rules in samplings]
        is_open = [top and not rules.top_k for top, rules in zip(has_top, samplings, strict=True)]
        self._has_top, self._top_B1, self._open_B1 = (
            any(has_top),
            column(has_top, torch.bool),
            column(is_open, torch.bool),
        )
        self._most = max((*(rules.top_k for rules in samplings), _CANDIDATES if any(is_open) else 1))
        self._top_k_B1 = column([rules.top_k or torch.iinfo(torch.int32).max for rules in samplings], torch.int64)
        self._top_p_B1 = column([rules.top_p for rules in samplings])
        self._min_p_B1 = column([rules.min_p for rules in samplings])
        self._has_min_p = any(rules.min_p for rules in samplings)
        biases = [(row, *one) for row, rules in enumerate(samplings) for one in rules.logit_bias.items()]
        self._bias_at, self._bias_by = (
            torch.tensor([[row, token] for row, token, _ in biases], dtype=torch.int64, device=device)
            .reshape(-1, 2)
            .unbind(-1),
            torch.tensor([bias for *_, bias in biases], dtype=torch.float32, device=device),
        )
        punished = [i for i, rules in enumerate(samplings) if rules.frequency_penalty or rules.presence_penalty]
        self._punished_P = torch.tensor(punished, dtype=torch.int64, device=device)
        self._frequency_P1 = column([samplings[i].frequency_penalty for i in punished])
        self._presence_P1 = column([samplings[i].presence_penalty for i in punished])
        self._sampled = [] if sampled is None else [list(sampled[i]) for i in punished]
        self._counts_PV: Tensor | None = None

    def draw(self, logits_BV: Tensor, allowed: Mapping[int, Tensor] | None = None) -> Tensor:
        """One token a sequence.

        logits_BV  (B, V) float32
        allowed    for some rows, the tokens that may be drawn, (V,) bool
        Returns    (B,) int64
        """
        if allowed or len(self._bias_by) or len(self._punished_P):
            logits_BV = logits_BV.clone()
            logits_BV.index_put_(self._bias_at, self._bias_by, accumulate=True)
            self._punish(logits_BV)
            for row, allowed_V in (allowed or {}).items():
                assert bool(allowed_V.any()), row
                logits_BV[row].masked_fill_(~allowed_V, -torch.inf)
        chosen_B = self._chosen(logits_BV)
        if self._counts_PV is not None:
            self._counts_PV.scatter_add_(1, chosen_B[self._punished_P, None], torch.ones_like(self._presence_P1))
        return chosen_B

    def _punish(self, logits_BV: Tensor) -> None:
        """Take the penalties off, in place; the first time what was sampled before is counted."""
        if not len(self._punished_P):
            return
        if self._counts_PV is None:
            self._counts_PV = logits_BV.new_zeros(len(self._punished_P), logits_BV.shape[1])
            for counts_V, ids in zip(self._counts_PV, self._sampled, strict=False):
                ids_N = torch.tensor(ids, dtype=torch.int64, device=self._device)
                counts_V += torch.bincount(ids_N, minlength=len(counts_V))
        logits_BV[self._punished_P] -= self._counts_PV * self._frequency_P1 + (self._counts_PV > 0) * self._presence_P1

    def _chosen(self, logits_BV: Tensor) -> Tensor:
        if self._greedy:
            return logits_BV.argmax(-1)
        for row, generator in self._drawing:
            self._uniforms[row] = generator.random()
        uniform_B1 = torch.tensor(self._uniforms, dtype=torch.float64, device=self._device)[:, None]
        chosen_B = where_passed(self.kept(logits_BV), uniform_B1)
        if len(self._drawing) < len(self._uniforms):
            chosen_B = torch.where(self._greedy_B, logits_BV.argmax(-1), chosen_B)
        return chosen_B

    def kept(self, logits_BV: Tensor) -> Tensor:
        """What is drawn from: probabilities, zero for what the rules leave out; they need not add up to 1.

        Columns are tokens, however the rules are applied: sorted columns would make what a number draws depend on
        whether a batch mate needs them sorted.
        Returns  (B, V) float32
        """
        probs_BV = (logits_BV if self._plain else logits_BV / self._temperature_B1).softmax(-1)
        if self._has_top:
            probs_BV = torch.where(self._top_B1, self._likeliest(probs_BV), probs_BV)
        if self._has_min_p:
            probs_BV = probs_BV.masked_fill(probs_BV < self._min_p_B1 * probs_BV.amax(-1, keepdim=True), 0.0)
        return probs_BV

    def _likeliest(self, probs_BV: Tensor) -> Tensor:
        """top_k, then top_p of what is left, from as few candidates as will do: sorting a large vocabulary is slow."""
        num_tokens = probs_BV.shape[-1]
        num_candidates = min(self._most, num_tokens)
        probs_BC, order_BC = probs_BV.topk(num_candidates, dim=-1)
        mass_BC = probs_BC.cumsum(-1, dtype=torch.float64)
        if num_candidates < num_tokens and bool((self._open_B1 & (mass_BC[:, -1:] < self._top_p_B1)).any()):
            probs_BC, order_BC = probs_BV.sort(dim=-1, descending=True)
            mass_BC = probs_BC.cumsum(-1, dtype=torch.float64)
        rank_C = torch.arange(probs_BC.shape[-1], device=self._device)
        last_B1 = self._top_k_B1.clamp(max=probs_BC.shape[-1]) - 1
        whole_B1 = torch.where(self._open_B1, 1.0, mass_BC.gather(-1, last_B1))
        # a token is left out where those before it are enough already; the likeliest always stays
        out_BC = (mass_BC - probs_BC >= self._top_p_B1 * whole_B1) & (rank_C > 0) & (self._top_p_B1 < 1)
        out_BC |= rank_C > last_B1
        return torch.zeros_like(probs_BV).scatter_(-1, order_BC, probs_BC.masked_fill(out_BC, 0.0))


def where_passed(weights_BV: Tensor, share_B1: Tensor) -> Tensor:
    """The first token where the running sum of a row's weights passes that share of their sum.

    weights_BV  (B, V) >= 0, float32; share_B1 (B, 1) float64, 0 <= share < 1
    Returns     (B,) int64: tokens whose weight is above zero
    """
    num_whole = weights_BV.shape[1] // _BLOCK * _BLOCK
    parts = [weights_BV[:, :num_whole].view(len(weights_BV), -1, _BLOCK), weights_BV[:, None, num_whole:]]
    passed_BN = torch.cat([part.sum(-1, dtype=torch.float64) for part in parts], dim=-1).cumsum(-1)
    target_B1 = share_B1 * passed_BN[:, -1:]
    # the share is below 1, so the target is below the sum, and the first block that passes it has weight
    block_B1 = torch.searchsorted(passed_BN, target_B1, right=True)
    before_B1 = torch.nn.functional.pad(passed_BN, (1, 0)).gather(-1, block_B1)
    token_BS = block_B1 * _BLOCK + torch.arange(_BLOCK, device=weights_BV.device)
    inside_BS = token_BS < weights_BV.shape[1]
    weights_BS = weights_BV.gather(-1, token_BS.clamp(max=weights_BV.shape[1] - 1)) * inside_BS
    place_B1 = torch.searchsorted(before_B1 + weights_BS.cumsum(-1, dtype=torch.float64), target_B1, right=True)
    # a block's sum and its running sum may differ by a rounding: then it is the block's last token with weight
    last_B1 = torch.where(weights_BS > 0, token_BS, -1).amax(-1, keepdim=True)
    return (block_B1 * _BLOCK + place_B1).minimum(last_B1)[:, 0]
