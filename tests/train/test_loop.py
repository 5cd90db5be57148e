from __future__ import annotations

import dataclasses
import math
import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from ossia.errors import Interrupted, RunError
from ossia.train.events import EventLog, read_events
from ossia.train.loop import Job, StopRequests, find_start, run_loop
from ossia.train.state import checkpoint_paths
from tests.train.small_run import STEPS, ShuffledStream, left_behind, small_job, train, train_in_process


def events(run: Path) -> list[dict[str, Any]]:
    return read_events(run / "events.jsonl")


def kinds(run: Path) -> list[tuple[str, int]]:
    return [(event["event"], event["step"]) for event in events(run)]


def steps_saved(run: Path) -> list[int]:
    return [int(path.name.removeprefix("step-")) for path in checkpoint_paths(run)]


def with_step(job: Job, step: Any) -> Job:
    return dataclasses.replace(job, step=step)


def test_a_run_evaluates_before_the_first_step_then_every_so_often_and_at_the_end(tmp_path: Path) -> None:
    result = train(tmp_path, eval_every=4, save_every=0)
    assert kinds(tmp_path) == [
        ("start", 0),
        ("eval", 0),
        *(("step", n) for n in (1, 2, 3, 4)),
        ("eval", 4),
        *(("step", n) for n in (5, 6)),
        ("eval", 6),
    ]
    assert (result.step, result.checkpoint.name, steps_saved(tmp_path)) == (6, "step-00000006", [6])


def test_with_eval_every_0_the_held_out_loss_is_taken_once_and_without_held_out_data_never(tmp_path: Path) -> None:
    train(tmp_path / "once", eval_every=0)
    assert [step for kind, step in kinds(tmp_path / "once") if kind == "eval"] == [STEPS]
    train(tmp_path / "never", evaluate=None)
    assert "eval" not in dict(kinds(tmp_path / "never"))


def test_step_events_hold_the_documented_keys_and_the_rate_is_of_trained_tokens(tmp_path: Path) -> None:
    train(tmp_path)
    first = next(event for event in events(tmp_path) if event["event"] == "step")
    keys = ["event", "step", "loss", "tokens", "trained", "grad_norm", "tokens_per_s", "step_s", "lr", "peak_bytes"]
    assert list(first) == [*keys, "rows_skipped"]
    assert (first["trained"], first["tokens"], first["step_s"], first["tokens_per_s"]) == (12, 24, 0.25, 48.0)
    assert events(tmp_path)[0] == {"event": "start", "step": 0, "steps": STEPS, "trainable": 65}


def test_the_loss_of_the_small_run_falls(tmp_path: Path) -> None:
    """The runs that the kill tests compare do learn something, so that a lost update shows."""
    train(tmp_path)
    losses = [event["eval_loss"] for event in events(tmp_path) if event["event"] == "eval"]
    assert losses[-1] < 0.9 * losses[0]


def test_the_clock_and_the_memory_meter_are_only_reported(tmp_path: Path) -> None:
    train(tmp_path / "a")
    train(tmp_path / "b", clock=time.perf_counter, memory=lambda: 1)
    same = [left_behind(tmp_path / run)["checkpoints/step-00000006/trainable.safetensors"] for run in "ab"]
    assert same[0] == same[1]
    timed = {"eval_s", "step_s", "tokens_per_s", "peak_bytes"}
    plain = [[{k: v for k, v in e.items() if k not in timed} for e in events(tmp_path / run)] for run in "ab"]
    assert plain[0] == plain[1]


def test_data_that_ends_early_ends_the_run_with_its_evaluation_and_checkpoint(tmp_path: Path) -> None:
    result = train(tmp_path, data=ShuffledStream(epochs=1), save_every=0)  # 18 rows: 4 steps of 4
    assert result.step == 4
    assert kinds(tmp_path)[-2:] == [("step", 4), ("eval", 4)]
    assert train(tmp_path, resume=True, data=ShuffledStream(epochs=1), save_every=0) == result
    assert kinds(tmp_path)[-2:] == [("step", 4), ("eval", 4)]


