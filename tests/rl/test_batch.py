"""What a recipe's keys under `rl` change of advantages and of the loss, by closed forms."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from ossia.config.rl import RlConfig
from ossia.rl.batch import Group, PolicyLoss, Scored, make_batch, rule_of, score_group
from ossia.rl.env import Task
from ossia.rl.rollout import Asked, Trajectory
from tests.rl.rewards import Parity

SAMPLER = (-0.5, -1.0, -0.2, -2.0, -0.7)  # ln p of five sampled tokens, in two answers
TRAINER = (-0.4, -0.3, -0.9, -1.9, -0.6)
ANSWERS = ((0, 2), (2, 5))


def episodes(rewards: tuple[float, ...] = (1.0, 0.0), finish: str = "terminated") -> list[Trajectory]:
    """Two answers to one task, of two and three tokens."""
    asked = Asked(Task({"messages": []}, {}, "t"), Parity(), "env", 0, 0, (1, 2, 3))
    found = []
    for sample, ((begin, end), reward) in enumerate(zip(ANSWERS, rewards, strict=True)):
        ids, sampled = [1, 2, 3, *range(10, 10 + end - begin)], [False] * 3 + [True] * (end - begin)
        logprobs = list(SAMPLER[begin:end])
        found.append(Trajectory(asked, sample, 0, ids, sampled, logprobs, reward=reward, finish=finish))
    return found


def config(**keys: Any) -> RlConfig:
    return RlConfig(**{"max_new": 8, "loss": "grpo", "spread": False, **keys})


def gradient(reference: tuple[float, ...] | None = None, **keys: Any) -> Tensor:
    """Of the loss by each token's ln p, where the advantages are 0.5 and -0.5."""
    rl = config(**keys)
    rule = rule_of(rl)
    batch = make_batch([score_group(episodes(), rl, rule)], rl, rule, 64)
    (pack,), (piece,) = batch.packs, batch.pieces
    assert piece.sampler_R.tolist() == pytest.approx(SAMPLER)
    logp = torch.tensor(TRAINER, requires_grad=True)
    loss = PolicyLoss(batch, rl, rule, None if reference is None else [torch.tensor(reference)])
    loss(logp, 0, torch.nonzero(pack.weights)[:, 0]).backward()
    assert logp.grad is not None
    return logp.grad


PLAIN = torch.tensor([-0.125, -0.125, 0.5 / 6, 0.5 / 6, 0.5 / 6])  # less weight times advantage
RATIO = torch.tensor(TRAINER).sub(torch.tensor(SAMPLER)).exp()


def test_a_sampler_that_differs_is_corrected_as_the_recipe_says() -> None:
    assert gradient(mismatch="none") == pytest.approx(PLAIN, abs=1e-6)
    assert gradient(mismatch="token", mismatch_cap=1.5) == pytest.approx(PLAIN * RATIO.clamp(max=1.5), abs=1e-6)
    assert float(RATIO[1]) > 1.5
    of_both = torch.tensor([float(RATIO[:2].prod())] * 2 + [float(RATIO[2:].prod())] * 3)
    assert gradient(mismatch="sequence", mismatch_cap=4.0) == pytest.approx(PLAIN * of_both, abs=1e-6)
    masked = PLAIN * of_both * torch.tensor([0.0, 0, 1, 1, 1])
    assert gradient(mismatch="sequence", mismatch_cap=2.0) == pytest.approx(masked, abs=1e-6)


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_the_divergence_from_the_reference_is_added_by_its_weight_and_estimator(estimator: str) -> None:
    reference = tuple(x + 0.3 for x in TRAINER)
    weight = torch.tensor([0.25, 0.25, 1 / 6, 1 / 6, 1 / 6])
    slope = {"k1": 1.0, "k2": -0.3, "k3": 1 - float(torch.tensor(0.3).exp())}[estimator]
    found = gradient(reference, mismatch="none", kl=0.1, kl_estimator=estimator)
    assert found == pytest.approx(PLAIN + 0.1 * slope * weight, abs=1e-6)


def test_bounds_and_spread_are_the_losss_own_unless_the_recipe_says() -> None:
    rule = rule_of(RlConfig(loss="dapo"))
    assert (rule.low, rule.high, rule.divide_by_spread) == (0.2, 0.28, True)
    rule = rule_of(RlConfig(loss="dapo", clip_low=0.1, clip_high=0.5, spread=False))
    assert (rule.low, rule.high, rule.divide_by_spread, rule.source) == (0.1, 0.5, False, "DAPO, arXiv:2503.14476")


def test_an_answer_near_its_longest_counts_less_where_the_recipe_says() -> None:
    rl = config(max_new=4, overlong=2)
    first, second = score_group(episodes((1.0, 1.0)), rl, rule_of(rl)).samples
    assert (first.reward, second.reward) == (1.0, 0.5)  # two and three tokens of four
    assert (first.advantage, second.advantage) == (0.25, -0.25)
    assert not score_group(episodes((1.0, 1.0)), config(max_new=4), rule_of(rl)).has_signal


@pytest.mark.parametrize("finish", ["length", "truncated"])
def test_answers_that_were_cut_off_are_left_out_where_the_recipe_says(finish: str) -> None:
    group = Group([Scored(one, 0.0, 1.0) for one in episodes(finish=finish)])
    for masks in (True, False):
        rl = config(mask_truncated=masks)
        assert bool(make_batch([group], rl, rule_of(rl), 64).packs) is not masks
