"""`ossia serve` as a process: it says where it is, drains after one signal and stops after two."""

from __future__ import annotations

import errno
import os
import re
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx2
import pytest
from openai import APIError, OpenAI

from ossia.errors import UserError
from ossia.web.address import listen
from ossia.web.serve import run_server
from tests.e2e.conftest import START
from tests.web.conftest import GREET, Talker, wait_until


class Process:
    """A server that was started as a command."""

    def __init__(self, *arguments: str | Path, options: tuple[str, ...] = ("--dtype", "float32")) -> None:
        words = [*START, "serve", *map(str, arguments), "--port", "0", *options]
        self.popen = subprocess.Popen(words, stderr=subprocess.PIPE, text=True)
        self.said: list[str] = []
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        wait_until(lambda: self.url or self.popen.poll() is not None, 60)
        assert self.url, self.text

    @property
    def text(self) -> str:
        return "".join(self.said)

    @property
    def url(self) -> str:
        found = re.search(r"http://127\.0\.0\.1:\d+", self.text)
        return found[0] if found else ""

    def _read(self) -> None:
        assert self.popen.stderr is not None
        for line in self.popen.stderr:
            self.said.append(line)

    def end(self) -> int:
        """The exit code."""
        code = self.popen.wait(30)
        self._reader.join()
        assert self.popen.stderr is not None
        self.popen.stderr.close()
        return code


@contextmanager
def serving(*arguments: str | Path) -> Iterator[Process]:
    process = Process(*arguments)
    try:
        yield process
    finally:
        process.popen.kill()
        process.end()


def stream_of(url: str, endless: dict[str, int], num: int) -> Iterator[str]:
    """Text of an answer of `num` tokens, as it comes."""
    client = OpenAI(base_url=f"{url}/v1", api_key="-", max_retries=0)
    body = {"model": "model", "prompt": "x", "max_tokens": num, "logit_bias": endless}
    for chunk in client.completions.create(stream=True, **body):  # type: ignore[call-overload]
        yield chunk.choices[0].text


@pytest.mark.slow
def test_one_signal_drains_and_the_running_answer_is_whole(talker: Talker, endless: dict[str, int]) -> None:
    with serving(talker.model, "--adapter", f"talker={talker.run}") as process:
        url = process.url
        client = OpenAI(base_url=f"{url}/v1", api_key="-", max_retries=0)
        answer = client.chat.completions.create(model="talker", messages=[GREET], temperature=0)  # type: ignore[list-item]
        assert answer.choices[0].message.content == "Hello!"
        running = stream_of(url, endless, 400)
        texts = [next(running)]
        process.popen.send_signal(signal.SIGTERM)
        wait_until(lambda: "SIGTERM" in process.text)
        refused = httpx2.post(f"{url}/v1/completions", json={"model": "model", "prompt": "x"})
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "shutting_down")
        assert httpx2.get(f"{url}/health").json()["status"] == "draining"
        texts += running
        assert len("".join(texts)) > 300
        assert process.end() == 0
        assert "Traceback" not in process.text


@pytest.mark.slow
def test_a_second_signal_stops_at_once_and_says_what_was_broken_off(talker: Talker, endless: dict[str, int]) -> None:
    with serving(talker.model, "--allow-host", "box") as process:
        for host, status in (("example.net", 403), ("box", 200), ("localhost", 200)):
            assert httpx2.get(f"{process.url}/health", headers={"Host": host}).status_code == status
        running = stream_of(process.url, endless, 100_000)
        next(running)
        process.popen.send_signal(signal.SIGTERM)
        wait_until(lambda: "SIGTERM" in process.text)
        begun = time.monotonic()
        process.popen.send_signal(signal.SIGTERM)
        with pytest.raises(APIError, match="shutting down"):
            list(running)
        assert process.end() == 130
        assert time.monotonic() - begun < 10
        assert "1 answer was broken off" in process.text
        assert "Traceback" not in process.text


def test_small_packets_of_an_answer_are_sent_at_once() -> None:
    with listen("127.0.0.1", 0) as listener, socket.create_connection(listener.getsockname()):
        connection, _ = listener.accept()
        with connection:
            assert connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


def test_what_cannot_be_served_is_said_before_the_model_is_read(talker: Talker) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        for options, said in (
            (
                {"port": taken.getsockname()[1]},
                rf"can't listen on 127.0.0.1 port {taken.getsockname()[1]}: {os.strerror(errno.EADDRINUSE)}\n",
            ),
            ({"port": 0, "adapters": ["x"]}, "expected NAME=DIR"),
            ({"port": 0, "api_key": ""}, "an empty key would let everybody in"),
            ({"port": 0, "api_key": "a b"}, "--api-key: allowed"),
            ({"port": 0, "allow_hosts": ["http://box"]}, "--allow-host http://box: expected a name alone"),
            ({"port": 0, "adapters": [f"model={talker.run}"]}, "choose another"),
            ({"port": 0, "max_length": 10**9}, "--max-length"),
        ):
            with pytest.raises(UserError, match=said):
                run_server([str(talker.model)], **options)
