"""Runs from rewards whose samples come from a server: every step's adapter goes there, true samples come back."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch

from ossia import grpo
from ossia.config import Recipe, load_recipe
from ossia.errors import RunError
from ossia.model.lora import Lora
from ossia.train.step import train_step
from tests.conftest import MakeTiny
from tests.rl.conftest import RecipeFor
from tests.rl.test_grpo import Quiet, lines, steps_of
from tests.rl.vllm_like import MODEL, VllmLike, serving
from tests.shapes import LEAST

RecipeOf = Callable[..., Recipe]


class Rig:
    """A server, and recipes that sample from it."""

    def __init__(self, state: VllmLike, url: str, recipe_of: RecipeOf) -> None:
        self.state, self.url, self._recipe_of = state, url, recipe_of

    def more(self, *, asynchronous: bool = False) -> str:
        return f'rollout: "{self.url}"' + (", async: 1" if asynchronous else "")

    def recipe(self, *, asynchronous: bool = False, **changes: Any) -> Recipe:
        return self._recipe_of(more=self.more(asynchronous=asynchronous), **changes)


@pytest.fixture
def rig(tiny: MakeTiny, recipe_of: RecipeOf) -> Iterator[Callable[..., Rig]]:
    with ExitStack() as held:

        def make(**options: Any) -> Rig:
            state = VllmLike(str(options.pop("folder", tiny(LEAST))), **options)
            return Rig(state, held.enter_context(serving(state)), recipe_of)

        yield make


def train(recipe: Recipe, *, resume: bool = False) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Step events and samples."""
    grpo.run(recipe, resume=resume, sink=Quiet())
    return steps_of(lines(recipe.output / "events.jsonl")), lines(recipe.output / "samples.jsonl")


def short(names: list[str]) -> list[str]:
    """Adapters by what follows their run's own prefix."""
    return [name if name == MODEL else name.rpartition("-")[2] for name in names]


def test_a_run_trains_on_what_a_server_sampled_with_each_steps_adapter(rig: Callable[..., Rig]) -> None:
    made = rig()
    recipe = made.recipe(steps=3)
    steps, samples = train(recipe)
    assert [event["step"] for event in steps] == [1, 2, 3]
    assert any(event["grad_norm"] > 0 for event in steps)
    assert max(event["mismatch"] for event in steps) < 1e-6  # nobody's weights but the adapter's of that step give this
    assert steps[-1]["rollout_retries"] == 0
    trained = [sample for sample in samples if sample["split"] == "train"]
    assert [(sample["step"], sample["version"]) for sample in trained] == [
        (s, s - 1) for s in (1, 2, 3) for _ in range(12)
    ]
    loads = short([entry for entry in made.state.log if entry.startswith("load")])
    assert loads == ["probe", "v0", "v1", "v2", "v3"]  # tried before step 1; one a step; one for the last evaluation
    assert short(sorted(made.state.loaded)) == ["v3"]  # each takes the place of the one before
    asked = short(made.state.asked)
    assert list(dict.fromkeys(asked)) == [MODEL, *loads]
    assert [asked.count(f"v{step}") for step in range(4)] == [2 + 12, 12, 12 + 2, 2]  # evaluations have two tasks
    assert (recipe.output / "adapter" / "adapter_model.safetensors").is_file()
    assert [path.name for path in (recipe.output / "rollout").iterdir()] == ["v3"]


def test_a_request_that_breaks_off_is_asked_again_and_counted(rig: Callable[..., Rig]) -> None:
    made = rig(fails_once=True)
    steps, _ = train(made.recipe(steps=1))
    assert steps[-1]["rollout_retries"] == 1


def test_a_server_that_dies_ends_the_run_with_what_to_do_and_the_run_goes_on_with_the_next_one(
    rig: Callable[..., Rig], recipe_of: RecipeOf, tmp_path: Path
) -> None:
    made = rig(dies_after=3 + 3 + 2 + 3 * 12 + 2 + 5)  # the probes, an evaluation, two steps and a half
    recipe = made.recipe(steps=4)
    with pytest.raises(RunError) as caught:
        train(recipe)
    told = str(caught.value)
    assert told.startswith(f"rl.rollout: {made.url}: can't be reached: ")
    assert f"vllm serve {Path(recipe.model).resolve()} --enable-lora --max-loras 1 --max-lora-rank 8" in told
    assert f"then go on: {recipe.resume_command}" in told
    assert told.count("next:") == 1
    before = lines(recipe.output / "samples.jsonl")
    made.state.dies_after = None  # it is started again, and still has what the run had left there
    steps, samples = train(recipe, resume=True)
    assert [event["step"] for event in steps] == [1, 2, 3, 4]
    saved = [sample for sample in before if sample["step"] <= 2]
    assert samples[: len(saved)] == saved
    assert short(sorted(made.state.loaded)) == ["v4"]


def bits(recipe: Recipe) -> tuple[bytes, bytes]:
    run = recipe.output
    return (run / "adapter" / "adapter_model.safetensors").read_bytes(), (run / "samples.jsonl").read_bytes()


