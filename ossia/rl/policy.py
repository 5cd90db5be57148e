"""A policy that learns from rewards: it samples and judges groups, trains on them, and answers held-out tasks."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import fmean, pstdev
from typing import Any

from torch import Tensor

from ossia.config import Recipe
from ossia.errors import RunError
from ossia.harmony.render import Renderer
from ossia.harmony.vocab import Vocabulary
from ossia.model.transformer import Transformer
from ossia.rl.alarm import Alarm, failing
from ossia.rl.batch import Group, PolicyBatch, PolicyLoss, make_batch, rule_of, score_group
from ossia.rl.judge import Judge
from ossia.rl.record import SampleLog
from ossia.rl.rollout import Asked, Limits, Rollout, Trajectory
from ossia.rl.sampler import open_sampler
from ossia.rl.sampler.ahead import Ahead
from ossia.rl.sampler.served import Served
from ossia.rl.tasks import NamedEnv, TaskStream
from ossia.train.optim import AdamW
from ossia.train.schedule import forward_logprobs
from ossia.train.step import how_to_step, train_step

_PROBED = 4  # prompts that a rollout server is tried with


@dataclass(frozen=True, slots=True)
class Sampled:
    """A step's scored groups, and how long sampling and judging took."""

    groups: list[Group]
    seconds: float

    def trajectories(self) -> list[Trajectory]:
        """All of them."""
        return [one.trajectory for group in self.groups for one in group.samples]

    def failures(self) -> list[str]:
        """Why those samples got no reward that got none."""
        return [t.failure for t in self.trajectories() if t.failure is not None]


@dataclass(frozen=True, slots=True)
class Next:
    """The batch after the one that is trained, with `rl.async`.

    asked   its tasks; before: where the tasks were when none of them was taken
    """

    asked: list[Asked]
    before: Mapping[str, Any]
    sampling: Ahead[Sampled]


