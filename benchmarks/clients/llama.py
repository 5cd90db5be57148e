"""llama.cpp's own server, from the prebuilt package, asked over HTTP for the answers to prompts."""

from __future__ import annotations

from dataclasses import replace
from importlib import metadata
from pathlib import Path

from benchmarks.clients.compare import Answers, Questions
from benchmarks.clients.http import post
from ossia.web.gguf import LlamaOptions, start_llama

EXACT = LlamaOptions(
    threads=1, ctx_size=1024, parallel=1, cache_type_k="f32", cache_type_v="f32", flash_attention=False
)


def llamas_answers(file: Path, questions: Questions, *, lora: Path | None = None) -> Answers:
    """Greedy answers alone: the server tells no logits. `lora`: an adapter's file, on the model."""
    server = start_llama(file, EXACT if lora is None else replace(EXACT, lora=[str(lora)]))
    answers = []
    for ids in questions.prompts:
        body = {"prompt": ids, "n_predict": questions.max_new, "temperature": 0, "return_tokens": True}
        answers.append(post(f"{server.listening_address}/completion", body)["tokens"])
    return Answers([], answers, {"xllamacpp": metadata.version("xllamacpp")})
