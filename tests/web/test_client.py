"""`ossia chat http://...`: the same conversation as in one's own process, through the server."""

from __future__ import annotations

import io
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
from typer.testing import CliRunner

from ossia.cli import app
from ossia.errors import UserError
from ossia.web.client import run_remote_chat
from tests.web.conftest import Live, Model, serving

CERTAIN = {"temperature": 0, "max_tokens": 200}


def talk(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], url: str, said: str, **options: Any
) -> tuple[str, str]:
    """What comes on stdout and on stderr when `said` is piped in."""
    monkeypatch.setattr("sys.stdin", io.StringIO(said))
    run_remote_chat(url, settings={**CERTAIN, **options.pop("settings", {})}, **options)
    found = capsys.readouterr()
    return found.out, found.err


def test_answers_go_to_stdout_and_thinking_to_stderr(
    live: Live, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out, err = talk(monkeypatch, capsys, live.url, "hi\n/reset\ncount\n", model="talker")
    assert out == "Hello!\none, two, three, four\n"
    assert "[thinking]\n| They greet.\n| So do I.\n" in err
    out, err = talk(monkeypatch, capsys, f"{live.url}/v1/", "hi\n", model="talker", settings={"max_tokens": 12})
    assert out == ""
    assert "cut off after" in err


def test_what_the_server_says_no_to_is_a_message(
    live: Live, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(UserError, match="there is no model 'gpt-6'; allowed: base, talker"):
        talk(monkeypatch, capsys, live.url, "hi\n", model="gpt-6")
    with pytest.raises(UserError, match="presence_penalty"):
        talk(monkeypatch, capsys, live.url, "hi\n", settings={"presence_penalty": 3})
    with pytest.raises(UserError, match="can't be reached"):
        talk(monkeypatch, capsys, "http://127.0.0.1:9", "hi\n")


@pytest.mark.parametrize("url", ["http://", "http://[::1", "https:///v1"])
def test_what_is_no_address_is_said(url: str) -> None:
    with pytest.raises(UserError, match="expected an address like"):
        run_remote_chat(url, settings={})


def test_a_proxy_of_the_machine_is_not_asked_for_the_machine_itself(
    live: Live, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    monkeypatch.delenv("no_proxy", raising=False)
    assert talk(monkeypatch, capsys, live.url, "hi\n", model="talker")[0] == "Hello!\n"


def test_the_key_is_sent(model: Model, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    with serving(model, api_key="sesame") as live:
        assert talk(monkeypatch, capsys, live.url, "hi\n", model="talker", api_key="sesame")[0] == "Hello!\n"
        with pytest.raises(UserError, match=r"(?s)401.*--api-key"):
            talk(monkeypatch, capsys, live.url, "hi\n", model="talker")


def test_the_command_leaves_the_length_of_answers_to_the_server(model: Model) -> None:
    with serving(model, max_length=1000) as live:
        for more in ((), ("--max-tokens", "300")):
            words = ["chat", live.url, "--adapter", "talker", "--temperature", "0", *more]
            done = CliRunner().invoke(app, words, input="hi\n")
            assert (done.exit_code, done.stdout) == (0, "Hello!\n"), done.stderr


def test_options_that_the_server_decides_about_are_refused() -> None:
    for words in (["http://x", "--dtype", "float32"], ["folder", "--api-key", "k"]):
        assert CliRunner().invoke(app, ["chat", *words]).exit_code == 2


class Other(BaseHTTPRequestHandler):
    """A server of another make: `reasoning` alone, no names in later deltas, several calls at once."""

    asked: list[dict[str, Any]] = []  # noqa: RUF012 - one server a test
    answers: list[list[dict[str, Any]]] = []  # noqa: RUF012
    models: Any = {"data": [{"id": "m"}]}  # noqa: RUF012

    def do_GET(self) -> None:
        self._send(json.dumps(self.models))

    def do_POST(self) -> None:
        self.asked.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
        *deltas, finish = self.answers.pop(0)
        chunks = [{"choices": [{"index": 0, "delta": delta, "finish_reason": None}]} for delta in deltas]
        chunks += [{"choices": [{"index": 0, "delta": {}, **finish}]}, {"choices": [], "usage": {}}]
        self._send("".join(f"data: {json.dumps(chunk)}\n\n" for chunk in chunks) + ": a remark\n\ndata: [DONE]\n\n")

    def _send(self, text: str) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(len(text.encode())))
        self.end_headers()
        self.wfile.write(text.encode())

    def log_message(self, *_: object) -> None:
        """Nothing."""


send = Other._send


@pytest.fixture
def other() -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Other) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        Other.asked.clear()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.mark.parametrize("models", [[], {}, {"data": None}, {"data": ["m"]}, {"data": [{"name": "m"}]}])
def test_a_server_that_lists_no_models_is_no_server_to_chat_with(
    other: str, monkeypatch: pytest.MonkeyPatch, models: Any
) -> None:
    monkeypatch.setattr(Other, "models", models)
    with pytest.raises(UserError, match="answered no list of models"):
        run_remote_chat(other, settings={})


def test_an_error_in_the_middle_of_a_stream_is_said_and_an_empty_one_is_none(
    other: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(
        Other, "_send", lambda self, text: send(self, text.replace('{"choices"', '{"error": null, "choices"'))
    )
    Other.answers[:] = [[{"content": "Done."}, {"finish_reason": "stop"}]]
    assert talk(monkeypatch, capsys, other, "go\n")[0] == "Done.\n"
    monkeypatch.setattr(
        Other,
        "_send",
        lambda self, text: send(self, text.replace('{"choices"', '{"error": "out of memory", "choices"')),
    )
    Other.answers[:] = [[{"content": "Done."}, {"finish_reason": "stop"}]]
    with pytest.raises(UserError, match="out of memory"):
        talk(monkeypatch, capsys, other, "go\n")


def test_another_servers_calls_are_shown_and_their_results_go_back_with_the_reasoning(
    other: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def call(index: int, **function: str) -> dict[str, Any]:
        return {"tool_calls": [{"index": index, "id": f"c{index}", "type": "function", "function": function}]}

    Other.answers[:] = [
        [
            {"role": "assistant", "content": None},
            {"reasoning": "I "},
            {"reasoning": "look."},
            {"content": "One moment."},
            call(0, name="a", arguments=""),
            call(0, arguments='{"x":1}'),
            call(1, name="b", arguments="{}"),
            {"finish_reason": "tool_calls"},
        ],
        [{"content": "Do"}, {"content": "ne."}, {"finish_reason": "stop"}],
    ]
    monkeypatch.setattr("ossia.chat.Screen.ask", lambda self, what: f"R{what[10:21]}")
    out, err = talk(monkeypatch, capsys, other, "go\n", developer="Be kind.")
    assert out == "One moment.\nDone.\n"  # a preamble is content until the call comes
    assert "| I look.\n" in err
    assert '[call of functions.a]\n| {"x":1}\n' in err
    system, question, made, *results = Other.asked[1]["messages"]
    assert (system, question) == ({"role": "system", "content": "Be kind."}, {"role": "user", "content": "go"})
    assert (made["content"], made["reasoning_content"]) == ("One moment.", "I look.")
    assert [one["function"]["name"] for one in made["tool_calls"]] == ["a", "b"]
    assert [one["tool_call_id"] for one in results] == [one["id"] for one in made["tool_calls"]]
    assert [one["content"] for one in results] == ["Rfunctions.a", "Rfunctions.b"]
