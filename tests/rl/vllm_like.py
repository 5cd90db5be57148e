"""A server that answers as vLLM 0.32 does where a rollout asks it, from our own engine: its logprobs are true.

Several threads take requests, one at a time samples. What it was asked is kept, and it can be told to fail.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import torch

from ossia.engine import Engine, Request, Sampling
from ossia.model.lora import Lora
from ossia.model.open import open_model
from ossia.model.peft import find_adapter, load_adapter

MODEL = "served"
POSITIONS = 256
Answer = tuple[int, Any]


@dataclass
class VllmLike:
    """The server's state.

    loaded       adapters by name, as now
    log          what was loaded and unloaded, in order
    asked        the model of each completion, in order
    takes        what becomes of an adapter that is loaded: None, it isn't followed
    loads        whether adapters can be loaded at all
    dies_after   completions, after which every request is broken off
    fails_once   the next completion is answered by 500
    changes      what is done to a completion before it is sent
    """

    folder: str
    dtype: str = "float32"
    loaded: dict[str, Lora | None] = field(default_factory=dict)
    log: list[str] = field(default_factory=list)
    asked: list[str] = field(default_factory=list)
    takes: Callable[[Lora], Lora | None] = lambda lora: lora
    loads: bool = True
    dies_after: int | None = None
    fails_once: bool = False
    changes: Callable[[dict[str, Any]], object] = lambda choice: None

    def __post_init__(self) -> None:
        self.lock = threading.Lock()
        self.model, self.vocab = open_model(self.folder, dtype=self.dtype, weights="auto", device="cpu")

    @property
    def dead(self) -> bool:
        return self.dies_after is not None and len(self.asked) >= self.dies_after

    def models(self) -> Answer:
        base = {"id": MODEL, "parent": None, "max_model_len": POSITIONS}
        return 200, {"data": [base, *({"id": name, "parent": MODEL} for name in self.loaded)]}

    def load(self, body: Mapping[str, Any]) -> Answer:
        name, path = body["lora_name"], body["lora_path"]
        if not self.loads:
            return 404, {"detail": "Not Found"}
        if not name or not path:
            return error(400, "Both 'lora_name' and 'lora_path' must be provided.")
        if name in self.loaded:
            return error(400, f"The lora adapter '{name}' has already been loaded.")
        if not Path(path).is_dir():
            return error(404, f"No adapter found for {path}")
        lora = load_adapter(find_adapter(Path(path)), self.model.arch, torch.device("cpu"))
        self.loaded[name] = self.takes(lora)
        self.log.append(f"load {name}")
        return 200, f"Success: LoRA adapter '{name}' added successfully."

    def unload(self, body: Mapping[str, Any]) -> Answer:
        if body["lora_name"] not in self.loaded:
            return error(404, f"The lora adapter '{body['lora_name']}' cannot be found.")
        del self.loaded[body["lora_name"]]
        self.log.append(f"unload {body['lora_name']}")
        return 200, "Success"

    def complete(self, body: Mapping[str, Any]) -> Answer:
        if body["model"] not in (MODEL, *self.loaded):
            return error(404, f"The model `{body['model']}` does not exist.")
        self.asked.append(body["model"])
        if self.fails_once:
            self.fails_once = False
            return error(500, "EngineCore encountered an issue.")
        assert (body["top_p"], body["top_k"], body["min_p"], body["logprobs"]) == (1.0, 0, 0.0, 0)
        assert (body["return_token_ids"], body["skip_special_tokens"]) == (True, False)
        request = Request(
            body["prompt"],
            Sampling(temperature=body["temperature"], seed=body["seed"]),
            body["max_tokens"],
            frozenset(body["stop_token_ids"]),
            adapter=body["model"],
        )
        (found,) = Engine(self.model, adapters={MODEL: None, **self.loaded}, max_batch=1).generate([request])
        choice = {
            "index": 0,
            "text": self.vocab.decode(found.ids),
            "token_ids": found.ids,
            "logprobs": {"token_logprobs": found.logprobs, "tokens": [f"token_id:{number}" for number in found.ids]},
            "finish_reason": found.finish,
            "stop_reason": found.ids[-1] if found.finish == "stop" else None,
        }
        self.changes(choice)
        return 200, {"id": "cmpl-1", "object": "text_completion", "model": body["model"], "choices": [choice]}


def error(code: int, message: str) -> Answer:
    """As vLLM says it."""
    return code, {"error": {"message": message, "type": "Error", "param": None, "code": code}}


@contextmanager
def serving(state: VllmLike, port: int = 0) -> Iterator[str]:
    """The server's address."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.answer({"/v1/models": lambda _: state.models()}, {})

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            routes = {
                "load_lora_adapter": state.load,
                "unload_lora_adapter": state.unload,
                "completions": state.complete,
            }
            self.answer({f"/v1/{name}": route for name, route in routes.items()}, body)

        def answer(self, routes: Mapping[str, Callable[[Mapping[str, Any]], Answer]], body: Mapping[str, Any]) -> None:
            with state.lock:
                if state.dead:
                    self.close_connection = True
                    return
                code, said = routes[self.path](body) if self.path in routes else (404, {"detail": "Not Found"})
            data = json.dumps(said).encode()
            self.send_response(code)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *words: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}/v1"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
