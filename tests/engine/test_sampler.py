"""The sampling rules against their closed forms."""

from __future__ import annotations

import random

import pytest
import torch
from torch import Tensor

from ossia.engine.sampler import BatchSampler, Sampling
from ossia.errors import UserError

CPU = torch.device("cpu")
P = torch.tensor([0.05, 0.4, 0.1, 0.25, 0.2])  # likeliest first: 1, 3, 4, 2, 0


def kept(rules: Sampling, probs_V: Tensor = P) -> list[float]:
    """The distribution that is drawn from, by token."""
    probs = BatchSampler([rules], [random.Random(0)], CPU).kept(probs_V.log()[None])[0]
    return (probs / probs.sum()).tolist()


@pytest.mark.parametrize(
    ("rules", "expected"),
    [
        (Sampling(), [0.05, 0.4, 0.1, 0.25, 0.2]),
        (Sampling(top_k=2), [0, 8 / 13, 0, 5 / 13, 0]),
        (Sampling(top_k=1), [0, 1, 0, 0, 0]),
        (Sampling(top_k=99), [0.05, 0.4, 0.1, 0.25, 0.2]),
        (Sampling(top_p=0.41), [0, 8 / 13, 0, 5 / 13, 0]),
        (Sampling(top_p=0.39), [0, 1, 0, 0, 0]),
        (Sampling(top_p=0.0), [0, 1, 0, 0, 0]),
        (Sampling(top_p=0.8), [0, 8 / 17, 0, 5 / 17, 4 / 17]),
        (Sampling(min_p=0.4), [0, 8 / 17, 0, 5 / 17, 4 / 17]),
        (Sampling(min_p=1.0), [0, 1, 0, 0, 0]),
        (Sampling(top_k=3, top_p=0.5), [0, 8 / 13, 0, 5 / 13, 0]),  # 0.4 of 0.85 isn't half yet
        (Sampling(top_k=4, min_p=0.3), [0, 8 / 17, 0, 5 / 17, 4 / 17]),
        (Sampling(temperature=0.5), [x / 0.275 for x in (0.0025, 0.16, 0.01, 0.0625, 0.04)]),
    ],
)
def test_each_rule_keeps_what_its_definition_says(rules: Sampling, expected: list[float]) -> None:
    assert kept(rules) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("spread", [0.1, 10.0])
@pytest.mark.parametrize("rules", [Sampling(top_p=0.9), Sampling(top_k=1500, top_p=0.9), Sampling(top_k=1200)])
def test_a_large_vocabulary_is_cut_where_its_full_sort_says(rules: Sampling, spread: float) -> None:
    """Flat logits need more than the first candidates, peaked ones fewer."""
    probs = (torch.randn(5000, generator=torch.Generator().manual_seed(0)) * spread).double().softmax(-1)
    in_order, order = probs.sort(descending=True)
    in_order[rules.top_k or 5000 :] = 0
    before = in_order.cumsum(0) - in_order
    num_kept = int(((before < rules.top_p * in_order.sum()) & (in_order > 0)).sum())
    found = torch.tensor(kept(rules, probs.float()))
    assert num_kept - 1 <= int((found > 0).sum()) <= num_kept + 1  # float32 against float64 at the edge
    assert bool((found[order[: num_kept - 1]] > 0).all())


@pytest.mark.parametrize("rules", [Sampling(), Sampling(0.7, top_p=0.9), Sampling(top_k=3), Sampling(min_p=0.3)])
def test_tokens_come_as_often_as_the_kept_distribution_says(rules: Sampling) -> None:
    draws = 4000
    sampler = BatchSampler([rules] * draws, [random.Random(seed) for seed in range(draws)], CPU)
    counts = sampler.draw(P.log().expand(draws, -1)).bincount(minlength=len(P))
    for count, probability in zip(counts.tolist(), kept(rules), strict=True):
        spread = (draws * probability * (1 - probability)) ** 0.5
        assert abs(count - draws * probability) <= 4.5 * spread


