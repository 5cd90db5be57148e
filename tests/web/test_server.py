"""The server itself: who may come in, what is too much, who leaves early, what is counted."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

import httpx2
import pytest
from openai import APIError, AuthenticationError, InternalServerError, NotFoundError, RateLimitError

from ossia.errors import UserError
from ossia.web.address import own_names
from ossia.web.hosting import read_wanted
from tests.web.conftest import GREET, Live, Model, serving, wait_until

CHAT = "/v1/chat/completions"


@pytest.fixture(scope="module")
def named(model: Model) -> Iterator[Live]:
    """A server that answers to this machine's names and to one more."""
    with serving(model, hosts=own_names("127.0.0.1", ["chat.example.com"])) as live:
        yield live


def long_body(endless: dict[str, int], **more: Any) -> dict[str, Any]:
    """A body whose answer takes far longer than the test."""
    return {"model": "base", "prompt": "x", "max_tokens": 50_000, "logit_bias": endless, **more}


def test_models_and_facts_are_listed(live: Live) -> None:
    assert [model.id for model in live.client.models.list()] == ["base", "talker"]
    assert live.client.models.retrieve("talker").parent == "base"
    info = httpx2.get(f"{live.url}/v1/ossia/info").json()
    assert info["models"] == [
        {"id": "base", "adapter": False, "parent": None, "context_length": live.served.max_length},
        {"id": "talker", "adapter": True, "parent": "base", "context_length": live.served.max_length},
    ]
    assert info["dtype"] == "float32"


def test_an_unknown_model_is_a_404_in_openais_shape(live: Live) -> None:
    with pytest.raises(NotFoundError) as error:
        live.client.chat.completions.create(model="gpt-6", messages=[GREET])
    assert (error.value.code, error.value.param) == ("model_not_found", "model")
    with pytest.raises(NotFoundError):
        live.client.models.retrieve("gpt-6")


@pytest.mark.parametrize(
    ("path", "sent", "status"),
    [
        (CHAT, {"content": b"{", "headers": {"Content-Type": "application/json"}}, 400),
        (CHAT, {"content": b"[" * 100_000, "headers": {"Content-Type": "application/json"}}, 400),
        (CHAT, {"content": b'{"a": NaN}', "headers": {"Content-Type": "application/json"}}, 400),
        (CHAT, {"content": b"\xff", "headers": {"Content-Type": "application/json"}}, 400),
        (CHAT, {"json": [1]}, 400),
        (CHAT, {"content": b"{}"}, 415),
        ("/v1/nothing", {"json": {}}, 404),
        ("/health", {"json": {}}, 405),
    ],
    ids=str,
)
def test_every_refusal_has_openais_shape(live: Live, path: str, sent: dict[str, Any], status: int) -> None:
    found = httpx2.post(f"{live.url}{path}", **sent)
    assert found.status_code == status
    assert found.json()["error"].keys() == {"message", "type", "param", "code"}
    assert found.headers["x-request-id"].startswith("req_")


def test_a_body_that_is_too_large_is_refused_whether_it_says_its_length_or_not(model: Model) -> None:
    with serving(model, max_body_bytes=1000) as live:
        headers = {"Content-Type": "application/json"}
        for content in (b" " * 2000, iter([b" " * 600] * 3)):
            found = httpx2.post(f"{live.url}{CHAT}", content=content, headers=headers)
            assert (found.status_code, found.json()["error"]["code"]) == (413, "body_too_large")


def test_a_context_that_is_too_long_says_how_long_it_is(model: Model) -> None:
    with serving(model, max_length=300) as live:
        body = {"model": "talker", "messages": [{"role": "user", "content": "x " * 300}]}
        for more in ({}, {"stream": True}):
            found = httpx2.post(f"{live.url}{CHAT}", json={**body, **more})
            error = found.json()["error"]
            assert (found.status_code, error["code"]) == (400, "context_length_exceeded")
            assert "300 tokens" in error["message"]
        fits = {**body, "messages": [GREET], "temperature": 0, "max_tokens": 300}
        assert httpx2.post(f"{live.url}{CHAT}", json=fits).status_code == 200


