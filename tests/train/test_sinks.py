from __future__ import annotations

import builtins
import io
import json
import re
import struct
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ossia.errors import MissingExtraError
from ossia.train.sinks import TerminalSink, human_time, open_sinks, scalars

GIB = 2**30


def step_event(step: int, *, step_s: float = 2.0, trained: int = 1000, tokens: int = 4000) -> dict[str, Any]:
    return {
        "event": "step",
        "step": step,
        "loss": 2.0 / step,
        "tokens": tokens,
        "trained": trained,
        "tokens_per_s": trained / step_s,
        "step_s": step_s,
        "lr": 1e-4,
        "grad_norm": 0.5,
        "peak_bytes": 2 * GIB,
    }


def eval_event(step: int, loss: float) -> dict[str, Any]:
    return {"event": "eval", "step": step, "eval_loss": loss, "eval_s": 1.0}


class Screen(io.StringIO):
    """A file that says it is a terminal."""

    def isatty(self) -> bool:
        return True


def test_tensorboard_holds_every_number_and_hides_steps_that_were_taken_again(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for start, steps in ((0, (1, 2, 3)), (2, (3, 4))):  # killed after step 3, resumed from the checkpoint of step 2
        (sink,) = open_sinks(["tensorboard"], tmp_path, {}, step=start)
        for step in steps:
            sink.write(step_event(step))
        sink.write(eval_event(steps[-1], 0.25))
        sink.close()
    board = EventAccumulator(str(tmp_path / "tensorboard"))
    board.Reload()
    assert {"train/loss", "train/lr", "train/tokens_per_s", "train/peak_bytes", "eval/loss"} <= set(
        board.Tags()["scalars"]
    )
    losses = {point.step: point.value for point in board.Scalars("train/loss")}
    assert losses == pytest.approx({step: 2.0 / step for step in (1, 2, 3, 4)})
    assert [point.step for point in board.Scalars("train/loss")] == [1, 2, 3, 4]


def test_wandb_gets_the_scalars_under_the_run_folders_name_and_the_recipe(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pb = pytest.importorskip("wandb.proto.wandb_internal_pb2", reason="pip install 'ossia[wandb]'")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    run = tmp_path / "my-run"
    run.mkdir()
    ids = []
    for first, last in ((1, 2), (3, 4)):  # a run that was stopped, and gone on with
        (sink,) = open_sinks(["wandb"], run, {"model": "m"}, step=first - 1)
        for step in range(first, last + 1):
            sink.write(step_event(step))
        sink.write(eval_event(last, 0.5))
        sink.close()
        newest = max((run / "wandb").glob("offline-run-*/*.wandb"), key=lambda file: file.stat().st_mtime_ns)
        records = ended(pb, newest)
        (about,) = [record.run for record in records if record.HasField("run")]
        assert (about.project, about.display_name) == ("ossia", "my-run")
        assert {item.key: item.value_json for item in about.config.update}["model"] == '"m"'
        ids.append(about.run_id)
        rows = [
            {item.key or item.nested_key[0]: json.loads(item.value_json) for item in record.history.item}
            for record in records
            if record.HasField("history")
        ]
        assert [row["_step"] for row in rows] == list(range(first, last + 1))
        assert [row["train/loss"] for row in rows] == [step_event(step)["loss"] for step in range(first, last + 1)]
        assert rows[-1]["eval/loss"] == 0.5
    assert ids[0] == ids[1]


def ended(pb: Any, file: Path) -> list[Any]:
    """The file's records once the run's end is among them: another process writes it, which may still be at it."""
    until = time.monotonic() + 60
    while True:
        records = [pb.Record.FromString(data) for data in logged(file.read_bytes())]
        if any(record.HasField("exit") for record in records):
            return records
        assert time.monotonic() < until, "wandb never wrote that the run has ended"
        time.sleep(0.1)


def logged(data: bytes) -> Iterator[bytes]:
    """The records of a short wandb file: after 7 bytes each has a checksum, a length and a kind."""
    at = 7
    while at + 7 <= len(data):
        _, length, _ = struct.unpack_from("<IHB", data, at)
        if at + 7 + length > len(data):
            return
        yield data[at + 7 : at + 7 + length]
        at += 7 + length


def test_scalars_are_grouped_and_the_step_and_words_are_not_among_them() -> None:
    assert scalars(eval_event(3, 0.5)) == {"eval/loss": 0.5, "eval/s": 1.0}
    assert scalars({"event": "step", "step": 3, "loss": 0.5, "note": "x"}) == {"train/loss": 0.5}
    assert scalars({"event": "start", "step": 0, "steps": 5}) == {}


@pytest.mark.parametrize("name", ["tensorboard", "wandb", "trackio"])
def test_a_sink_whose_package_is_missing_says_how_to_install_it(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in [m for m in sys.modules if m.partition(".")[0] == name]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, name, None)  # how Python marks a module that can't be imported
    with pytest.raises(MissingExtraError, match=rf"(?s)log.sinks: {name} needs .*pip install 'ossia\[{name}\]'"):
        open_sinks([name], tmp_path, {})


def test_outside_a_terminal_there_are_plain_lines_now_and_then_and_the_last_step_always() -> None:
    out = io.StringIO()
    sink = TerminalSink(40, file=out)
    sink.write({"event": "start", "step": 0, "steps": 40})
    for step in range(1, 41):
        sink.write(step_event(step))
        if step == 20:
            sink.write(eval_event(step, 0.75))
    sink.close()
    lines = out.getvalue().splitlines()
    assert lines[0] == "step 1/40  loss 2.0000  500 tok/s  2.0 GiB  1m 18s left"
    assert lines[-1] == "step 40/40  loss 0.0500 (held-out 0.7500)  500 tok/s  2.0 GiB  0s left"
    assert "step 20/40  held-out loss 0.7500" in lines
    shown = [int(re.match(r"step (\d+)", line)[1]) for line in lines if "held-out loss" not in line]
    assert shown == [1, 6, 11, 16, 21, 26, 31, 36, 40]  # every 10 s of steps of 2 s
    assert "\x1b" not in out.getvalue()


def test_of_several_ranks_the_one_with_the_most_memory_is_shown() -> None:
    out = io.StringIO()
    sink = TerminalSink(1, file=out)
    sink.write(step_event(1) | {"rank_peak_bytes": [2 * GIB, 3 * GIB, GIB]})
    sink.close()
    assert "  3.0 GiB (rank 1, the most of 3)  " in out.getvalue()


def test_the_rate_counts_trained_tokens_of_the_last_steps_only() -> None:
    out = io.StringIO()
    sink = TerminalSink(50, file=out)
    for step in range(1, 51):
        sink.write(step_event(step, step_s=1.0, trained=100 if step <= 30 else 300, tokens=10**6))
    assert " 300 tok/s" in out.getvalue().splitlines()[-1]


def test_a_terminal_of_80_columns_shows_step_bar_loss_speed_memory_and_time_left_on_one_line() -> None:
    screen = Screen()
    sink = TerminalSink(500, file=screen, width=80)
    sink.write(step_event(120))
    sink.write(eval_event(120, 1.2345))
    sink.write(step_event(121))
    sink.say("a message [with brackets]")
    sink.close()
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", screen.getvalue())
    assert "a message [with brackets]" in text
    last = re.split(r"[\r\n]+", text.strip())[-1]
    assert re.match(r"step 121/500 \S+ +loss 0.0165 \(held-out 1.2345\)  500 tok/s  2.0 GiB  12m 38s left", last), last
    assert len(last) <= 80


def test_a_resumed_run_starts_its_bar_where_it_goes_on() -> None:
    screen = Screen()
    sink = TerminalSink(500, step=100, file=screen, width=80)
    sink.close()
    assert "step 100/500" in screen.getvalue()


def test_printing_results_to_standard_output_is_left_alone_by_the_bar(capsys: pytest.CaptureFixture[str]) -> None:
    sink = TerminalSink(5, file=Screen(), width=80)
    builtins.print("a result")
    sink.close()
    assert capsys.readouterr().out == "a result\n"


def test_durations_are_told_in_two_units() -> None:
    assert [human_time(s) for s in (0.2, 59.6, 192, 18_420)] == ["0s", "1m 00s", "3m 12s", "5h 07m"]
