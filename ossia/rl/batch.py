"""Trajectories -> packs, and the policy loss of their sampled tokens under one denominator for the whole step.

A group whose samples all got the same reward has no advantage and so no gradient: its samples are left out of the packs
(unless the divergence from a reference counts, which has one) but not out of the denominator, so that leaving them out
changes nothing. Of samples cut off by their length, where these are masked, no token counts in either.
Letters: S sequences of a pack, R sampled tokens of a pack in a row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import chain, groupby

import numpy as np
import torch
from torch import Tensor

from ossia.config.rl import RlConfig
from ossia.data.pack import Pack
from ossia.data.sample import Sample
from ossia.ops.policy import (
    RULES,
    PolicyRule,
    clipped_share,
    divergence,
    kl_loss,
    mismatch_weights,
    policy_loss,
    token_weights,
)
from ossia.rl.advantage import group_advantages, overlong_penalty
from ossia.rl.rollout import Trajectory


@dataclass(frozen=True, slots=True)
class Scored:
    """A trajectory with what it teaches: the reward it counts with, and its advantage (None: it has none)."""

    trajectory: Trajectory
    reward: float | None
    advantage: float | None


@dataclass(slots=True)
class Group:
    """A task's samples, scored."""

    samples: list[Scored]

    @property
    def has_signal(self) -> bool:
        """Whether any sample is better than another."""
        return any(one.advantage for one in self.samples)


def rule_of(config: RlConfig) -> PolicyRule:
    """The named loss with the recipe's own bounds."""
    rule = RULES[config.loss]
    return replace(
        rule,
        low=rule.low if config.clip_low is None else config.clip_low,
        high=rule.high if config.clip_high is None else config.clip_high,
        divide_by_spread=rule.divide_by_spread if config.spread is None else config.spread,
    )


def score_group(group: Sequence[Trajectory], config: RlConfig, rule: PolicyRule) -> Group:
    """Rewards, less what overlong answers cost, and advantages of one task's samples."""
    rewards = [
        None if t.reward is None else t.reward + overlong_penalty(t.num_sampled, config.max_new, config.overlong)
        for t in group
    ]
    advantages = group_advantages(rewards, divide_by_spread=rule.divide_by_spread)
    return Group([Scored(*parts) for parts in zip(group, rewards, advantages, strict=True)])


@dataclass(frozen=True, slots=True)
class Piece:
    """What the loss needs of one pack, in the order of its sampled tokens.

    sampler_R    float32 ln p when sampled; advantage_R float32; sequence_R int64, 0 ... S - 1
    """

    sampler_R: Tensor
    advantage_R: Tensor
    sequence_R: Tensor

    def to(self, device: torch.device) -> Piece:
        """The same on another device."""
        return Piece(self.sampler_R.to(device), self.advantage_R.to(device), self.sequence_R.to(device))


@dataclass(frozen=True, slots=True)
class PolicyBatch:
    """A step's packs, and what the loss needs of each beside its weights."""

    packs: list[Pack]
    pieces: list[Piece]


def make_batch(groups: Sequence[Group], config: RlConfig, rule: PolicyRule, tokens_per_pack: int) -> PolicyBatch:
    """Pack the samples that have a gradient, weighted over all that were judged."""
    judged = [one for group in groups for one in group.samples if one.advantage is not None]
    lengths = [0 if _masked(one, config) else one.trajectory.num_sampled for one in judged]
    weights = token_weights(lengths, rule.norm, config.max_new)
    used = [
        (one, weight)
        for one, weight, length in zip(judged, weights, lengths, strict=True)
        if length and (one.advantage != 0 or config.kl)
    ]
    packs, pieces = [], []
    for number, mine in enumerate(_fill(used, tokens_per_pack)):
        packs.append(_pack(mine, number))
        pieces.append(_piece([one for one, _ in mine]))
    return PolicyBatch(packs, pieces)


Weighted = tuple[Scored, float]


def _fill(used: Sequence[Weighted], tokens_per_pack: int) -> list[list[Weighted]]:
    """Samples in order, a new pack where the next one doesn't fit; a prompt counts once in a pack."""
    packs: list[list[Weighted]] = []
    room, asked = 0, None
    for one, weight in used:
        t = one.trajectory
        own = len(t.ids) - len(t.asked.ids) + 1
        size = own if t.asked is asked else len(t.ids)
        if size > room:
            packs.append([])
            room, size = tokens_per_pack, len(t.ids)
        assert size <= room, (size, tokens_per_pack)
        packs[-1].append((one, weight))
        room, asked = room - size, t.asked
    return packs


