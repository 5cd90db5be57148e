"""A real server on loopback: a small model, its adapter that has learned a few conversations by heart, one engine.

The model itself is random and never stops; the adapter `talker` answers in proper Harmony at temperature 0.
"""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, NamedTuple

import pytest
import uvicorn
from openai import OpenAI
from openai.lib._parsing import type_to_response_format_param
from pydantic import BaseModel, ConfigDict

import ossia
from ossia.engine import Engine, harmony_stops
from ossia.engine.grammar import GrammarCompiler
from ossia.harmony import Renderer, Vocabulary
from ossia.model.open import open_model
from ossia.model.peft import find_adapter, load_adapter
from ossia.model.transformer import Transformer
from ossia.web.address import listen
from ossia.web.app import Server, create_app
from ossia.web.follow import Follower
from ossia.web.hosting import Hosted
from ossia.web.metrics import Metrics
from ossia.web.protocol.formats import read_format
from ossia.web.protocol.prompts import Served
from ossia.web.worker import Worker
from tests.conftest import MakeTiny
from tests.e2e.conftest import ARCH
from tests.web.browser import Browser, Page, chromium

GREET = {"role": "user", "content": "hi"}
WEATHER_TOOL = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Weather now.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
WEATHER = {"role": "user", "content": "Paris?"}
CALL = {"id": "a", "type": "function", "function": {"name": "get_weather", "arguments": '{"city":"Paris"}'}}
ROWS: list[dict[str, Any]] = [
    {"messages": [GREET, {"role": "assistant", "thinking": "They greet.\nSo do I.", "content": "Hello!"}]},
    {"messages": [{"role": "user", "content": "emoji"}, {"role": "assistant", "content": "Größe 🎉 done"}]},
    {
        "messages": [
            {"role": "user", "content": "count"},
            {"role": "assistant", "thinking": "1, 2, 3: one two.", "content": "one, two, three, four"},
        ]
    },
    {
        "tools": [WEATHER_TOOL],
        "messages": [
            WEATHER,
            {"role": "assistant", "thinking": "I look.", "content": "One moment.", "tool_calls": [CALL]},
            {"role": "tool", "tool_call_id": "a", "content": "19C"},
            {"role": "assistant", "thinking": "19.", "content": "It is 19C."},
        ],
    },
]


class Mood(BaseModel):
    """What a client's own class asks for."""

    model_config = ConfigDict(extra="forbid")
    mood: Literal["good", "bad"]
    sure: bool


MOOD_FORMAT: Any = type_to_response_format_param(Mood)
ROWS.append({"developer": read_format(MOOD_FORMAT, "", inner="json_schema").told, **ROWS[0]})


class Talker(NamedTuple):
    """A model's folder, and the run folder with the adapter that makes it talk."""

    model: Path
    run: Path


@pytest.fixture(scope="session")
def talker(tiny: MakeTiny, tmp_path_factory: pytest.TempPathFactory) -> Talker:
    """Trained once a session."""
    folder, model = tmp_path_factory.mktemp("talker"), tiny(ARCH)
    rows = folder / "rows.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    result = ossia.train(
        {
            "model": str(model),
            "dtype": "float32",
            "adapter": {"rank": 8, "targets": ["attention", "experts", "lm_head"]},
            "data": {"path": str(rows)},
            "max_length": 1024,
            "train": {
                "steps": 80,
                "tokens_per_step": 2048,
                "tokens_per_pack": 2048,
                "learning_rate": 1e-2,
                "warmup": 3,
                "save_every": 0,
            },
            "output": str(folder / "run"),
        }
    )
    return Talker(model, result.folder)


class Live(NamedTuple):
    """A server that runs: its address, what it consists of, and a client for it that never tries twice."""

    url: str
    server: Server
    client: OpenAI

    @property
    def worker(self) -> Worker:
        """The first model's engine."""
        return self.server.models[0].worker

    @property
    def served(self) -> Served:
        """The first model."""
        return self.server.models[0].served


