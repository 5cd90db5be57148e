from __future__ import annotations

import json
import re
import socket
import subprocess
from datetime import UTC, datetime
from getpass import getuser
from multiprocessing.synchronize import Event
from pathlib import Path

import pytest
import torch

from ossia.errors import RunError
from ossia.train.events import EventLog, environment, peak_bytes, read_events, write_env
from tests.train.small_run import forkserver

CPU = torch.device("cpu")
NOON = datetime(2025, 1, 2, 12, 0, 0, tzinfo=UTC)


def step_event(step: int) -> dict[str, float | str]:
    return {"event": "step", "step": step, "loss": 1.0 / step}


def never(text: str) -> None:
    raise AssertionError(text)


class Memory:
    """A sink that keeps what it hears."""

    def __init__(self) -> None:
        self.heard: list[dict] = []
        self.closed = False

    def write(self, event: dict) -> None:
        self.heard.append(dict(event))

    def close(self) -> None:
        self.closed = True


def test_events_are_in_the_file_and_in_every_sink_as_soon_as_they_are_written(tmp_path: Path) -> None:
    sink = Memory()
    with EventLog(tmp_path / "run") as log:
        log.add(sink)
        for step in (1, 2):
            log.write(step_event(step))
            assert read_events(tmp_path / "run" / "events.jsonl") == sink.heard
    assert [event["step"] for event in sink.heard] == [1, 2]
    assert sink.closed


def test_a_torn_last_line_is_not_an_event_and_any_other_bad_line_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    whole = "".join(json.dumps(step_event(step)) + "\n" for step in (1, 2))
    path.write_text(whole + '{"event": "step", "st')
    assert [event["step"] for event in read_events(path)] == [1, 2]
    path.write_text(whole + '{"event": "step", "st\n' + whole)
    with pytest.raises(RunError, match=rf"{re.escape(str(path))}:3: not JSON"):
        read_events(path)
    path.write_text(whole + "[1]\n")
    with pytest.raises(RunError, match=r"events\.jsonl:3: not an event"):
        read_events(path)


def test_cutting_goes_back_to_a_synced_length_and_writing_goes_on_there(tmp_path: Path) -> None:
    with EventLog(tmp_path) as log:
        log.write(step_event(1))
        length = log.sync()
        log.write(step_event(2))
    with (tmp_path / "events.jsonl").open("a") as file:
        file.write('{"torn')
    with EventLog(tmp_path) as log:
        log.cut(length)
        log.write(step_event(3))
    assert [event["step"] for event in read_events(tmp_path / "events.jsonl")] == [1, 3]


def test_cutting_a_file_that_was_edited_never_leaves_half_a_line(tmp_path: Path) -> None:
    with EventLog(tmp_path) as log:
        for step in (1, 2, 3):
            log.write(step_event(step))
        length = log.sync()
        log.cut(length - 5)
        log.write(step_event(4))
        assert [event["step"] for event in read_events(tmp_path / "events.jsonl")] == [1, 2, 4]
        log.cut(10 * length)
        assert [event["step"] for event in read_events(tmp_path / "events.jsonl")] == [1, 2, 4]
        log.cut(0)
        assert read_events(tmp_path / "events.jsonl") == []


def hold_the_log(run: Path, ready: Event, enough: Event) -> None:
    with EventLog(run):
        ready.set()
        enough.wait(60)


def test_two_processes_cannot_train_into_one_folder_and_a_killed_one_holds_nothing(tmp_path: Path) -> None:
    context = forkserver()
    ready, enough = context.Event(), context.Event()
    other = context.Process(target=hold_the_log, args=(tmp_path, ready, enough))
    other.start()
    assert ready.wait(60)
    with pytest.raises(RunError, match="another process is training into this folder"):
        EventLog(tmp_path)
    other.kill()
    other.join()
    EventLog(tmp_path).close()


def test_a_full_disk_while_writing_an_event_is_an_error_that_says_so(tmp_path: Path) -> None:
    (tmp_path / "events.jsonl").symlink_to("/dev/full")
    log = EventLog(tmp_path)
    with pytest.raises(RunError, match=r"(?s)can't save .*events.jsonl: No space left on device.*needed: \d+ B"):
        log.write(step_event(1))
    log.close()


