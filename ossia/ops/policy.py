"""Policy-gradient losses on sampled tokens: GRPO and its kin as pure functions of log-probabilities.

They differ in four places and share the rest: what the probability ratio is of (a token, or a whole sequence), how it
is bounded (PPO's clip, or a detached cap), how much a token weighs (`token_weights`), and how advantages are scaled
(`ossia/rl`). Each is a sum in which a token's weight already holds the step's one denominator, so micro-batches add up.
Letters: S sequences, R sampled tokens of all of them in a row.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

import torch
from torch import Tensor

Norm = Literal["tokens", "sequences", "length"]
KlEstimator = Literal["k1", "k2", "k3"]
Mismatch = Literal["none", "token", "sequence"]


@dataclass(frozen=True, slots=True)
class PolicyRule:
    """One published loss.

    ratio  of the policy to the one that sampled: each token's own, or the geometric mean over its sequence
    bound  clip: min(r A, clip(r, 1 - low, 1 + high) A). cap: min(r, 1 + high), detached, times A ln p
    norm   what one denominator counts, see `token_weights`
    """

    ratio: Literal["token", "sequence"]
    bound: Literal["clip", "cap"]
    low: float
    high: float
    norm: Norm
    divide_by_spread: bool
    source: str


RULES: Mapping[str, PolicyRule] = MappingProxyType(
    {
        "grpo": PolicyRule("token", "clip", 0.2, 0.2, "sequences", True, "DeepSeekMath, arXiv:2402.03300"),
        "bnpo": PolicyRule("token", "clip", 0.2, 0.2, "tokens", True, "BNPO, arXiv:2506.02864"),
        "dr_grpo": PolicyRule("token", "clip", 0.2, 0.2, "length", False, "Dr. GRPO, arXiv:2503.20783"),
        "dapo": PolicyRule("token", "clip", 0.2, 0.28, "tokens", True, "DAPO, arXiv:2503.14476"),
        "gspo": PolicyRule("sequence", "clip", 3e-4, 4e-4, "sequences", True, "GSPO, arXiv:2507.18071"),
        "cispo": PolicyRule("token", "cap", 1.0, 4.0, "tokens", True, "MiniMax-M1, arXiv:2506.13585"),
    }
)


def token_weights(lengths_S: Sequence[int], norm: Norm, max_length: int) -> list[float]:
    """What each token of each sequence weighs, so that the step's loss is a plain sum.

    lengths_S   sampled tokens of every sequence of the step (all micro-batches, all ranks); 0: none of it counts
    norm        tokens: all weigh the same. sequences: all sequences do. length: all tokens do, against `max_length`
                for every sequence, so that long answers aren't favoured
    Returns     S weights, each for one token of that sequence
    """
    num_sequences = len(lengths_S)
    if norm == "tokens":
        return [1.0 / max(1, sum(lengths_S))] * num_sequences
    if norm == "sequences":
        return [1.0 / (num_sequences * max(1, length)) for length in lengths_S]
    return [1.0 / (num_sequences * max_length)] * num_sequences


def policy_loss(
    logp_R: Tensor,
    old_R: Tensor,
    advantage_R: Tensor,
    weight_R: Tensor,
    sequence_R: Tensor,
    rule: PolicyRule,
    *,
    correction_R: Tensor | None = None,
) -> Tensor:
    """A micro-batch's part of the loss, to be minimised.

    logp_R        (R,) float32: ln p of each sampled token now; the only one with a gradient
    old_R         (R,) float32: the same when the batch was sampled. On policy (`logp_R.detach()`) all ratios are 1
    advantage_R   (R,) float32, each token's sequence's
    weight_R      (R,) float32, from `token_weights`
    sequence_R    (R,) int64: which sequence of the micro-batch a token is of; a sequence is whole in one micro-batch
    correction_R  (R,) float32: weights against a sampler that differs from the trainer, from `mismatch_weights`
    Returns       () float32
    Source        `rule.source`; the clip: PPO, arXiv:1707.06347
    """
    ratio_R = (_mean_by_sequence(logp_R - old_R, sequence_R) if rule.ratio == "sequence" else logp_R - old_R).exp()
    if rule.bound == "cap":
        gain_R = ratio_R.detach().clamp(max=1 + rule.high) * advantage_R * logp_R
    else:
        clipped_R = ratio_R.clamp(1 - rule.low, 1 + rule.high)
        gain_R = torch.minimum(ratio_R * advantage_R, clipped_R * advantage_R)
    if correction_R is not None:
        gain_R = gain_R * correction_R
    return -(weight_R * gain_R).sum()


def kl_loss(logp_R: Tensor, reference_R: Tensor, weight_R: Tensor, estimator: KlEstimator) -> Tensor:
    """The divergence from a reference policy, estimated from the sampled tokens.

    reference_R  (R,) float32: ln p under the reference, here the model without its adapter
    estimator    with d = ln p_reference - ln p: k1 is -d, k2 is d^2 / 2, k3 is exp(d) - d - 1, unbiased and never
                 negative
    Returns      () float32, nats, weighted as the loss is
    Source       Schulman 2020, "Approximating KL divergence"
    """
    d_R = reference_R - logp_R
    values_R = -d_R if estimator == "k1" else 0.5 * d_R.square() if estimator == "k2" else d_R.exp() - d_R - 1
    return (weight_R * values_R).sum()


@torch.no_grad()
def divergence(trainer_R: Tensor, sampler_R: Tensor) -> Tensor:
    """How far a sampler is from the trainer at each token that it sampled; the mean estimates their divergence, nats.

    trainer_R, sampler_R  (R,): ln p of the sampled tokens
    Returns               (R,) float64: exp(d) - d - 1 with d = ln p_trainer - ln p_sampler, never below 0
    Source                the k3 estimator, Schulman 2020, "Approximating KL divergence"
    """
    d_R = (trainer_R - sampler_R).double()
    return d_R.exp() - d_R - 1


@torch.no_grad()
def mismatch_weights(old_R: Tensor, sampler_R: Tensor, sequence_R: Tensor, mode: Mismatch, cap: float) -> Tensor | None:
    """Truncated importance weights for tokens that were sampled with other numbers than the trainer's.

    old_R      (R,) float32: the trainer's ln p of the weights that sampled; sampler_R: what the sampler said
    mode       token: min(p / p_sampler, cap). sequence: the same of the sequence's product, but 0 above the cap, so
               that a sequence which went astray teaches nothing. none: no correction
    Returns    (R,) float32 or None
    Source     truncated importance sampling, Yao et al. 2025, "Your efficient RL framework secretly brings you
               off-policy RL training"; sequence masking as in TRL 1.16
    """
    if mode == "none":
        return None
    if mode == "token":
        return (old_R - sampler_R).exp().clamp(max=cap)
    ratio_R = _sum_by_sequence(old_R - sampler_R, sequence_R).exp()
    return torch.where(ratio_R > cap, 0.0, ratio_R)


@torch.no_grad()
def clipped_share(logp_R: Tensor, old_R: Tensor, advantage_R: Tensor, sequence_R: Tensor, rule: PolicyRule) -> float:
    """The share of tokens whose gradient the bound takes away (clip) or shrinks (cap)."""
    ratio_R = (_mean_by_sequence(logp_R - old_R, sequence_R) if rule.ratio == "sequence" else logp_R - old_R).exp()
    above_R = (ratio_R > 1 + rule.high) & (advantage_R > 0)
    below_R = (ratio_R < 1 - rule.low) & (advantage_R < 0)
    return float(((ratio_R > 1 + rule.high) if rule.bound == "cap" else above_R | below_R).float().mean())


def _sum_by_sequence(x_R: Tensor, sequence_R: Tensor) -> Tensor:
    """Every token gets its sequence's sum."""
    sums_S = torch.zeros(int(sequence_R.max()) + 1, dtype=x_R.dtype, device=x_R.device)
    return sums_S.index_add(0, sequence_R, x_R)[sequence_R]


def _mean_by_sequence(x_R: Tensor, sequence_R: Tensor) -> Tensor:
    """Every token gets its sequence's mean."""
    return _sum_by_sequence(x_R, sequence_R) / _sum_by_sequence(torch.ones_like(x_R), sequence_R)
