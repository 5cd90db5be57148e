"""Adapters that follow a run: newer checkpoints, bad ones, runs that begin again; through a real server and alone."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest
import torch
from safetensors.torch import load_file, save_file

from ossia.errors import AdapterError
from ossia.model.peft import load_adapter
from ossia.train.state import MANIFEST, TRAINABLE, checkpoint_paths, entry_of
from ossia.web.app import Server
from ossia.web.follow import RunAdapter
from ossia.web.hosting import Limits, open_hosted, read_wanted
from ossia.web.metrics import Metrics
from tests.web.conftest import GREET, Live, Model, Talker, running, wait_until

LONG = {"model": "live", "prompt": "x", "max_tokens": 300, "temperature": 0}


class Run:
    """A run folder into which checkpoints come as training writes them: whole, by one rename."""

    def __init__(self, folder: Path, talker: Talker) -> None:
        self.folder = folder
        (folder / "checkpoints").mkdir(parents=True)
        shutil.copy(talker.run / "recipe.yaml", folder)
        (self._learned,) = checkpoint_paths(talker.run)

    def save(self, step: int, *, strength: float = 1.0, spoil: Callable[[Path], None] | None = None) -> Path:
        """The talker's adapter as the checkpoint of a step; its strength 0 is the model without one."""
        place = self.folder / "checkpoints" / f"step-{step:08d}"
        partial = place.with_name(f".partial-{place.name}")
        shutil.copytree(self._learned, partial)
        tensors = load_file(partial / TRAINABLE)
        save_file({name: t * strength if "lora_B" in name else t for name, t in tensors.items()}, partial / TRAINABLE)
        manifest = json.loads((partial / MANIFEST).read_text())
        manifest["files"][TRAINABLE] = entry_of(partial / TRAINABLE)
        (partial / MANIFEST).write_text(json.dumps(manifest))
        if spoil is not None:
            spoil(partial)
        os.rename(partial, place)
        return place


def flip_a_bit(checkpoint: Path) -> None:
    data = bytearray((checkpoint / TRAINABLE).read_bytes())
    data[-5] ^= 1
    (checkpoint / TRAINABLE).write_bytes(data)


@pytest.fixture
def run(talker: Talker, tmp_path: Path) -> Run:
    return Run(tmp_path / "run", talker)


@pytest.fixture
def live(run: Run, talker: Talker) -> Iterator[Live]:
    """A server with the run's adapter under the name `live`; its first checkpoint has learned nothing."""
    run.save(10, strength=0.0)
    metrics = Metrics()
    wanted = read_wanted([f"base={talker.model}"], [f"live={run.folder}"])
    limits = Limits(max_batch=4, max_queue=8)
    hosted = open_hosted(wanted, metrics, limits, dtype="float32", weights="auto", device="cpu")
    with running(Server(tuple(hosted), metrics)) as live:
        yield live


def step(live: Live) -> int:
    """Which checkpoint the list of models says is served."""
    found: int = httpx2.get(f"{live.url}/v1/models/live").json()["step"]
    return found


def about(live: Live) -> dict[str, Any]:
    found: dict[str, Any] = httpx2.get(f"{live.url}/v1/ossia/info").json()["models"][1]
    return found


def greeting(live: Live) -> tuple[str | None, str | None]:
    answer = live.client.chat.completions.create(model="live", messages=[GREET], temperature=0, max_tokens=150)
    return answer.choices[0].message.content, answer.system_fingerprint


def test_a_newer_checkpoint_answers_and_what_runs_ends_with_the_one_it_began_with(
    live: Live, run: Run, endless: dict[str, int]
) -> None:
    assert step(live) == 10
    assert greeting(live)[0] != "Hello!"
    body = {**LONG, "logit_bias": endless}
    alone = live.client.completions.create(**body).choices[0].text
    with live.client.completions.create(**body, stream=True) as stream:
        chunks = iter(stream)
        first = next(chunks)
        run.save(80)
        wait_until(lambda: step(live) == 80)
        assert greeting(live) == ("Hello!", "step-80")
        assert live.worker.load().running == 1, "the older answer still runs"
        rest = list(chunks)
    assert first.choices[0].text + "".join(chunk.choices[0].text for chunk in rest) == alone
    assert {chunk.system_fingerprint for chunk in (first, *rest)} == {"step-10"}
    assert (about(live)["id"], about(live)["step"], about(live)["problem"]) == ("live", 80, None)
    assert '\nossia_adapter_step{adapter="live"} 80.0\n' in httpx2.get(f"{live.url}/metrics").text
    wait_until(lambda: live.worker.load().blocks_used == 0)


def test_a_bad_checkpoint_leaves_what_is_served_and_is_told_in_the_log_the_metrics_and_the_facts(
    live: Live, run: Run, caplog: pytest.LogCaptureFixture
) -> None:
    run.save(80)
    wait_until(lambda: step(live) == 80)
    run.save(90, spoil=flip_a_bit)
    wait_until(lambda: about(live)["problem"])
    assert "step-00000090: the bytes of its trainable.safetensors are not those" in about(live)["problem"]
    assert greeting(live) == ("Hello!", "step-80")
    text = httpx2.get(f"{live.url}/metrics").text
    assert '\nossia_adapter_bad_checkpoints_total{adapter="live"} 1.0\n' in text
    told = [line for line in caplog.messages if "step-00000090" in line]
    assert len(told) == 1
    assert told[0].endswith("; step 80 stays")
    run.save(100, strength=0.0)
    wait_until(lambda: step(live) == 100)
    assert about(live)["problem"] is None
    assert greeting(live)[0] != "Hello!"