def test_the_key_is_asked_for_where_there_is_one(model: Model) -> None:
    with serving(model, api_key="sesame") as live:
        assert live.client.models.list().data
        stranger = live.client.with_options(api_key="wrong")
        with pytest.raises(AuthenticationError) as error:
            stranger.chat.completions.create(model="talker", messages=[GREET])
        assert error.value.code == "invalid_api_key"
        assert httpx2.get(f"{live.url}/v1/models").status_code == 401
        for given, status in (
            ("bearer sesame", 200),
            ("BEARER  sesame", 200),
            ("Basic sesame", 401),
            ("sesame", 401),
            ("Bearer", 401),
            ("bearer Sesame", 401),
        ):
            headers = {"Authorization": given}
            assert httpx2.get(f"{live.url}/v1/models", headers=headers).status_code == status, given
        assert httpx2.get(f"{live.url}/metrics").status_code == 401
        assert httpx2.get(f"{live.url}/health").status_code == 200


def test_who_hangs_up_frees_the_slot(model: Model, endless: dict[str, int]) -> None:
    with serving(model, max_batch=2, max_queue=1) as live:
        worker = live.worker
        with live.client.completions.create(**long_body(endless, stream=True)) as stream:
            for _ in zip(range(3), stream, strict=False):
                pass
            assert worker.load().running == 1
        wait_until(lambda: worker.outstanding == 0 and worker.load().running == 0)
        with pytest.raises(httpx2.TimeoutException):
            httpx2.post(f"{live.url}/v1/completions", json=long_body(endless, n=2), timeout=0.5)
        wait_until(lambda: worker.outstanding == 0 and worker.load().running == 0)
        assert worker.load().blocks_used == 0
        with socket.create_connection(("127.0.0.1", int(live.url.rsplit(":", 1)[1]))) as raw:
            raw.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n")
            raw.sendall(b"Content-Length: 500\r\n\r\n{")
        assert live.client.completions.create(**{**long_body(endless), "max_tokens": 2}).usage.completion_tokens == 2


def test_a_choice_that_a_stop_text_ends_frees_its_slot_while_the_others_go_on(
    model: Model, endless: dict[str, int]
) -> None:
    with serving(model) as live:
        body = long_body(endless, n=2, seed=7)
        first, second = (choice.text for choice in live.client.completions.create(**{**body, "max_tokens": 30}).choices)
        stop = next(first[at : at + 4] for at in range(len(first)) if first[at : at + 4] not in second)
        with live.client.completions.create(**{**body, "stop": stop, "stream": True}) as stream:
            assert any(chunk.choices[0].finish_reason == "stop" for chunk in stream)
            wait_until(lambda: live.worker.load().running == 1)


def test_a_full_server_says_when_to_come_back(model: Model, endless: dict[str, int]) -> None:
    with serving(model, max_batch=2, max_queue=1) as live:
        streams = [live.client.completions.create(**long_body(endless, stream=True)) for _ in range(3)]
        wait_until(lambda: live.worker.load()[:2] == (2, 1))
        with pytest.raises(RateLimitError) as error:
            live.client.completions.create(**long_body(endless))
        assert error.value.response.headers["retry-after"] == "1"
        assert error.value.code == "overloaded"
        found = httpx2.post(f"{live.url}/v1/completions", json=long_body(endless, n=4))
        assert (found.status_code, found.json()["error"]["param"]) == (400, "n")
        streams.pop(0).close()
        wait_until(lambda: live.worker.load()[:2] == (2, 0))
        for stream in streams:
            stream.close()
        wait_until(lambda: live.worker.outstanding == 0)


