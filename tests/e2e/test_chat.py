"""`ossia chat` as people use it: through a pipe, and in a terminal."""

from __future__ import annotations

import io
import os
import pty
import shutil
import signal
import subprocess
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from ossia.chat import Screen, _read_line, run_chat
from ossia.engine import harmony_stops
from ossia.harmony import Vocabulary
from tests.e2e.conftest import START, Command, Talker
from tests.e2e.terminal import terminal

CERTAIN = ("--temperature", "0", "--dtype", "float32")


def test_a_pipe_gets_an_answer_a_question_and_the_rest_goes_to_stderr(talker: Talker, command: Command) -> None:
    done = command("chat", talker.model, "--adapter", talker.run, *CERTAIN, text="hi\n\nagain\n")
    assert done.returncode == 0
    assert done.stdout == "Hello!\nHello again!\n"
    assert "[thinking]\n| They greet.\n| So do I.\n" in done.stderr
    assert "\x1b" not in done.stdout + done.stderr


def test_reset_forgets_and_commands_are_not_questions(talker: Talker, command: Command) -> None:
    text = "hi\n/reset\nhi\n/effort loud\n/effort low\n/nope\n/help\n/quit\nhi\n"
    done = command("chat", talker.model, "--adapter", talker.run, *CERTAIN, text=text)
    assert done.returncode == 0
    assert done.stdout == "Hello!\nHello!\n"
    for words in ("forgotten", "allowed: low, medium, high", "effort: low", "no command /nope", "/developer TEXT"):
        assert words in done.stderr


def test_a_call_is_shown_and_without_its_result_the_turn_is_left_out(talker: Talker, command: Command) -> None:
    done = command("chat", talker.model, "--adapter", talker.run, *CERTAIN, text="sky\nhi\nagain\n")
    assert "[call of functions.look]\n| {}\n" in done.stderr
    assert "left out of the conversation" in done.stderr
    assert done.stdout == "Hello!\nHello again!\n"


def test_options_reach_the_prompt_and_the_sampler(
    talker: Talker, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def said(**options: Any) -> tuple[str, str]:
        monkeypatch.setattr("sys.stdin", io.StringIO("hi\n"))
        run_chat(str(talker.model), adapter=str(talker.run), seed=1, max_tokens=30, dtype="float32", **options)
        found = capsys.readouterr()
        return found.out, found.err

    hot = {"temperature": 3.0}
    assert "cut off after 30 tokens" in said(**hot)[1]
    found = [
        said(**hot, **more) for more in ({}, {}, {"effort": "high"}, {"developer": "x"}, {"system": "y"}, {"top_k": 1})
    ]
    assert found[0] == found[1]
    assert len(set(found)) == 5


def test_a_model_that_is_not_there_is_a_message(command: Command) -> None:
    done = command("chat", "none", text="hi\n")
    assert done.returncode == 2
    assert "no such folder" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_run_folder_answers_as_its_model_with_its_adapter(command: Command, talker: Talker) -> None:
    told = [
        command("chat", *model, *CERTAIN, text="hi\n").stdout
        for model in ((talker.run,), (talker.model, "--adapter", talker.run))
    ]
    assert told[0] == told[1]
    assert "Hello!" in told[0]


def test_in_a_terminal_thinking_is_dim_and_barred_and_a_tools_result_is_asked_for(talker: Talker) -> None:
    with terminal("chat", talker.model, "--adapter", talker.run, *CERTAIN) as screen:
        screen.wait_for("you> ")
        screen.type("hi\n")
        shown = screen.wait_for("Hello!")
        thinking, answer = shown.split("[answer]")
        assert "[thinking]" in thinking
        lines = thinking.replace("\x1b[2m", "").replace("\x1b[0m", "").splitlines()
        assert "| They greet." in lines
        assert "| So do I." in lines
        assert "\x1b[2m| " in thinking
        assert "\x1b[2m" not in answer.removeprefix("\n\x1b[0m")
        screen.wait_for("you> ")
        screen.type("again\n")
        screen.wait_for("Hello again!")
        screen.wait_for("you> ")
        screen.type("/reset\n")
        screen.wait_for("you> ")
        screen.type("sky\n")
        screen.wait_for("result of functions.look")
        screen.type("sun\n")
        screen.wait_for("Sunny.")
        screen.wait_for("you> ")
        screen.type("\x04")
        assert screen.exit_code() == 0


@pytest.fixture
def endless(talker: Talker, tmp_path: Path) -> Path:
    """An untrained model that can't stop: the stops' rows of its head are zero, so some other token is likelier."""
    folder = Path(shutil.copytree(talker.model, tmp_path / "endless"))
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"][list(harmony_stops(Vocabulary.from_file(folder)))] = 0
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


def test_ctrl_c_stops_the_answer_and_not_the_program(endless: Path) -> None:
    with terminal("chat", endless, *CERTAIN, "--max-tokens", "100000") as screen:
        screen.wait_for("you> ")
        screen.type("\x03")
        screen.wait_for("Ctrl-D or /quit leaves")
        screen.wait_for("you> ")
        screen.type("go on\n")
        screen.wait_for("[answer]")
        screen.type("\x03")
        screen.wait_for("[stopped]")
        screen.wait_for("you> ")
        screen.type("/quit\n")
        assert screen.exit_code() == 0


def test_ctrl_c_that_comes_before_the_wait_for_keys_is_heard_without_another_key(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Delivered to another thread, a signal leaves the waiting call asleep, as one that came just before it does."""
    keyboard, end = pty.openpty()
    waiting, heard = threading.Event(), threading.Event()
    in_time: list[bool] = []

    def read_line() -> str | None:
        waiting.set()
        return _read_line()

    def press() -> None:
        waiting.wait()
        time.sleep(0.3)
        signal.pthread_kill(threading.get_ident(), signal.SIGINT)
        in_time.append(heard.wait(5))
        os.write(keyboard, b"hi\nhi\n")

    with os.fdopen(end) as terminal_input:
        monkeypatch.setattr("sys.stdin", terminal_input)
        monkeypatch.setattr("ossia.chat._read_line", read_line)
        screen, presser = Screen(), threading.Thread(target=press)
        presser.start()
        with pytest.raises(KeyboardInterrupt):
            next(screen.questions())
        heard.set()
        assert next(screen.questions()) == "hi"
        presser.join()
    os.close(keyboard)
    assert in_time == [True]
    assert capfd.readouterr().err.count("you> ") == 2


def test_ctrl_c_ends_a_pipe(endless: Path) -> None:
    with subprocess.Popen(
        [*START, "chat", endless, *CERTAIN, "--max-tokens", "100000"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as program:
        assert program.stdin
        assert program.stdout
        program.stdin.write(b"go on\nand on\n")
        program.stdin.flush()
        program.stdout.read(1)
        program.send_signal(signal.SIGINT)
        assert program.wait(60) == 130


def test_control_characters_that_a_model_says_are_spelled_out(capsys: pytest.CaptureFixture[str]) -> None:
    screen = Screen()
    screen.begin(None)
    screen.write("a\x1b[2Jb\n")
    screen.write("c")
    screen.end()
    assert capsys.readouterr().out == "a\\x1b[2Jb\nc\n"