def test_there_are_never_more_than_two_versions_of_an_adapter(live: Live, run: Run, endless: dict[str, int]) -> None:
    with live.client.completions.create(**{**LONG, "max_tokens": 3000}, logit_bias=endless, stream=True) as stream:
        next(iter(stream))
        run.save(80)
        wait_until(lambda: step(live) == 80)
        run.save(90, strength=0.0)
        run.save(100)
        wait_until(lambda: live.worker._newer.keys() == {"live"})
        assert greeting(live) == ("Hello!", "step-80"), "an answer of step 10 still runs, so the others wait"
    wait_until(lambda: step(live) == 100)


def test_streams_and_responses_say_which_step_they_are_of(live: Live) -> None:
    ask: Any = {"model": "live", "messages": [GREET], "max_tokens": 3, "stream": True}
    assert {chunk.system_fingerprint for chunk in live.client.chat.completions.create(**ask)} == {"step-10"}
    response = live.client.responses.create(model="live", input="hi", max_output_tokens=3)
    assert (response.model_extra or {})["system_fingerprint"] == "step-10"
    assert live.client.completions.create(model="base", prompt="x", max_tokens=1).system_fingerprint is None


def test_a_run_is_served_from_before_its_first_checkpoint_by_the_model_that_it_trains(run: Run, talker: Talker) -> None:
    metrics, limits = Metrics(), Limits(max_batch=4, max_queue=8)
    wanted = read_wanted([f"live={run.folder}"], [])
    hosted = open_hosted(wanted, metrics, limits, dtype="float32", weights="auto", device="cpu")
    with running(Server(tuple(hosted), metrics)) as live:
        base = live.served.name
        assert [model.id for model in live.client.models.list()] == [base, "live"]

        def answer(name: str) -> tuple[str, str | None]:
            found = live.client.completions.create(model=name, prompt="x", max_tokens=12, temperature=0)
            return found.choices[0].text, found.system_fingerprint

        assert answer("live") == answer(base)
        assert about(live)["step"] is None
        assert "has saved no checkpoint yet" in about(live)["problem"]
        run.save(5, spoil=flip_a_bit)
        wait_until(lambda: "step-00000005" in about(live)["problem"])
        assert answer("live") == answer(base)
        run.save(10)
        wait_until(lambda: about(live)["step"] == 10)
        assert about(live)["problem"] is None
        assert greeting(live) == ("Hello!", "step-10")
        assert step(live) == 10


# --- the run folder alone


@pytest.fixture
def followed(run: Run, model: Model) -> RunAdapter:
    weights = model.talker.weights
    return RunAdapter(
        "live", run.folder, lambda path: load_adapter(path, weights.arch, torch.device("cpu"), base=weights.checkpoint)
    )


def test_the_newest_one_that_is_whole_is_taken(run: Run, followed: RunAdapter) -> None:
    run.save(10)
    assert followed.first() is not None
    run.save(20)
    run.save(30, spoil=flip_a_bit)
    run.save(40, spoil=lambda path: (path / MANIFEST).unlink())
    assert followed.newer() is not None
    assert followed.step == 20
    assert followed.num_bad == 2
    assert "step-00000040: its manifest.json can't be read" in str(followed.problem)
    assert followed.newer() is None
    assert followed.num_bad == 2, "they are looked at once"
    shutil.rmtree(run.folder / "checkpoints" / "step-00000040")
    shutil.rmtree(run.folder / "checkpoints" / "step-00000030")
    assert followed.newer() is None
    assert followed.problem is None


def test_an_older_checkpoint_is_not_gone_back_to(run: Run, followed: RunAdapter) -> None:
    run.save(10)
    latest = run.save(20)
    followed.first()
    shutil.rmtree(latest)
    run.save(30, spoil=flip_a_bit)
    assert followed.newer() is None
    assert followed.step == 20


@pytest.mark.parametrize("begun_at", [10, 20])
def test_a_run_that_was_begun_again_is_followed_from_its_beginning(
    run: Run, followed: RunAdapter, begun_at: int
) -> None:
    old = run.save(20)
    followed.first()
    assert followed.newer() is None
    shutil.rmtree(old)
    run.save(begun_at)
    assert followed.newer() is not None
    assert followed.step == begun_at


def test_a_checkpoint_that_the_run_removes_while_it_is_read_is_no_bad_one(
    run: Run, followed: RunAdapter, monkeypatch: pytest.MonkeyPatch
) -> None:
    run.save(10)
    followed.first()
    going = run.save(20)
    monkeypatch.setattr("ossia.web.follow.verify", lambda path, names: shutil.rmtree(path))
    assert followed.newer() is None
    assert not going.exists()
    assert (followed.num_bad, followed.problem, followed.step) == (0, None, 10)


def test_numbers_that_are_not_finite_are_not_served(run: Run, followed: RunAdapter) -> None:
    run.save(10)
    followed.first()
    run.save(20, strength=float("nan"))
    assert followed.newer() is None
    assert "not all of its numbers are finite" in str(followed.problem)


def test_a_run_whose_checkpoints_are_all_bad_is_refused_and_one_with_its_final_adapter_is_not(
    run: Run, followed: RunAdapter, talker: Talker
) -> None:
    run.save(10, spoil=flip_a_bit)
    with pytest.raises(AdapterError, match="there is no other checkpoint"):
        followed.first()
    shutil.copytree(talker.run / "adapter", run.folder / "adapter")
    assert followed.first() is not None
    assert followed.step is None
    run.save(20)
    assert followed.newer() is not None
    assert followed.step == 20
