"""llama.cpp's own server, from the prebuilt package, asked over HTTP for the answers to prompts."""

from __future__ import annotations

import json
import urllib.request
from importlib import metadata
from pathlib import Path
from typing import Any

from benchmarks.clients.compare import Answers, Questions
from ossia.web.gguf import LlamaOptions, start_llama

EXACT = LlamaOptions(threads=1, ctx_size=1024, parallel=1, cache_type_k="f32", cache_type_v="f32")


def llamas_answers(file: Path, questions: Questions) -> Answers:
    """Greedy answers alone: the server tells no logits."""
    server = start_llama(file, EXACT)
    answers = []
    for ids in questions.prompts:
        body = {"prompt": ids, "n_predict": questions.max_new, "temperature": 0, "return_tokens": True}
        answers.append(post(f"{server.listening_address}/completion", body)["tokens"])
    return Answers([], answers, {"xllamacpp": metadata.version("xllamacpp")})


def post(url: str, body: dict[str, Any]) -> Any:
    """JSON for JSON."""
    request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=120) as answer:
        return json.loads(answer.read())
