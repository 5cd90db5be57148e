"""Policy losses against their closed forms, and against the same losses in another trainer's own code."""

from __future__ import annotations

import math
from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from ossia.ops.policy import RULES, clipped_share, kl_loss, mismatch_weights, policy_loss, token_weights

LENGTHS = (3, 5, 1, 4)
SEQUENCE = torch.repeat_interleave(torch.arange(4), torch.tensor(LENGTHS))
LONGEST = 6


def batch(spread: float = 0.5) -> tuple[Tensor, Tensor, Tensor]:
    """logp, old and advantages of four sequences, in a row."""
    generator = torch.Generator().manual_seed(0)
    old = -3 * torch.rand(len(SEQUENCE), generator=generator)
    logp = old + spread * torch.randn(len(SEQUENCE), generator=generator)
    advantages = torch.tensor([1.3, -0.7, 0.4, -1.0])
    return logp.requires_grad_(), old, advantages[SEQUENCE]


def weights(norm: str) -> Tensor:
    return torch.tensor(token_weights(LENGTHS, norm, LONGEST))[SEQUENCE]


@pytest.mark.parametrize("name", RULES)
def test_on_policy_every_loss_has_the_policy_gradient(name: str) -> None:
    logp, _, advantages = batch()
    rule = RULES[name]
    policy_loss(logp, logp.detach(), advantages, weights(rule.norm), SEQUENCE, rule).backward()
    expected = -weights(rule.norm) * advantages
    if rule.ratio == "sequence":  # a token moves its sequence's mean: advantage and weight are the sequence's anyway
        assert rule.norm == "sequences"
    assert logp.grad == pytest.approx(expected, abs=1e-7)


def test_weights_of_a_step_add_up_to_one_or_leave_length_to_the_longest() -> None:
    assert float(weights("tokens").sum()) == pytest.approx(1)
    assert float(weights("sequences").sum()) == pytest.approx(1)
    assert float(weights("length").sum()) == pytest.approx(sum(LENGTHS) / (4 * LONGEST))
    by_sequence = torch.zeros(4).index_add(0, SEQUENCE, weights("sequences"))
    assert by_sequence == pytest.approx(torch.full((4,), 0.25))


def test_clip_higher_lets_a_good_token_rise_further_and_stops_what_is_past_the_bound() -> None:
    old, sequence, one = torch.zeros(4), torch.arange(4), torch.ones(4)
    ratios = torch.tensor([1.25, 1.3, 0.79, 0.75])
    logp = ratios.log().requires_grad_()
    advantages = torch.tensor([1.0, 1.0, -1.0, 1.0])
    policy_loss(logp, old, advantages, one, sequence, RULES["dapo"]).backward()
    assert logp.grad == pytest.approx(torch.tensor([-1.25, 0.0, 0.0, -0.75]), abs=1e-6)
    assert clipped_share(logp, old, advantages, sequence, RULES["dapo"]) == 0.5
    logp.grad = None
    policy_loss(logp, old, advantages, one, sequence, RULES["grpo"]).backward()
    assert logp.grad[0] == 0  # 1.25 is past GRPO's 1.2


def test_a_cap_shrinks_the_gradient_and_never_takes_it_away() -> None:
    logp = torch.tensor([math.log(9.0), math.log(0.1)], requires_grad=True)
    advantages = torch.tensor([2.0, -1.0])
    policy_loss(logp, torch.zeros(2), advantages, torch.ones(2), torch.arange(2), RULES["cispo"]).backward()
    assert logp.grad == pytest.approx(torch.tensor([-2.0 * 5, 0.1]), abs=1e-6)


def test_the_sequence_ratio_is_the_geometric_mean_and_clips_a_sequence_as_one() -> None:
    old, sequence = torch.zeros(4), torch.tensor([0, 0, 1, 1])
    logp = torch.tensor([0.5, -0.4998, 0.5, -0.4], requires_grad=True)  # means 1e-4 and 0.05
    policy_loss(logp, old, torch.ones(4), torch.full((4,), 0.25), sequence, RULES["gspo"]).backward()
    assert logp.grad == pytest.approx(torch.tensor([-0.25 * math.exp(1e-4)] * 2 + [0.0] * 2), abs=1e-6)


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_kl_estimators_agree_with_the_divergence_they_estimate(estimator: str) -> None:
    p, q = torch.tensor([[0.5, 0.3, 0.2], [0.45, 0.33, 0.22]], dtype=torch.float64)
    exact = float((p * (p / q).log()).sum())
    found = float(kl_loss(p.log(), q.log(), p, estimator))  # each outcome weighs as often as it is drawn
    assert found == pytest.approx(exact, rel=1e-5 if estimator != "k2" else 0.1)