def test_a_fault_in_the_engine_ends_answers_with_an_id_that_is_in_the_log(
    model: Model, endless: dict[str, int], caplog: pytest.LogCaptureFixture
) -> None:
    with serving(model) as live:
        stream = live.client.completions.create(**long_body(endless, stream=True))
        next(iter(stream))
        session = _BadSession()
        live.worker._step = session.step  # type: ignore[method-assign]
        with pytest.raises(Exception, match=r"its log says what happened under err_\w+") as error:
            list(stream)
        number = str(error.value).split()[-1]
        assert number in caplog.text
        del live.worker._step
        assert not live.worker._running
        assert not live.worker._numbers
        answer = live.client.chat.completions.create(model="talker", messages=[GREET], temperature=0)
        assert answer.choices[0].message.content == "Hello!"


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_bug_in_the_engines_thread_ends_answers_and_the_server_says_that_it_is_over(
    model: Model, endless: dict[str, int]
) -> None:
    with serving(model) as live:
        stream = live.client.completions.create(**long_body(endless, stream=True))
        next(iter(stream))
        live.worker._step = _explode  # type: ignore[method-assign]
        with pytest.raises(APIError, match=r"under err_\w+"):
            list(stream)
        wait_until(lambda: live.worker.dead)
        found = httpx2.get(f"{live.url}/health")
        assert (found.status_code, found.json()["status"]) == (503, "engine stopped")
        refused = httpx2.post(f"{live.url}/v1/completions", json=long_body(endless))
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "engine_stopped")


def _explode(*_: object) -> None:
    raise AssertionError("a bug")


def test_a_fault_in_a_route_is_a_500_with_an_id_and_no_trace(
    live: Live, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("ossia.web.app.Head.new", _explode)
    found = httpx2.post(f"{live.url}{CHAT}", json={"model": "talker", "messages": [GREET]})
    assert found.status_code == 500
    error = found.json()["error"]
    assert (error["type"], error["code"]) == ("server_error", "internal_error")
    assert error["message"].split()[-1] in caplog.text
    assert "a bug" not in found.text
    assert "a bug" in caplog.text


class _BadSession:
    def step(self, *_: object) -> None:
        raise UserError("the model's output is not finite")


def test_an_answer_that_cannot_go_on_fails_alone(live: Live, monkeypatch: pytest.MonkeyPatch) -> None:
    def push(constraint: object, token: int, row: int, failed: dict[int, str]) -> None:
        failed[row] = "its schema leads nowhere"

    monkeypatch.setattr("ossia.engine.session._push", push)
    ask = {"model": "talker", "messages": [GREET], "temperature": 0}
    with pytest.raises(InternalServerError, match="leads nowhere") as caught:
        live.client.chat.completions.create(**ask, n=2, response_format={"type": "json_object"})
    assert caught.value.code == "answer_stuck"
    assert live.worker.outstanding == 0
    assert live.client.chat.completions.create(**ask).choices[0].message.content == "Hello!"


def test_what_happens_is_counted(model: Model) -> None:
    with serving(model) as live:
        answer = live.client.chat.completions.create(model="talker", messages=[GREET], temperature=0)
        httpx2.get(f"{live.url}/anything/at/all")
        httpx2.get(f"{live.url}/v1/models/talker")
        text = httpx2.get(f"{live.url}/metrics").text
        usage, of = answer.usage, '{model="base"}'
        for line in (
            f'ossia_http_requests_total{{route="{CHAT}",status="200"}} 1.0',
            'ossia_http_requests_total{route="other",status="404"} 1.0',
            'ossia_http_requests_total{route="/v1/models",status="200"} 1.0',
            f"ossia_prompt_tokens_total{of} {usage.prompt_tokens}.0",
            f"ossia_completion_tokens_total{of} {usage.completion_tokens}.0",
            f"ossia_time_to_first_token_seconds_count{of} 1.0",
            f"ossia_inter_token_seconds_count{of} {usage.completion_tokens - 1}.0",
            f"ossia_requests_running{of} 0.0",
            f"ossia_requests_waiting{of} 0.0",
            f"ossia_cache_blocks_used{of} 0.0",
        ):
            assert f"\n{line}\n" in text, line


def test_requests_at_the_same_time_share_the_batch(live: Live) -> None:
    def ask(found: list[str]) -> None:
        answer = live.client.chat.completions.create(model="talker", messages=[GREET], temperature=0)
        found.append(answer.choices[0].message.content)

    found: list[str] = []
    threads = [threading.Thread(target=ask, args=(found,)) for _ in range(12)]
    for thread in threads:
        thread.start()
    begun = time.monotonic()
    for thread in threads:
        thread.join()
    assert found == ["Hello!"] * 12
    assert time.monotonic() - begun < 60


@pytest.mark.parametrize("given", ["x", "=runs/a", "a b=runs/a", "x=nowhere"])
def test_an_adapter_that_is_not_name_and_folder_is_refused(given: str) -> None:
    with pytest.raises(UserError, match=r"NAME=DIR|no such folder"):
        read_wanted(["x/base"], [given])


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"Host": "localhost"}, 200),
        ({"Host": "LocalHost:8000"}, 200),
        ({"Host": "127.0.0.1:1"}, 200),
        ({"Host": "[::1]:8000"}, 200),
        ({"Host": "chat.example.com"}, 200),
        ({"Host": "rebound.example.net:8000"}, 403),
        ({"Host": "localhost.example.net"}, 403),
        ({"Host": "127.0.0.1.example.net"}, 403),
        ({"Host": "localhost@example.net"}, 403),
        ({"Host": "[::1"}, 403),
        ({"Host": "192.168.0.7"}, 403),
        ({"Origin": "http://localhost:3000"}, 200),
        ({"Origin": "https://chat.example.com"}, 200),
        ({"Origin": "https://example.net"}, 403),
        ({"Origin": "http://[::1"}, 403),
        ({"Origin": "null"}, 403),
        ({"Origin": "file://"}, 403),
    ],
    ids=str,
)
def test_a_page_of_another_site_gets_nothing_by_whatever_name_it_calls_the_server(
    named: Live, headers: dict[str, str], status: int
) -> None:
    for path in ("/", "/page/main.js", "/health", "/metrics", "/v1/models", "/v1/ossia/info"):
        assert httpx2.get(f"{named.url}{path}", headers=headers).status_code == status, path
    for stream in (False, True):
        body = {"model": "talker", "messages": [GREET], "max_tokens": 2, "stream": stream}
        answer = httpx2.post(f"{named.url}{CHAT}", json=body, headers=headers)
        assert answer.status_code == status
        if status == 403:
            error = answer.json()["error"]
            assert error["code"] == "host_not_allowed"
            assert next(iter(headers.values())) in error["message"]
            assert "--allow-host NAME" in error["message"]


