"""vLLM's CPU build: its server in an environment of its own, asked over OpenAI's interface."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks.clients.chats import Said
from benchmarks.clients.compare import Answers, Questions
from benchmarks.clients.http import post, wait_for
from ossia.engine import Completion
from ossia.harmony import Vocabulary, parse_completion

NAME, ADAPTED = "trained", "adapted"
DATE = "2026-11-28"  # which it writes into every chat's system message: by itself today's, and every day other answers
# what it would take of the machine by itself: nearly all memory, every core, a look at the hub
ENV = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "OMP_NUM_THREADS": "2",
    "VLLM_HOST_IP": "127.0.0.1",
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_SYSTEM_START_DATE": DATE,
}


@contextmanager
def vllm_server(python: Path, model: Path, log: Path, *, adapter: Path | None = None) -> Iterator[str]:
    """Its address; float32.

    adapter  on attention alone, served as the model `adapted` beside the model `trained`
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = ["--served-model-name", NAME, "--dtype", "float32", "--enforce-eager", "--max-model-len", "1024"]
    options += ["--max-num-seqs", "4", "--host", "127.0.0.1", "--port", str(port)]
    options += ["--enable-auto-tool-choice", "--tool-call-parser", "openai"]
    if adapter is not None:
        options += ["--enable-lora", "--max-lora-rank", "8", "--lora-modules", f"{ADAPTED}={adapter}"]
        options += ["--lora-target-modules", "qkv_proj", "o_proj"]
    command = [str(python), "-m", "vllm.entrypoints.openai.api_server", "--model", str(model), *options]
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    with log.open("wb") as words:
        process = subprocess.Popen(command, env=env | ENV, stdout=words, stderr=words, start_new_session=True)
        url = f"http://127.0.0.1:{port}"
        try:
            wait_for(f"{url}/health", process, timeout_s=600)
            yield url
        finally:
            os.killpg(process.pid, signal.SIGTERM)  # its engine is a process of its own
            process.wait(timeout=60)


def vllms_answers(url: str, questions: Questions, *, model: str = NAME) -> tuple[list[list[float]], list[list[int]]]:
    """The logprob of each token of the texts but the first, given those before it; greedy answers to the prompts."""
    logprobs, answers = [], []
    for ids in questions.texts:
        body = {"model": model, "prompt": ids, "max_tokens": 1, "temperature": 0, "prompt_logprobs": 0}
        told = post(f"{url}/v1/completions", body)["choices"][0]["prompt_logprobs"]
        logprobs.append([one[str(token)]["logprob"] for token, one in zip(ids[1:], told[1:], strict=True)])
    for ids in questions.prompts:
        body = {"model": model, "prompt": ids, "max_tokens": questions.max_new, "temperature": 0}
        body |= {"return_token_ids": True, "stop_token_ids": list(questions.stops)}
        answers.append(post(f"{url}/v1/completions", body)["choices"][0]["token_ids"])
    return logprobs, answers


class Told(NamedTuple):
    """A chat: the ids of the prompt that it rendered itself, those of its answer, and what it made of them."""

    prompt: list[int]
    answer: list[int]
    said: Said


def vllms_chats(url: str, rows: Sequence[dict[str, Any]], *, max_tokens: int) -> list[Told]:
    """Greedy answers to chats; the calls' arguments are the text that it sent."""
    found = []
    for row in rows:
        body = {"model": NAME, "messages": row["messages"], "temperature": 0, "max_tokens": max_tokens}
        body |= {"return_token_ids": True, "reasoning_effort": row.get("reasoning_effort", "medium")}
        body |= {"tools": row["tools"]} if "tools" in row else {}
        answer = post(f"{url}/v1/chat/completions", body)
        (choice,) = answer["choices"]
        told = choice["message"]
        calls = tuple(
            (call["function"]["name"], call["function"]["arguments"]) for call in told.get("tool_calls") or ()
        )
        said = Said(told["content"] or "", told.get("reasoning") or "", calls, choice["finish_reason"])
        found.append(Told(answer["prompt_token_ids"], choice["token_ids"], said))
    return found


def as_vllm_tells(vocab: Vocabulary, completion: Completion, *, tools: bool) -> Said:
    """What vLLM 0.32 makes of sampled ids: its chats are taken apart by another rule than `Reply`'s.

    A message to anybody is a call, whatever its channel; its arguments are written anew where they are JSON. The others
    are thinking (analysis) or content (final, and commentary, also where there are calls), joined by one newline.

    tools  whether any were offered: calls are left out where none were
    """
    thinking, content, calls = [], [], []
    for message in parse_completion(vocab, completion.ids):
        if message.recipient is not None:
            calls.append((message.recipient.removeprefix("functions."), _anew(message.content)))
        elif message.content and message.channel == "analysis":
            thinking.append(message.content)
        elif message.content and message.channel in ("final", "commentary"):
            content.append(message.content)
    made = tuple(calls) if tools else ()
    return Said("\n".join(content), "\n".join(thinking), made, "tool_calls" if made else completion.finish)


def _anew(arguments: str) -> str:
    try:
        return json.dumps(json.loads(arguments))
    except json.JSONDecodeError:
        return arguments


def logprobs_of(expected: Answers, texts: Sequence[list[int]]) -> list[list[float]]:
    """The same logprobs from logits."""
    found = []
    for logits, ids in zip(expected.logits, texts, strict=True):
        table = torch.from_numpy(logits).double().log_softmax(-1)
        found.append(table[:-1].gather(1, torch.tensor(ids[1:])[:, None])[:, 0].tolist())
    return found