def test_a_batch_of_different_rules_draws_for_each_what_it_draws_alone() -> None:
    rules = [Sampling(), Sampling(0), Sampling(top_k=2), Sampling(2.0, top_p=0.6), Sampling(min_p=0.5), Sampling(0)]
    logits = 4 * torch.randn(len(rules), 3000, generator=torch.Generator().manual_seed(0))
    logits[0] = 0.0  # any token, also one that no batch mate looks at
    together = [random.Random(seed) for seed in range(len(rules))]
    alone = [random.Random(seed) for seed in range(len(rules))]
    sampler = BatchSampler(rules, together, CPU)
    singles = [BatchSampler([rule], [own], CPU) for rule, own in zip(rules, alone, strict=True)]
    for _ in range(30):
        expected = [int(one.draw(logits[row : row + 1])) for row, one in enumerate(singles)]
        assert sampler.draw(logits).tolist() == expected


def test_penalties_are_taken_off_the_logits_of_what_was_sampled_and_of_nothing_else() -> None:
    logits = torch.tensor([[3.0, 2.5, 1.0, -torch.inf]]).expand(3, -1)
    rules = [Sampling(0, frequency_penalty=1.0), Sampling(0), Sampling(0, presence_penalty=0.7, frequency_penalty=-0.1)]
    sampled: list[list[int]] = [[0], [0, 0, 0, 0], []]
    sampler = BatchSampler(rules, [random.Random(0)] * 3, CPU, sampled)
    for _ in range(12):
        expected = []
        for row, rule in enumerate(rules):
            counts = [sampled[row].count(token) for token in range(4)]
            off = [c * rule.frequency_penalty + (c > 0) * rule.presence_penalty for c in counts]
            expected.append(int((logits[row] - torch.tensor(off)).argmax()))
            sampled[row].append(expected[-1])
        assert sampler.draw(logits).tolist() == expected
    assert len(set(sampled[0])) == 3
    assert set(sampled[1]) == {0}
    assert set(sampled[2]) == {0, 1}
    assert logits[0].tolist() == [3.0, 2.5, 1.0, -torch.inf], "the caller's are as they were"


def test_temperature_zero_takes_the_likeliest_and_of_equals_the_first() -> None:
    sampler = BatchSampler([Sampling(0)] * 2, [random.Random(0)] * 2, CPU)
    assert sampler.draw(torch.tensor([[1.0, 3.0, 3.0], [2.0, 0.0, 1.0]])).tolist() == [1, 0]


def test_the_same_seed_draws_the_same_and_another_seed_others() -> None:
    logits = torch.randn(1, 1000, generator=torch.Generator().manual_seed(0))

    def drawn(seed: int | None) -> list[int]:
        rules = Sampling(seed=seed)
        sampler = BatchSampler([rules], [rules.generator()], CPU)
        return [int(sampler.draw(logits)) for _ in range(20)]

    assert drawn(3) == drawn(3) != drawn(4)
    assert drawn(None) != drawn(None)


def test_a_token_of_probability_zero_is_never_drawn() -> None:
    logits = torch.full((1, 1000), -torch.inf)
    logits[0, [17, 500]] = torch.tensor([0.0, -30.0])

    class Edge(random.Random):
        def random(self) -> float:
            return self.value

    for value, expected in ((0.0, 17), (1 - 2**-53, 500)):
        edge = Edge()
        edge.value = value
        for rules in (Sampling(), Sampling(top_k=900)):
            assert BatchSampler([rules], [edge], CPU).draw(logits).tolist() == [expected]


@pytest.mark.parametrize(
    "wrong",
    [
        {"temperature": -1},
        {"temperature": float("nan")},
        {"top_p": 1.5},
        {"top_k": -1},
        {"min_p": -0.1},
        {"frequency_penalty": float("inf")},
        {"presence_penalty": float("nan")},
    ],
)
def test_a_value_out_of_range_is_refused_by_name(wrong: dict[str, float]) -> None:
    with pytest.raises(UserError, match=f"^{next(iter(wrong))}: "):
        Sampling(**wrong)