def test_resuming_a_finished_run_does_nothing_and_changes_nothing(tmp_path: Path) -> None:
    first, said = train(tmp_path), []
    before = left_behind(tmp_path)
    assert train(tmp_path, resume=True, said=said) == first
    assert left_behind(tmp_path) == before
    assert said == [f"{tmp_path}: going on from step {STEPS}"]


def test_a_folder_that_holds_a_run_is_refused_without_resume(tmp_path: Path) -> None:
    train(tmp_path)
    before = left_behind(tmp_path)
    with pytest.raises(RunError, match="already holds a run; add --resume to go on with it, or choose another"):
        train(tmp_path)
    assert left_behind(tmp_path) == before


def test_what_a_run_left_that_was_refused_before_its_first_step_is_written_over(tmp_path: Path) -> None:
    train(tmp_path / "untouched")
    with EventLog(tmp_path / "run") as log:
        log.write({"event": "start", "step": 0, "steps": 99})
        log.write({"event": "eval", "step": 0, "eval_loss": 1.0})
    train(tmp_path / "run")
    assert left_behind(tmp_path / "run") == left_behind(tmp_path / "untouched")


def test_a_run_stopped_before_its_first_checkpoint_starts_again_and_says_so(tmp_path: Path) -> None:
    train(tmp_path / "untouched")
    killed = train_in_process(tmp_path / "run", kind="after an update", number=1)
    killed.join()
    said: list[str] = []
    train(tmp_path / "run", resume=True, said=said)
    assert said == [f"{tmp_path / 'run'}: no checkpoint yet, starting from step 0"]
    assert left_behind(tmp_path / "run") == left_behind(tmp_path / "untouched")


@pytest.mark.parametrize("kept", [0, 1])
def test_events_that_are_gone_when_a_run_is_resumed_are_said(tmp_path: Path, kept: int) -> None:
    train(tmp_path)
    events = tmp_path / "events.jsonl"
    lines = events.read_text().splitlines(keepends=True)
    events.write_text("".join(lines[:kept]))
    said: list[str] = []
    train(tmp_path, resume=True, said=said)
    size = sum(map(len, lines[:kept]))
    assert said[1] == (
        f"{events}: {size:,} bytes, where the checkpoint of step {STEPS} was saved with {sum(map(len, lines)):,}: "
        "events before it are missing, and the report's curves with them"
    )


def test_a_corrupt_newest_checkpoint_is_named_and_the_run_repeats_the_steps_since_the_one_before(
    tmp_path: Path,
) -> None:
    train(tmp_path / "untouched")
    run, said = tmp_path / "run", []
    train(run)
    (run / "checkpoints" / "step-00000006" / "optimizer.safetensors").write_bytes(b"noise")
    train(run, resume=True, said=said)
    assert "step-00000006: its optimizer.safetensors has 5 bytes" in said[0]
    assert said[1] == f"{run}: going on from step 4"
    wanted, found = left_behind(tmp_path / "untouched"), left_behind(run)
    assert {name for name in found if ".corrupt/" not in name} == wanted.keys()
    assert all(found[name] == wanted[name] for name in wanted)


def test_a_checkpoint_past_the_steps_asked_for_is_refused(tmp_path: Path) -> None:
    train(tmp_path)
    with pytest.raises(RunError, match=r"step-00000006 is past train.steps \(3\).*start another run"):
        train(tmp_path, resume=True, steps=3)


def test_a_step_that_cannot_be_taken_leaves_the_checkpoints_before_it(tmp_path: Path) -> None:
    job = small_job(tmp_path)

    def poisoned(packs: list, lr: float) -> dict:
        return job.step([(x * math.nan, y) for x, y in packs] if job.optimizer.num_updates == 4 else packs, lr)

    with EventLog(tmp_path) as log, pytest.raises(RunError, match="step 5: the loss is nan"):
        run_loop(with_step(job, poisoned), log, None)
    assert steps_saved(tmp_path) == [2, 4]
    assert kinds(tmp_path)[-1] == ("step", 4)


