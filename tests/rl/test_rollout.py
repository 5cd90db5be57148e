"""Episodes of several turns: what is sampled, what the environment said, and what is trained of it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from dataclasses import replace

import numpy as np
import pytest
import torch

from ossia.config import Recipe
from ossia.data.pack import Pack
from ossia.engine import Completion, Engine
from ossia.harmony import Renderer
from ossia.model.lora import Lora, LoraSpec
from ossia.model.open import open_model
from ossia.rl.batch import Group, PolicyLoss, Scored, make_batch, rule_of, score_group
from ossia.rl.env import OneStep, Task, Turn
from ossia.rl.envs import make_env
from ossia.rl.jail import Jails
from ossia.rl.judge import Judge
from ossia.rl.rollout import Limits, Rollout, Trajectory
from ossia.rl.sampler import EngineSampler
from ossia.rl.tasks import NamedEnv, TaskStream
from ossia.train.schedule import forward_backward
from tests.rl.rewards import Parity

RecipeOf = Callable[..., Recipe]


def sample(recipe: Recipe, group: int = 8):
    model, vocab = open_model(recipe.model, dtype=recipe.dtype, weights="auto", device="cpu")
    targets = dict.fromkeys(("q_proj", "o_proj", "gate_up_proj", "down_proj"), (2, 4.0))
    lora = Lora.fresh(model.arch, LoraSpec(targets), seed=1, device=model.device)
    with torch.no_grad():
        for name, tensor in lora.trainable.tensors.items():
            if name.endswith("lora_B"):
                tensor.normal_(generator=torch.Generator().manual_seed(len(name))).mul_(0.05)
    model.use_adapter(lora)
    assert recipe.env is not None
    env = NamedEnv("env", make_env(recipe.env[0].id, {}, Jails()), 1.0)
    tasks = TaskStream([env], "train", 0, Renderer(vocab), recipe.harmony, 200)
    judge = Judge(2, 30.0)
    sampler = EngineSampler(Engine(model, vocab=vocab, max_batch=16).session())
    rollout = Rollout(sampler, vocab, judge, Limits(24, 4, 256), routes=True)
    seed_of = lambda t: t.asked.number * 1000 + t.sample * 10 + t.turns  # noqa: E731
    groups = rollout.sample(tasks.take(2), group, version=0, seed_of=seed_of)
    judge.close()
    return model, vocab, groups


@pytest.fixture
def talked(recipe_of: RecipeOf):
    return sample(recipe_of(env="Talking"))


def test_what_the_environment_said_is_in_the_context_and_never_trained(talked) -> None:
    _, vocab, groups = talked
    several = [t for group in groups for t in group if t.turns > 1]
    assert several, "no episode got past its first turn: raise max_new"
    for t in several:
        assert len(t.ids) == len(t.sampled) == len(t.routes)
        assert t.num_sampled == sum(t.sampled) == len(t.sampled_ids())
        theirs = vocab.decode([number for number, mine in zip(t.ids, t.sampled, strict=True) if not mine])
        assert "functions.f to=assistant" in theirs
        assert "result 2<|end|><|start|>assistant" in theirs
        assert "result" not in vocab.decode(t.sampled_ids())
        assert t.reward == 0.25 * t.turns


def test_answers_are_judged_while_others_are_still_sampled(recipe_of: RecipeOf) -> None:
    recipe, judged, seen = recipe_of(), threading.Event(), []

    class Telling(Parity):
        def open(self, task: Task, seed: int) -> OneStep:
            return OneStep(lambda turn: (judged.set() or 1.0, {}))

    class Patient(EngineSampler):
        def answers(self) -> Iterator[tuple[int, Completion]]:
            for number, answer in super().answers():
                if seen:  # the second one isn't given before the first one was judged
                    assert judged.wait(20)
                seen.append(number)
                yield number, answer

    model, vocab = open_model(recipe.model, dtype=recipe.dtype, weights="auto", device="cpu")
    tasks = TaskStream([NamedEnv("env", Telling(), 1.0)], "train", 0, Renderer(vocab), recipe.harmony, 200)
    judge = Judge(1, 30.0)
    rollout = Rollout(Patient(Engine(model, vocab=vocab).session()), vocab, judge, Limits(8, 1, 256), routes=False)
    (group,) = rollout.sample(tasks.take(1), 3, version=0, seed_of=lambda t: t.sample)
    judge.close()
    assert [t.reward for t in group] == [1.0] * 3


def advantaged(groups: list[list[Trajectory]]) -> list[Group]:
    """Scored by hand, so that every sample has a gradient."""
    return [Group([Scored(t, 0.0, 1.0 if i % 2 else -0.5) for i, t in enumerate(group)]) for group in groups]


def test_the_trainer_gives_every_sampled_token_the_samplers_probability(talked, recipe_of: RecipeOf) -> None:
    model, _, groups = talked
    rl = replace_rl(recipe_of(), mask_truncated=False)
    batch = make_batch(advantaged(groups), rl, rule_of(rl), 512)
    loss = PolicyLoss(batch, rl, rule_of(rl), None)
    forward_backward(model, batch.packs, loss, recompute=True)
    assert loss.metrics()["mismatch"] < 1e-9


def test_other_experts_than_the_recorded_ones_would_be_noticed(talked, recipe_of: RecipeOf) -> None:
    model, _, groups = talked
    rl = replace_rl(recipe_of(), mask_truncated=False)
    batch = make_batch(advantaged(groups), rl, rule_of(rl), 512)
    for pack in batch.packs:
        assert pack.routes is not None
        pack.routes[pack.routes >= 0] = (pack.routes[pack.routes >= 0] + 1) % model.arch.num_experts
    loss = PolicyLoss(batch, rl, rule_of(rl), None)
    forward_backward(model, batch.packs, loss, recompute=True)
    assert loss.metrics()["mismatch"] > 1e-6


def replace_rl(recipe: Recipe, **changes: object):
    return recipe.rl.model_copy(update=changes)


def test_leaving_equal_groups_out_changes_no_gradient(recipe_of: RecipeOf) -> None:
    model, _, groups = sample(recipe_of(env="Parity"))
    rl = replace_rl(recipe_of(), mask_truncated=False)
    rule = rule_of(rl)
    equal = [replace_reward(t, 0.7) for t in groups[1]]
    scored = [score_group(groups[0], rl, rule), score_group(equal, rl, rule)]
    assert [group.has_signal for group in scored] == [True, False]
    left_out = make_batch(scored, rl, rule, 512)
    kept = make_batch(scored, replace_rl(recipe_of(), mask_truncated=False, kl=1e-30), rule, 512)
    assert sum(len(p.sources) for p in left_out.packs) < sum(len(p.sources) for p in kept.packs)
    grads = []
    for batch in (left_out, kept):
        model.trainable.zero_grad()
        forward_backward(model, batch.packs, PolicyLoss(batch, rl, rule, None), recompute=True)
        grads.append({name: tensor.grad.clone() for name, tensor in model.trainable.tensors.items()})
    largest = max(float(grad.abs().max()) for grad in grads[0].values())
    for name, grad in grads[0].items():
        assert torch.allclose(grad, grads[1][name], atol=1e-6 * largest, rtol=1e-5), name


def test_a_prompt_that_is_computed_once_teaches_the_same(talked, recipe_of: RecipeOf) -> None:
    model, _, groups = talked
    rl = replace_rl(recipe_of(), mask_truncated=False)
    rule = rule_of(rl)
    shared, found = make_batch(advantaged(groups), rl, rule, 1024), []
    apart = replace(shared, packs=[unshared(pack) for pack in shared.packs])
    assert sum(p.num_tokens for p in shared.packs) < 0.7 * sum(p.num_tokens for p in apart.packs)
    for batch in (shared, apart):
        model.trainable.zero_grad()
        loss = forward_backward(model, batch.packs, PolicyLoss(batch, rl, rule, None), recompute=True)
        found.append((loss, {name: tensor.grad.clone() for name, tensor in model.trainable.tensors.items()}))
    (loss, grads), (plain_loss, plain) = found
    assert loss == pytest.approx(plain_loss, rel=1e-5)
    largest = max(float(grad.abs().max()) for grad in plain.values())
    for name, grad in grads.items():
        assert torch.allclose(grad, plain[name], atol=1e-5 * largest, rtol=1e-4), name


def unshared(pack: Pack) -> Pack:
    """The same documents, each with rows of its own."""
    assert pack.unfold is not None
    rows = {name: getattr(pack, name)[pack.unfold] for name in ("ids", "targets", "weights", "routes")}
    return replace(pack, unfold=None, **rows)


def replace_reward(trajectory: Trajectory, reward: float) -> Trajectory:
    return replace(trajectory, reward=reward)


def test_masked_samples_count_in_no_denominator_of_tokens(recipe_of: RecipeOf) -> None:
    _, _, groups = sample(recipe_of(env="Parity"))
    rl = replace_rl(recipe_of(), mask_truncated=True)
    batch = make_batch(advantaged(groups), rl, rule_of(rl), 512)
    whole = [t for group in groups for t in group if t.finish == "terminated"]
    tokens = sum(t.num_sampled for t in whole)
    assert 0 < len(whole) < 16, "some have to be cut off and some not"
    weights = torch.cat([pack.weights[pack.weights > 0] for pack in batch.packs])
    assert len(weights) == tokens
    assert np.allclose(weights.numpy(), 1 / tokens)


def test_a_turn_that_was_cut_off_has_no_stop(talked) -> None:
    _, vocab, _ = talked
    from ossia.rl.rollout import parse_turn

    ids = [vocab.special["<|channel|>"], *vocab.encode("final"), vocab.special["<|message|>"], *vocab.encode("7")]
    assert parse_turn(vocab, ids).answer() is None
    whole: Turn = parse_turn(vocab, [*ids, vocab.special["<|return|>"]])
    assert whole.answer() == "7"
    assert parse_turn(vocab, [*ids, vocab.special["<|end|>"]]).answer() is None