def test_numbers_that_json_cannot_hold_never_reach_the_file(tmp_path: Path) -> None:
    with EventLog(tmp_path) as log, pytest.raises(ValueError, match="not JSON compliant"):
        log.write({"event": "step", "step": 1, "loss": float("nan")})
    assert read_events(tmp_path / "events.jsonl") == []


def test_peak_memory_grows_by_what_a_tensor_takes() -> None:
    before = peak_bytes(CPU)
    ballast = torch.ones(before // 4 + 2**24)
    assert peak_bytes(CPU) >= min(before + ballast.numel(), 4 * ballast.numel())


def test_the_environment_names_versions_and_machine_but_no_host_user_or_folder() -> None:
    env = environment(CPU)
    assert env["torch"] == torch.__version__
    assert env["device"] == "cpu"
    assert env["threads"] == torch.get_num_threads()
    assert 1 <= env["cores"] <= 4096
    text = json.dumps(env)
    assert socket.gethostname() not in text
    assert str(Path.home()) not in text
    assert str(Path(__file__).parent) not in text
    assert getuser() not in [value for value in env.values() if isinstance(value, str)]


def test_the_environment_says_the_memory_that_the_process_may_use(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ossia.train.events.machine_memory", lambda: (3 * 2**30, 0))  # a control group's, say
    assert environment(CPU)["memory_bytes"] == 3 * 2**30


def test_the_environment_holds_the_commit_only_of_a_checkout_that_tracks_the_code(tmp_path: Path) -> None:
    """In a copy of the module inside some other project's checkout there is no commit to tell."""
    from ossia.train import events

    def git(*args: str) -> str:
        who = ["-c", "user.name=t", "-c", "user.email=t@example.org"]
        return subprocess.run(["git", *who, *args], cwd=tmp_path, check=True, capture_output=True, text=True).stdout

    package = tmp_path / "ossia"
    package.mkdir()
    (package / "events.py").write_text("1\n")
    git("init", "-q")
    git("commit", "-q", "--allow-empty", "-m", "another project")
    assert events._commit(package) == {}
    git("add", "-A")
    git("commit", "-q", "-m", "ours")
    commit = git("rev-parse", "HEAD").strip()
    assert events._commit(package) == {"commit": commit, "modified": False}
    (package / "events.py").write_text("2\n")
    assert events._commit(package) == {"commit": commit, "modified": True}
    assert events._commit(Path("/")) == {}


def test_env_json_keeps_how_a_run_began_and_adds_what_differed_when_it_was_resumed(tmp_path: Path) -> None:
    first = {"torch": "2.13.0", "threads": 2}
    write_env(tmp_path, first, now=NOON, say=never)
    write_env(tmp_path, first | {"threads": 1}, now=NOON, resumed_from=100, say=never)
    assert json.loads((tmp_path / "env.json").read_text()) == {
        "torch": "2.13.0",
        "threads": 2,
        "started": "2025-01-02T12:00:00+00:00",
        "resumed": [{"step": 100, "at": "2025-01-02T12:00:00+00:00", "threads": 1}],
    }


@pytest.mark.parametrize("damage", [b"garbage", b"[1]", b"{}", b'{"resumed": 3}', b"\xff\xfe"])
def test_an_env_json_that_cannot_be_read_is_said_and_written_anew(tmp_path: Path, damage: bytes) -> None:
    (tmp_path / "env.json").write_bytes(damage)
    said: list[str] = []
    write_env(tmp_path, {"threads": 2}, now=NOON, resumed_from=7, say=said.append)
    (line,) = said
    assert line.startswith(f"{tmp_path / 'env.json'}: can't be read")
    assert json.loads((tmp_path / "env.json").read_text()) == {
        "threads": 2,
        "started": None,
        "resumed": [{"step": 7, "at": "2025-01-02T12:00:00+00:00"}],
    }


def test_a_folder_that_cannot_be_made_is_told_as_one_before_anything_began(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError) as caught:
        EventLog(tmp_path / "file" / "run")
    assert str(caught.value) == (
        f"{tmp_path / 'file' / 'run'}: can't be written: Not a directory\n"
        "  next: mend that, or choose another `output`; nothing had begun"
    )