def interrupted_at(run: Path, step: int, number: signal.Signals, *, times: int = 1, **changes: Any) -> str:
    """Run the small job, which gets this signal while it takes a step; what Interrupted said."""
    job = small_job(run, **changes)

    def take(packs: list, lr: float) -> dict:
        if job.optimizer.num_updates == step - 1:
            for _ in range(times):
                os.kill(os.getpid(), number)
        return job.step(packs, lr)

    with EventLog(run) as log, pytest.raises(Interrupted) as caught:
        run_loop(with_step(job, take), log, None)
    assert caught.value.exit_code == 130
    return str(caught.value)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("step", [1, 3, 4])  # 3 is one that evaluates, 4 one that saves anyway
def test_an_interrupted_run_finishes_its_step_saves_and_resumes_in_the_same_bits(
    tmp_path: Path, number: signal.Signals, step: int
) -> None:
    train(tmp_path / "untouched")
    said = interrupted_at(tmp_path / "run", step, number)
    assert said == f"stopped after step {step}, saved; to go on: ossia train small.yaml --resume"
    assert steps_saved(tmp_path / "run")[-1] == step
    assert kinds(tmp_path / "run")[-1] == ("step", step)  # no waiting for an evaluation
    train(tmp_path / "run", resume=True)
    assert (tmp_path / "run" / "events.jsonl").read_bytes() == (tmp_path / "untouched" / "events.jsonl").read_bytes()
    wanted, found = left_behind(tmp_path / "untouched"), left_behind(tmp_path / "run")
    final = [name for name in wanted if "step-00000006" in name]
    assert len(final) == 4
    assert all(found[name] == wanted[name] for name in final)


def test_an_interruption_during_the_last_step_still_evaluates_when_resumed(tmp_path: Path) -> None:
    train(tmp_path / "untouched")
    interrupted_at(tmp_path / "run", STEPS, signal.SIGINT)
    train(tmp_path / "run", resume=True)
    assert (tmp_path / "run" / "events.jsonl").read_bytes() == (tmp_path / "untouched" / "events.jsonl").read_bytes()


def test_a_second_interruption_stops_at_once_and_says_what_is_safe(tmp_path: Path) -> None:
    said = interrupted_at(tmp_path / "run", 4, signal.SIGINT, times=2)
    assert said == (
        "stopped at once, during step 4; the checkpoint of step 2 is whole; to go on: ossia train small.yaml --resume"
    )
    assert kinds(tmp_path / "run")[-1] == ("eval", 3)
    said = interrupted_at(tmp_path / "other", 1, signal.SIGINT, times=2)
    assert "nothing had been saved" in said


def test_the_handlers_of_before_are_back_after_a_run(tmp_path: Path) -> None:
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    train(tmp_path)
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


def test_a_run_outside_the_main_thread_needs_no_signals(tmp_path: Path) -> None:
    results = []
    thread = threading.Thread(target=lambda: results.append(train(tmp_path)))
    thread.start()
    thread.join()
    assert results[0].step == STEPS


def test_the_first_signal_is_acknowledged_on_standard_error(capfd: pytest.CaptureFixture[str]) -> None:
    with StopRequests() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.asked
        assert "finishing this step, then saving; once more to stop at once" in capfd.readouterr().err
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_a_full_disk_in_the_middle_of_a_run_keeps_the_checkpoints_and_the_run_goes_on_from_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The error path of the loop; tests/train/test_state.py fills a real file system."""
    import safetensors.torch

    train(tmp_path / "untouched")
    save_file, calls = safetensors.torch.save_file, []

    def full(tensors: dict, path: Path) -> None:
        calls.append(path)
        if len(calls) > 2:
            raise OSError(28, "No space left on device")
        save_file(tensors, path)

    monkeypatch.setattr(safetensors.torch, "save_file", full)
    with pytest.raises(RunError, match=r"(?s)step-00000004: No space left on device.*go on from step 2"):
        train(tmp_path / "run")
    monkeypatch.undo()
    torch.manual_seed(123)
    train(tmp_path / "run", resume=True)
    assert left_behind(tmp_path / "run") == left_behind(tmp_path / "untouched")


def test_find_start_needs_no_checkpoints_for_a_fresh_folder(tmp_path: Path) -> None:
    with EventLog(tmp_path):
        assert find_start(tmp_path, resume=False, say=print) is None