def test_whoever_sends_no_host_or_several_is_no_browser_or_is_refused(named: Live) -> None:
    def status_of(request: bytes) -> bytes:
        with socket.create_connection(("127.0.0.1", int(named.url.rsplit(":", 1)[1]))) as raw:
            raw.sendall(request)
            return raw.makefile("rb").readline().split()[1]

    assert status_of(b"GET /health HTTP/1.0\r\n\r\n") == b"200"
    hosts = b"Host: localhost\r\nHost: example.net\r\nConnection: close\r\n"
    assert status_of(b"GET /health HTTP/1.1\r\n" + hosts + b"\r\n") in (b"400", b"403")


def test_no_other_site_may_read_an_answer_or_send_json(live: Live) -> None:
    origin = {"Origin": "https://example.net"}
    asking = {**origin, "Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "content-type"}
    found = httpx2.options(f"{live.url}{CHAT}", headers=asking)
    assert found.status_code == 405
    read = httpx2.get(f"{live.url}/v1/models", headers=origin)
    for response in (found, read):
        assert not [name for name in response.headers if name.lower().startswith("access-control")]
    simple = httpx2.post(f"{live.url}{CHAT}", content=b"{}", headers={**origin, "Content-Type": "text/plain"})
    assert simple.status_code == 415, "what a form may send isn't read"


def test_names_are_compared_where_only_this_machine_listens_or_some_were_given() -> None:
    here = {"localhost", "127.0.0.1", "::1"}
    assert own_names("127.0.0.1") == here
    assert own_names("127.0.0.2") == here | {"127.0.0.2"}
    assert own_names("::1", ["Chat.Example.com", "[fe80::1]"]) == here | {"chat.example.com", "fe80::1"}
    assert own_names("0.0.0.0") is own_names("127.0.0.1", ["*"]) is None
    assert own_names("0.0.0.0", ["box"]) == here | {"0.0.0.0", "box"}
    for wrong in ("http://box", "box:8000", "", "a b", "abc:80"):
        with pytest.raises(UserError, match=f"--allow-host {wrong}: expected a name alone"):
            own_names("127.0.0.1", [wrong])
