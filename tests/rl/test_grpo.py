"""Runs from rewards: what they leave, what is trained, and that they go on in the same bits after a kill."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from ossia import grpo
from ossia.config import Recipe, load_recipe
from ossia.engine import Engine, Request, Sampling, harmony_stops
from ossia.errors import RunError, UserError
from ossia.harmony import Renderer
from ossia.model.open import open_model
from ossia.rl.rollout import Rollout
from ossia.rl.tasks import NamedEnv, TaskStream
from tests.rl.conftest import RecipeFor
from tests.rl.rewards import Parity, Same
from tests.train.small_run import Death, forkserver

RecipeOf = Callable[..., Recipe]
TIMED = {"tokens_per_s", "step_s", "eval_s", "peak_bytes", "sample_s", "train_s", "sampled_per_s"}


class Quiet:
    def write(self, event: Any) -> None:
        pass

    def close(self) -> None:
        pass


def train(recipe: Recipe) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Step events and samples."""
    grpo.run(recipe, sink=Quiet())
    return lines(recipe.output / "events.jsonl"), lines(recipe.output / "samples.jsonl")


def lines(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def steps_of(events: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [event for event in events if event["event"] == "step"]


@pytest.mark.parametrize("loss", ["grpo", "bnpo", "dr_grpo", "dapo", "gspo", "cispo"])
def test_every_loss_trains_the_adapter_on_what_was_sampled(recipe_of: RecipeOf, loss: str) -> None:
    recipe = recipe_of(loss=loss, steps=3)
    events, _ = train(recipe)
    assert any(event["grad_norm"] > 0 for event in steps_of(events))
    for event in steps_of(events):
        assert event.get("mismatch", 0.0) < 1e-9  # ids, logprobs and experts are those of the sampler, token for token
        assert event.get("clip_share", 0.0) == 0  # one update a batch is on policy
    assert (recipe.output / "adapter" / "adapter_model.safetensors").is_file()
    assert (recipe.output / "report.html").is_file()


@pytest.mark.parametrize("more", ["", "kl: 0.1"], ids=["alone", "beside its reference"])
def test_rounded_experts_are_sampled_from_as_they_are_trained(rewarded: RecipeFor, tmp_path: Path, more: str) -> None:
    events, _ = train(load_recipe(rewarded(tmp_path / "run", more=more, steps=3), ["qat=mxfp4"]))
    assert any(event["grad_norm"] > 0 for event in steps_of(events))
    assert all(event["mismatch"] < 1e-9 for event in steps_of(events))


def test_every_rollout_is_recorded_with_its_reward_and_its_parts(recipe_of: RecipeOf) -> None:
    events, samples = train(recipe_of(steps=2))
    trained = [sample for sample in samples if sample["split"] == "train"]
    assert len(trained) == 2 * 3 * 4
    assert [sum(sample["split"] == "eval" for sample in samples)] == [2 * 2]  # before and after
    for sample in trained:
        text = "".join(
            (message.get("reasoning_content") or "") + (message.get("content") or "")
            for message in sample["completions"][0]["messages"]
        )
        assert sample["reward"] in (0.0, 1.0)
        assert set(sample["parts"]) == {"length"}
        if "tool_calls" not in str(sample):
            assert sample["parts"]["length"] == len(text)
    mean = sum(sample["reward"] for sample in trained if sample["step"] == 1) / 12
    assert steps_of(events)[0]["reward"] == pytest.approx(mean)


def test_a_step_whose_groups_are_all_equal_changes_nothing(recipe_of: RecipeOf) -> None:
    recipe = recipe_of(env="Same", steps=2)
    events, samples = train(recipe)
    assert [event["skipped_updates"] for event in steps_of(events)] == [1, 2]
    assert {sample["advantage"] for sample in samples if sample["split"] == "train"} == {0.0}


def test_failures_of_an_environment_cost_those_samples_alone(recipe_of: RecipeOf) -> None:
    events, samples = train(recipe_of(env="Failing", steps=2))
    failed = [sample for sample in samples if sample["failure"] and sample["split"] == "train"]
    assert steps_of(events)[-1]["reward_failures"] == len(failed) > 0
    assert {sample["failure"].partition(" (rewards.py:")[0] for sample in failed} == {"ValueError: odd"}
    assert all(sample["reward"] is None and sample["advantage"] is None for sample in failed)


def test_an_environment_that_fails_to_open_to_speak_or_to_close_costs_those_samples_alone(recipe_of: RecipeOf) -> None:
    events, samples = train(recipe_of(env="Everywhere", steps=4))
    failed = {sample["failure"].partition(" (")[0] for sample in samples if sample["failure"]}
    assert failed == {
        "RuntimeError: no room",
        "its messages can't be rendered: AttributeError: 'dict' object has no attribute 'content'",
        "closing: OSError: gone",
    }
    assert any(sample["reward"] is not None for sample in samples)
    last = steps_of(events)[-1]
    assert last["alarm_kind"] == "failing"
    assert last["reward_failures"] == sum(bool(one["failure"]) for one in samples if one["split"] == "train")


def test_a_reward_that_fails_at_every_sample_is_told_and_is_no_reward_of_nothing(recipe_of: RecipeOf) -> None:
    events, _ = train(recipe_of(env="Never", held_out=0, steps=2))
    for event in steps_of(events):
        assert "reward" not in event
        assert event["alarm_kind"] == "failing"
        assert "12 of 12 samples got no reward" in event["alarm"]
        assert "12 of them: NameError: zipp (rewards.py:" in event["alarm"]


def test_no_held_out_reward_at_all_ends_the_run_with_the_reason(recipe_of: RecipeOf) -> None:
    with pytest.raises(RunError, match=r"no held-out task got a reward: 2 of 2 .* NameError: zipp"):
        train(recipe_of(env="Never"))


@pytest.mark.parametrize(
    ("env", "words"),
    [
        ("Untried", r"its own tasks and examples fail: KeyError: 'gold' \(rewards.py:\d+\)"),
        ("Unlisted", r"its tasks fail: OSError: no file \(rewards.py:\d+\)"),
        ("Nothing", "is Nothing; expected: an environment"),
    ],
)
def test_code_of_the_users_that_fails_is_told_as_the_users(recipe_of: RecipeOf, env: str, words: str) -> None:
    with pytest.raises(UserError, match=words):
        train(recipe_of(env=env))


def test_a_reward_that_takes_longer_than_the_recipe_allows_costs_its_sample(recipe_of: RecipeOf) -> None:
    events, samples = train(recipe_of(env="Slow", more="reward_timeout_s: 0.3", held_out=0, steps=1))
    late = [sample["failure"] for sample in samples if sample["reward"] is None]
    assert late == ["no verdict after 0.3 s"] * 4
    assert steps_of(events)[0]["reward_failures"] == 4


def test_held_out_tasks_are_answered_greedily(recipe_of: RecipeOf) -> None:
    recipe = recipe_of(env="Same", steps=1)
    _, samples = train(recipe)
    found = [sample["completions"][0]["ids"] for sample in samples if sample["split"] == "eval" and sample["step"] == 0]
    model, vocab = open_model(recipe.model, dtype=recipe.dtype, weights="auto", device="cpu")
    tasks = TaskStream([NamedEnv("env", Same(), 1.0)], "eval", recipe.train.seed, Renderer(vocab), recipe.harmony, 200)
    greedy, stops = Sampling(temperature=0.0), harmony_stops(vocab)
    asked = [Request(list(task.ids), greedy, recipe.rl.max_new, stops) for task in tasks.take(2)]
    assert [answer.ids for answer in Engine(model, vocab=vocab).generate(asked)] == found


def test_environments_are_mixed_by_their_weights(recipe_of: RecipeOf) -> None:
    recipe = recipe_of()
    _, vocab = open_model(recipe.model, dtype=recipe.dtype, weights="auto", device="cpu")
    envs = [NamedEnv("often", Parity(), 3.0), NamedEnv("seldom", Same(), 1.0)]
    tasks = TaskStream(envs, "train", 0, Renderer(vocab), recipe.harmony, 200).take(400)
    assert 0.7 < sum(task.env_id == "often" for task in tasks) / 400 < 0.8


def test_several_updates_a_batch_leave_the_policy_that_sampled(recipe_of: RecipeOf) -> None:
    events, _ = train(recipe_of(more="iterations: 3", steps=2))
    assert any(event["clip_share"] > 0 for event in steps_of(events))


def test_the_reference_is_the_model_with_its_adapter_off(recipe_of: RecipeOf) -> None:
    events, _ = train(recipe_of(more="kl: 0.1", steps=3))
    first, *_, last = steps_of(events)
    assert abs(first["kl"]) < 1e-9  # a fresh adapter changes nothing
    assert last["kl"] > 1e-9


def test_a_sampler_that_is_not_the_trainer_ends_the_run(recipe_of: RecipeOf, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = recipe_of(steps=2)
    sample = Rollout.sample

    def astray(self: Any, *args: Any, **options: Any) -> Any:
        groups = sample(self, *args, **options)
        for group in groups:
            for trajectory in group:
                trajectory.logprobs = [logprob - 0.5 for logprob in trajectory.logprobs]
        return groups

    monkeypatch.setattr(Rollout, "sample", astray)
    with pytest.raises(RunError, match="sampler and trainer differ"):
        train(recipe)


def test_equal_groups_are_replaced_where_asked(recipe_of: RecipeOf) -> None:
    _, samples = train(recipe_of(env="Same", more="refill: 2", steps=1))
    assert sum(sample["split"] == "train" for sample in samples) == 3 * 3 * 4


def in_process(recipe: Path, kind: str = "", number: int = 0, resume: bool = False) -> int | None:
    process = forkserver().Process(target=run_and_die, args=(recipe, kind, number, resume))
    process.start()
    process.join()
    return process.exitcode


def run_and_die(recipe: Path, kind: str, number: int, resume: bool) -> None:
    torch.set_num_threads(1)
    with Death(kind, number).lurking():
        grpo.run(load_recipe(recipe), resume=resume, sink=Quiet())


def outcome(run: Path) -> tuple[bytes, list[dict[str, Any]], bytes]:
    events = [{k: v for k, v in event.items() if k not in TIMED} for event in lines(run / "events.jsonl")]
    return (run / "adapter/adapter_model.safetensors").read_bytes(), events, (run / "samples.jsonl").read_bytes()


@pytest.fixture(scope="module")
def untouched(rewarded: RecipeFor, tmp_path_factory: pytest.TempPathFactory) -> tuple[bytes, list, bytes]:
    run = tmp_path_factory.mktemp("untouched") / "run"
    assert in_process(rewarded(run)) == 0
    return outcome(run)


@pytest.mark.parametrize(("kind", "number"), [("after an update", 3), ("half a tensor file", 3), ("half an event", 6)])
def test_a_killed_run_goes_on_in_the_same_bits(
    kind: str, number: int, rewarded: RecipeFor, untouched: tuple[bytes, list, bytes], tmp_path: Path
) -> None:
    recipe = rewarded(tmp_path / "run")
    assert in_process(recipe, kind, number) == -signal.SIGKILL
    assert in_process(recipe, resume=True) == 0
    assert outcome(tmp_path / "run") == untouched