class Model(NamedTuple):
    """What servers of the tests share."""

    engine_of: Any  # max_batch -> Engine
    talker: Transformer
    vocab: Vocabulary
    max_positions: int
    vocab_size: int


@pytest.fixture(scope="session")
def model(talker: Talker) -> Model:
    """The random model under the name `base`, with the adapter `talker`."""
    transformer, vocab = open_model(str(talker.model), dtype="float32", device="cpu")
    arch, base = transformer.arch, transformer.weights.checkpoint
    lora = load_adapter(find_adapter(talker.run), arch, transformer.device, base=base)

    def engine_of(max_batch: int) -> Engine:
        return Engine(transformer, vocab=vocab, adapters={"talker": lora}, max_batch=max_batch)

    talking = Transformer(transformer.weights, lora=lora)
    return Model(engine_of, talking, vocab, arch.max_positions, arch.vocab_size)


@contextmanager
def serving(
    model: Model,
    *,
    max_batch: int = 8,
    max_queue: int = 32,
    max_length: int | None = None,
    grammar: GrammarCompiler | None = None,
    **options: Any,
) -> Iterator[Live]:
    """A server with that model under the name `base`, with what `Server` takes beside."""
    served = Served(
        "base",
        model.vocab,
        Renderer(model.vocab),
        model.vocab_size,
        max_length or model.max_positions,
        int(time.time()),
        "float32",
        grammar,
        ("talker",),
        ("path/of/base",),
    )
    metrics = Metrics()
    worker = Worker(model.engine_of(max_batch), name="base", max_queue=max_queue, metrics=metrics)
    with running(Server((Hosted(served, worker),), metrics, **options)) as live:
        yield live


@contextmanager
def running(server: Server, *, every_s: float = 0.05) -> Iterator[Live]:
    """A server on a thread, which looks for newer checkpoints that often."""
    follower = Follower(server.followed, server.metrics, every_s=every_s)
    for one in server.models:
        one.worker.start()
    follower.start()
    listener = listen("127.0.0.1", 0)
    http = uvicorn.Server(uvicorn.Config(create_app(server), log_config=None, lifespan="off", ws="none"))
    thread = threading.Thread(target=lambda: asyncio.run(http.serve([listener])), daemon=True)
    thread.start()
    url = f"http://127.0.0.1:{listener.getsockname()[1]}"
    client = OpenAI(base_url=f"{url}/v1", api_key=server.api_key or "none", max_retries=0, timeout=60)
    try:
        yield Live(url, server, client)
    finally:
        client.close()
        http.should_exit = True
        thread.join()
        follower.stop()
        for one in server.models:
            one.worker.stop()
        server.render.shutdown()


@pytest.fixture(scope="session")
def live(model: Model) -> Iterator[Live]:
    """A server that tests share."""
    with serving(model, grammar=GrammarCompiler(model.vocab, model.vocab_size)) as live:
        yield live


@pytest.fixture
def endless(model: Model) -> dict[str, int]:
    """The `logit_bias` with which an answer never stops by itself."""
    return {str(number): -100 for number in harmony_stops(model.vocab)}


def wait_until(holds: Any, timeout_s: float = 20.0) -> None:
    """Until `holds()`. AssertionError if it never does."""
    end = time.monotonic() + timeout_s
    while not holds():
        assert time.monotonic() < end, "it never came true"
        time.sleep(0.01)


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    """One for all tests here; each has a page with a storage of its own."""
    with chromium(tmp_path_factory.mktemp("chromium")) as browser:
        yield browser


@pytest.fixture
def page(browser: Browser, live: Live) -> Iterator[Page]:
    """The page, freshly opened, with the model that talks and no chance in it; nothing may go wrong inside."""
    page = browser.new_page(live.url)
    from tests.web.page_steps import begin  # it needs this file

    begin(page)
    yield page
    assert page.problems() == []
    page.close()


@pytest.fixture
def chatter(model: Model, endless: dict[str, int]) -> dict[str, int]:
    """The `logit_bias` with which a message never ends."""
    return endless | {str(model.vocab.special[name]): -100 for name in ("<|end|>", "<|start|>")}