def _pack(mine: Sequence[Weighted], number: int) -> Pack:
    """One pack, in which each prompt is there once; with the experts that were chosen, where these were recorded."""
    begun, routes = [], []
    for _, group in groupby(enumerate(mine), key=lambda place: id(place[1][0].trajectory.asked)):
        members = list(group)
        samples = [_sample(one, weight, f"sample {number}.{place}") for place, (one, weight) in members]
        num_common = len(members[0][1][0].trajectory.asked.ids)
        begun.append((num_common, samples))
        recorded = [one.trajectory.routes for _, (one, _) in members if one.trajectory.routes is not None]
        assert len(recorded) in (0, len(members))
        routes += [recorded[0][: num_common - 1], *(one[num_common - 1 :] for one in recorded)] if recorded else []
    pack = Pack.sharing(begun)
    assert sum(map(len, routes)) in (0, pack.num_tokens)
    return replace(pack, routes=torch.from_numpy(np.concatenate(routes)) if routes else None)


def _masked(one: Scored, config: RlConfig) -> bool:
    return config.mask_truncated and one.trajectory.finish in ("length", "truncated")


def _sample(one: Scored, weight: float, name: str) -> Sample:
    weights = np.where(one.trajectory.sampled, np.float32(weight), np.float32(0))
    return Sample(np.array(one.trajectory.ids, np.int32), weights, None, name)


def _piece(mine: Sequence[Scored]) -> Piece:
    counts = torch.tensor([one.trajectory.num_sampled for one in mine])
    return Piece(
        torch.tensor(list(chain.from_iterable(one.trajectory.logprobs for one in mine)), dtype=torch.float32),
        torch.tensor([one.advantage for one in mine], dtype=torch.float32).repeat_interleave(counts),
        torch.arange(len(mine)).repeat_interleave(counts),
    )


class PolicyLoss:
    """The loss of a batch's packs, for `train_step`, with what was measured on the way.

    The ratio's denominator is the trainer's own logprob at the first update on a batch, so that it is exactly 1 there;
    that the sampler's differ is what `mismatch_weights` corrects and `mismatch` measures.
    """

    def __init__(
        self, batch: PolicyBatch, config: RlConfig, rule: PolicyRule, reference: Sequence[Tensor] | None
    ) -> None:
        """reference  ln p of every pack's sampled tokens under the reference policy, where `config.kl` is not 0"""
        assert (reference is not None) == bool(config.kl)
        self._batch, self._config, self._rule, self._reference = batch, config, rule, reference
        self._old: dict[int, Tensor] = {}
        self._sums: dict[str, float] = {}
        self._num_tokens = 0

    def __call__(self, logp_R: Tensor, micro: int, rows_R: Tensor) -> Tensor:
        """A pack's part of the loss; see `train.schedule.LossOfLogprobs`."""
        config, rule = self._config, self._rule
        piece = self._batch.pieces[micro].to(logp_R.device)
        weight_R = self._batch.packs[micro].weights.to(logp_R.device)[rows_R]
        assert len(piece.sampler_R) == len(rows_R) == len(logp_R)
        first = micro not in self._old
        old_R = self._old.setdefault(micro, logp_R.detach().clone())
        correction_R = mismatch_weights(old_R, piece.sampler_R, piece.sequence_R, config.mismatch, config.mismatch_cap)
        loss = policy_loss(
            logp_R, old_R, piece.advantage_R, weight_R, piece.sequence_R, rule, correction_R=correction_R
        )
        if first:
            self._measure(logp_R.detach(), piece)
        share = clipped_share(logp_R.detach(), old_R, piece.advantage_R, piece.sequence_R, rule)
        self._add(clip_share=share * len(logp_R), updates=len(logp_R))
        if self._reference is not None:
            from_reference = kl_loss(logp_R, self._reference[micro].to(logp_R.device), weight_R, config.kl_estimator)
            loss = loss + config.kl * from_reference
            if first:
                self._add(kl=float(from_reference.detach()))
        return loss

    def metrics(self) -> dict[str, float]:
        """Means over the sampled tokens.

        mismatch   nats: divergence of the sampler from the trainer, E[exp(d) - d - 1], d = ln p_trainer - ln p_sampler
        entropy    nats: -ln p of the sampled tokens, an unbiased estimate of the policy's
        clip_share of tokens whose gradient the bound took away or shrank, over all updates
        kl         nats: from the reference policy, weighted as the loss is
        """
        sums = dict(self._sums)
        updates = sums.pop("updates", 0.0)
        clip, kl = sums.pop("clip_share", 0.0), sums.pop("kl", None)
        found = {name: value / max(1, self._num_tokens) for name, value in sums.items()}
        return {**found, "clip_share": clip / max(1.0, updates), **({} if kl is None else {"kl": kl})}

    def _measure(self, logp_R: Tensor, piece: Piece) -> None:
        self._num_tokens += len(logp_R)
        self._add(mismatch=float(divergence(logp_R, piece.sampler_R).sum()), entropy=-float(logp_R.double().sum()))

    def _add(self, **values: float) -> None:
        for name, value in values.items():
            self._sums[name] = self._sums.get(name, 0.0) + value