def test_the_next_batch_is_sampled_while_one_is_trained_with_the_adapter_before_that_update(
    rig: Callable[..., Rig], monkeypatch: pytest.MonkeyPatch
) -> None:
    made, together = rig(), []

    def train_beside(*args: Any, **options: Any) -> Any:
        """Trains once the server is asked for more, or after some seconds."""
        before, waiting = len(made.state.asked), time.monotonic() + 1.5
        while len(made.state.asked) == before and time.monotonic() < waiting:
            time.sleep(0.005)
        together.append(len(made.state.asked) > before)
        return train_step(*args, **options)

    monkeypatch.setattr("ossia.rl.policy.train_step", train_beside)
    recipe = made.recipe(steps=5, asynchronous=True)  # a checkpoint after every second step, none of them looks ahead
    steps, samples = train(recipe)
    versions = {sample["step"]: sample["version"] for sample in samples if sample["split"] == "train"}
    assert versions == {1: 0, 2: 0, 3: 2, 4: 2, 5: 4}
    assert together == [True, False, True, False, False]
    assert [event["mismatch"] < 1e-6 for event in steps] == [True, False, True, False, True]  # by one update
    assert all(event["mismatch"] < 0.02 and event["waited_s"] >= 0 for event in steps)


def test_a_run_that_samples_ahead_goes_on_in_the_same_bits(
    rig: Callable[..., Rig], rewarded: RecipeFor, tmp_path: Path
) -> None:
    made = rig()
    whole, broken = (
        load_recipe(rewarded(tmp_path / name, more=made.more(asynchronous=True), steps=5))
        for name in ("whole", "broken")
    )
    train(whole)
    made.state.dies_after = len(made.state.asked) + 3 + 3 + 2 + 3 * 12 + 2 + 5
    with pytest.raises(RunError, match="can't be reached"):
        train(broken)
    made.state.dies_after = None
    train(broken, resume=True)
    assert bits(broken) == bits(whole)


def test_a_server_that_is_not_there_is_told_before_a_weight_is_read(
    rig: Callable[..., Rig], recipe_of: RecipeOf
) -> None:
    with pytest.raises(
        RunError, match=r"rl\.rollout: http://127\.0\.0\.1:9/v1: can't be reached.*\n  next: see that it"
    ):
        train(recipe_of(more='rollout: "http://127.0.0.1:9"'))
    with pytest.raises(RunError, match="takes no adapters while it runs"):
        train(rig(loads=False).recipe())


def test_another_model_is_found_out_before_step_1(rig: Callable[..., Rig], tiny: MakeTiny) -> None:
    made = rig(folder=tiny(LEAST, seed=7))
    with pytest.raises(RunError, match="doesn't serve the recipe's model"):
        train(made.recipe())


def attention_alone(lora: Lora) -> Lora:
    """An adapter as a server has it that leaves out the part on the experts."""
    with torch.no_grad():
        for name, tensor in lora.trainable.tensors.items():
            if "experts" in name:
                tensor.zero_()
    return lora


@pytest.mark.parametrize(
    ("takes", "allowed"),
    [
        (attention_alone, "on this server: adapter.targets [attention]"),
        (lambda lora: None, "a server that takes the adapter, and follows it"),
    ],
)
def test_an_adapter_that_is_not_followed_or_in_part_is_found_out(
    takes: Callable[[Lora], Lora | None], allowed: str, rig: Callable[..., Rig]
) -> None:
    with pytest.raises(RunError) as caught:
        train(rig(takes=takes).recipe())
    assert f"\n  allowed: {allowed}\n" in str(caught.value)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda choice: choice.pop("token_ids"), "have no `token_ids` with their `logprobs`"),
        (lambda choice: choice.update(logprobs=None), "have no `token_ids` with their `logprobs`"),
        (lambda choice: choice["token_ids"].append(3), "token ids with"),
        (lambda choice: choice["token_ids"].__setitem__(0, 10**6), "token ids that the model doesn't have"),
        (lambda choice: choice["logprobs"]["token_logprobs"].__setitem__(0, None), "logprobs that aren't finite"),
        (lambda choice: choice.update(finish_reason="abort"), "broke an answer off: finish_reason 'abort'"),
    ],
)
def test_an_answer_that_cannot_be_trained_on_is_told(change: Callable, said: str, rig: Callable[..., Rig]) -> None:
    with pytest.raises(RunError) as caught:
        train(rig(changes=change).recipe())
    assert said in str(caught.value)


def test_samples_that_are_not_the_policys_end_the_run(rig: Callable[..., Rig]) -> None:
    made = rig()
    recipe = made.recipe(steps=2)

    def astray(choice: dict[str, Any]) -> None:
        if short(made.state.asked)[-1] == "v1":
            logprobs = choice["logprobs"]["token_logprobs"]
            logprobs[:] = [one - 0.5 for one in logprobs]

    made.state.changes = astray
    with pytest.raises(RunError, match="step 2: sampler and trainer differ"):
        train(recipe)
    assert json.loads((recipe.output / "events.jsonl").read_text().splitlines()[-1])["step"] == 1