def test_mismatch_weights_truncate_tokens_or_leave_out_whole_sequences() -> None:
    old, sampler = torch.tensor([0.0, 0.0, 0.0, 0.0]), torch.tensor([0.1, -2.0, 0.2, 0.1])
    sequence = torch.tensor([0, 0, 1, 1])
    by_token = mismatch_weights(old, sampler, sequence, "token", 3.0)
    assert by_token == pytest.approx(torch.tensor([math.exp(-0.1), 3.0, math.exp(-0.2), math.exp(-0.1)]))
    by_sequence = mismatch_weights(old, sampler, sequence, "sequence", 3.0)
    assert by_sequence == pytest.approx(torch.tensor([0.0, 0.0, math.exp(-0.3), math.exp(-0.3)]))
    assert mismatch_weights(old, sampler, sequence, "none", 3.0) is None


@pytest.mark.parametrize("name", RULES)
def test_micro_batches_add_up_to_the_whole(name: str) -> None:
    logp, old, advantages = batch()
    rule = RULES[name]
    whole = policy_loss(logp, old, advantages, weights(rule.norm), SEQUENCE, rule)
    parts = torch.zeros(())
    for sequences in ((0, 2), (1, 3)):
        mine = torch.isin(SEQUENCE, torch.tensor(sequences))
        parts += policy_loss(
            logp[mine], old[mine], advantages[mine], weights(rule.norm)[mine], SEQUENCE[mine], rule
        )  # fmt: skip
    assert float(parts.detach()) == pytest.approx(float(whole.detach()), abs=1e-6)


def trl_loss(name: str, logp: Tensor, old: Tensor, advantages: Tensor, kl: tuple[float, Tensor] | None) -> Tensor:
    """The same loss by TRL's own `GRPOTrainer._compute_loss`, given these log-probabilities."""
    from trl.trainer.grpo_trainer import GRPOTrainer

    rule = RULES[name]

    def padded(x: Tensor) -> Tensor:
        return torch.nn.utils.rnn.pad_sequence(list(x.split(LENGTHS)), batch_first=True)

    mask = padded(torch.ones(len(SEQUENCE)))
    loss_type = {"gspo": "grpo", "bnpo": "bnpo"}.get(name, name)
    accelerator = SimpleNamespace(
        num_processes=1,
        device=torch.device("cpu"),
        gather=lambda x: x,
        gather_for_metrics=lambda x: x,
        reduce=lambda x, reduction="sum": x,
        sync_gradients=True,
    )
    beta = 0.0 if kl is None else kl[0]
    trainer = SimpleNamespace(
        _get_per_token_logps_and_entropies=lambda *_, **__: (padded(logp), torch.zeros_like(mask), None),
        aux_loss_enabled=False,
        top_entropy_quantile=1.0,
        off_policy_mask_threshold=None,
        importance_sampling_level=rule.ratio,
        beta=beta,
        args=SimpleNamespace(
            delta=None, use_bias_correction_kl=False, gradient_accumulation_steps=1, steps_per_generation=1
        ),
        loss_type=loss_type,
        epsilon_low=rule.low,
        epsilon_high=1 + rule.high if name == "cispo" else rule.high,  # there the cap itself
        use_vllm=False,
        model=SimpleNamespace(training=True),
        current_gradient_accumulation_steps=1,
        max_completion_length=LONGEST,
        accelerator=accelerator,
        _entropy_bonus_enabled=False,
        _metrics={"train": defaultdict(list), "eval": defaultdict(list)},
    )
    inputs = {
        "prompt_ids": torch.zeros(4, 1, dtype=torch.long),
        "prompt_mask": torch.ones(4, 1),
        "completion_ids": torch.zeros(mask.shape, dtype=torch.long),
        "completion_mask": mask,
        "advantages": torch.stack([part[0] for part in advantages.split(LENGTHS)]),
        "old_per_token_logps": padded(old),
        "num_items_in_batch": mask.sum(),
    }
    if kl is not None:
        inputs["ref_per_token_logps"] = padded(kl[1])
    return GRPOTrainer._compute_loss(trainer, None, inputs)


@pytest.mark.parametrize("beta", [0.0, 0.1])
@pytest.mark.parametrize("name", RULES)
def test_loss_and_gradient_equal_those_of_trl(name: str, beta: float) -> None:
    logp, old, advantages = batch(0.3 if name != "gspo" else 2e-3)
    rule, weight = RULES[name], weights(RULES[name].norm)
    reference = old - 0.2
    mine = policy_loss(logp, old, advantages, weight, SEQUENCE, rule)
    if beta:
        mine = mine + beta * kl_loss(logp, reference, weight, "k3")
    (mine_grad,) = torch.autograd.grad(mine, logp)
    theirs = trl_loss(name, logp, old, advantages, (beta, reference) if beta else None)
    (their_grad,) = torch.autograd.grad(theirs, logp)
    assert float(mine.detach()) == pytest.approx(float(theirs.detach()), abs=1e-6)
    assert mine_grad == pytest.approx(their_grad, abs=1e-6)
    assert 0 < clipped_share(logp, old, advantages, SEQUENCE, rule) < 1 or name == "cispo"