class Policy:
    """What a run from rewards holds: the model, its optimizer, what samples, the tasks. The loop's data too."""

    def __init__(
        self,
        recipe: Recipe,
        model: Transformer,
        vocab: Vocabulary,
        optimizer: AdamW,
        envs: Sequence[NamedEnv],
        served: Served | None = None,
    ) -> None:
        """served  the server that samples; None: this process does"""
        rl, train = recipe.rl, recipe.train
        self.recipe, self.model = recipe, model
        self.rule = rule_of(rl)
        self.optimizer = optimizer
        self.judge = Judge(rl.reward_workers, rl.reward_timeout_s)
        self.samples = SampleLog(recipe.output / "samples.jsonl", vocab)
        most_ids = recipe.max_length - rl.max_new
        renderer = Renderer(vocab)
        stream = partial(
            TaskStream, envs, seed=train.seed, renderer=renderer, harmony=recipe.harmony, most_ids=most_ids
        )
        self.tasks = stream("train")
        self.held_out = stream("eval").take(rl.eval_tasks)
        prompts = [asked.ids for asked in stream("train").take(min(_PROBED, rl.prompts))] if served else []
        sampler = open_sampler(recipe, model, vocab, served, prompts)
        limits = Limits(rl.max_new, rl.max_turns, recipe.max_length)
        self.rollout = Rollout(sampler, vocab, self.judge, limits, routes=rl.router_replay)
        self.alarm, self.number = Alarm(), 0  # steps taken
        self._next: Next | None = None
        self.tokens_per_pack = train.tokens_per_pack
        sizes = recipe.tokens_of_step, train.tokens_per_pack, recipe.max_length
        self.how = how_to_step(model, train.recompute, *sizes)
        self.counts = {"rollouts": 0, "reward_failures": 0, "truncated": 0, "equal_groups": 0, "skipped_updates": 0}

    # --- the loop's data: tasks

    def next_step(self) -> list[Asked]:
        """See `train.loop.Stream`."""
        return self.tasks.take(self.recipe.rl.prompts) if self._next is None else self._next.asked

    def state(self) -> dict[str, Any]:
        """See `train.loop.Stream`."""
        return {
            "step": self.number,
            # what is being sampled isn't kept: a run that goes on samples it with the weights that it goes on with
            "tasks": self.tasks.state() if self._next is None else self._next.before,
            "samples_bytes": self.samples.sync(),
            "alarm": self.alarm.state(),
            "counts": dict(self.counts),
        }

    def load_state(self, state: Mapping[str, Any]) -> None:
        """See `train.loop.Stream`."""
        self.number = state["step"]
        self.tasks.load_state(state["tasks"])
        self.samples.cut(state["samples_bytes"])
        self.alarm = Alarm(**state["alarm"])
        self.counts = dict(state["counts"])

    # --- a step

    def step(self, asked: list[Asked], lr: float) -> dict[str, Any]:
        """Sample, judge, train. Raises RunError if sampler and trainer differ by more than `rl.max_mismatch`."""
        self.number += 1
        step = self.number
        sampled, waited_s = self._sampled(asked, step)
        if self._looks_ahead(step):
            self._next = self._begin(step + 1)
        self.samples.write(step, "train", sampled.groups)
        batch = make_batch(sampled.groups, self.recipe.rl, self.rule, self.tokens_per_pack)
        started = time.perf_counter()
        trained = self._train(batch, lr)
        metrics = {**self._measure(sampled), **trained, "train_s": time.perf_counter() - started}
        if self.recipe.rl.asynchronous:
            metrics["waited_s"] = waited_s
        if metrics.get("mismatch", 0.0) > self.recipe.rl.max_mismatch:
            lag = "a lower learning rate, rl.async: 0, " if self.recipe.rl.asynchronous else ""
            raise RunError(
                f"step {step}: sampler and trainer differ by {metrics['mismatch']:.2e} nats a token, above "
                f"rl.max_mismatch, {self.recipe.rl.max_mismatch:g}: what is trained is not what was sampled\n"
                f"  next: {lag}dtype float32, rl.router_replay: true, or report this"
            )
        rewards = [[one.reward for one in group.samples if one.reward is not None] for group in sampled.groups]
        seen = self.alarm.see(rewards, metrics["answer_tokens"])
        if warning := failing(sampled.failures(), len(sampled.trajectories())) or seen:
            metrics |= {"alarm": warning.words, "alarm_kind": warning.kind}
        return metrics

    def _sampled(self, asked: list[Asked], step: int) -> tuple[Sampled, float]:
        """The step's batch, sampled now unless it has been already, and how long training waited for it."""
        started = time.perf_counter()
        coming, self._next = self._next, None
        sampled = self._sample(asked, step, step - 1) if coming is None else coming.sampling.take()
        return sampled, time.perf_counter() - started

    def _looks_ahead(self, step: int) -> bool:
        """Whether the next batch is sampled during this step: not across a checkpoint, which a run can go on from."""
        train = self.recipe.train
        saves = train.save_every > 0 and step % train.save_every == 0
        return bool(self.recipe.rl.asynchronous) and step != train.steps and not saves

    def _begin(self, step: int) -> Next:
        """Start to sample a step's batch with the weights as they are, which the update before it will change."""
        version, before = step - 2, self.tasks.state()
        self.rollout.sampler.refresh(version)  # here, before they change
        asked = self.tasks.take(self.recipe.rl.prompts)
        return Next(asked, before, Ahead(partial(self._sample, asked, step, version)))

    def _sample(self, asked: list[Asked], step: int, version: int) -> Sampled:
        """Groups of the step's tasks; those without a signal replaced by others as often as `rl.refill` says.

        version  of the policy: how many steps it has been trained for
        """
        started, rl = time.perf_counter(), self.recipe.rl
        found: list[Group] = []
        for attempt in range(rl.refill + 1):
            seed_of = partial(self._seed, step * 1000 + attempt)
            sampled = self.rollout.sample(asked, rl.group, version=version, seed_of=seed_of)
            found += [score_group(group, rl, self.rule) for group in sampled]
            lacking = rl.prompts - sum(group.has_signal for group in found)
            if lacking <= 0 or attempt == rl.refill:
                break
            asked = self.tasks.take(lacking)
        return Sampled(found, time.perf_counter() - started)

    def _seed(self, step: int, trajectory: Trajectory) -> int:
        """A number of its own for every turn of every sample of every step."""
        place = (trajectory.asked.number * 2**16 + trajectory.sample) * 2**8 + trajectory.turns
        return (self.recipe.train.seed * 2**64 + step) * 2**48 + place

    def _train(self, batch: PolicyBatch, lr: float) -> dict[str, Any]:
        """The updates on one batch; none where no sample is better than another."""
        rl, model = self.recipe.rl, self.model
        if not batch.packs:
            self.counts["skipped_updates"] += 1
            return {"loss": 0.0, "tokens": 0, "trained": 0, "grad_norm": 0.0}
        reference: list[Tensor] | None = None
        if rl.kl:
            without = model.with_adapter(None)
            reference = forward_logprobs(without, batch.packs)
        loss = PolicyLoss(batch, rl, self.rule, reference)
        result = None
        for _ in range(rl.iterations):
            updated = train_step(
                model,
                self.optimizer,
                batch.packs,
                lr=lr,
                clip=self.recipe.train.clip,
                **self.how._asdict(),
                loss_of=loss,
            )
            result = result or updated
        assert result is not None
        return {
            "loss": result.loss,
            "tokens": result.tokens,
            "trained": result.trained,
            "grad_norm": result.grad_norm,
            **loss.metrics(),
        }

    def _measure(self, sampled: Sampled) -> dict[str, float]:
        """What the samples were like; running counts are added up."""
        all_of, rewards = sampled.trajectories(), _rewards(sampled.groups)
        num_tokens = sum(t.num_sampled for t in all_of)
        self.counts["rollouts"] += len(all_of)
        self.counts["reward_failures"] += sum(t.reward is None for t in all_of)
        self.counts["truncated"] += sum(t.finish in ("length", "truncated") for t in all_of)
        self.counts["equal_groups"] += sum(not group.has_signal for group in sampled.groups)
        parts: dict[str, list[float]] = {}
        for t in all_of:
            for name, value in t.metrics.items():
                parts.setdefault(name, []).append(value)
        return {
            **({"reward": fmean(rewards), "reward_spread": pstdev(rewards)} if rewards else {}),
            **{f"part_{name}": fmean(values) for name, values in sorted(parts.items())},
            "answer_tokens": num_tokens / len(all_of),
            "malformed": fmean(t.problems > 0 for t in all_of),
            "sample_s": sampled.seconds,
            "sampled_per_s": num_tokens / sampled.seconds,
        }

    def evaluate(self) -> dict[str, float]:
        """Greedy answers to the held-out tasks."""
        if self._next is not None:
            self._next.sampling.wait()  # the server has one adapter at a time
        sampled = self.rollout.sample(self.held_out, 1, version=self.number, seed_of=lambda _: 0, greedy=True)
        groups = [score_group(group, self.recipe.rl, self.rule) for group in sampled]
        self.samples.write(self.number, "eval", groups)
        rewards = _rewards(groups)
        if not rewards:
            why = failing([one.trajectory.failure or "" for group in groups for one in group.samples], len(groups))
            assert why is not None
            raise RunError(f"no held-out task got a reward: {why.words}\n  next: mend the reward; see samples.jsonl")
        tokens = fmean(one.trajectory.num_sampled for group in groups for one in group.samples)
        return {"eval_reward": fmean(rewards), "eval_answer_tokens": tokens, "eval_tasks": len(rewards)}


def _rewards(groups: Sequence[Group]) -> list[float]:
    return [one.reward for group in groups for one in group.samples if one.reward is not None]
