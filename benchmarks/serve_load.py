"""Question: does the server lose or leak anything under load, and how long do its clients wait?

Run: python -m benchmarks.serve_load      Needs: 2 cores      Quoted in: docs/serving.md

A server of its own (`ossia serve`, the demo shape with random weights) gets 1,000 requests, 64 at a time, on one
connection each: streamed or whole, of random length, a quarter of them broken off by the client under way. Answers
can't stop by themselves, so each has exactly the tokens it asked for; the same seed has to give the same text whoever
else is in the batch. At the end nothing may run, wait or hold a block. First tokens are also timed one at a time
against the engine alone, in turn, on the same prompt: what the server adds.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import re
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter, deque
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx2

from benchmarks.common import ROOT, where, write_result

PACKAGES = ("torch", "fastapi", "starlette", "uvicorn", "h11", "httpx2")
SEEDS = 50  # so that each is asked for many times, in ever other company
BROKEN_OFF = 0.25


@dataclass(slots=True)
class Found:
    """What the clients saw.

    first_s, whole_s  to the first text of a stream, and to the end of any answer that wasn't broken off
    texts             by (seed, tokens): the same has to come every time
    """

    outcomes: Counter[str] = field(default_factory=Counter)
    first_s: list[float] = field(default_factory=list)
    whole_s: list[float] = field(default_factory=list)
    texts: dict[tuple[int, int], str] = field(default_factory=dict)
    tokens: int = 0
    wrong: list[str] = field(default_factory=list)

    def answered(self, seed: int, num: int, text: str, finish: str, begun: float) -> None:
        """An answer came to its end."""
        self.outcomes["answered"] += 1
        self.whole_s.append(time.monotonic() - begun)
        self.tokens += num
        if finish != "length":
            self.wrong.append(f"seed {seed}: ended by {finish}")
        if self.texts.setdefault((seed, num), text) != text:
            self.wrong.append(f"seed {seed}, {num} tokens: two different answers")


async def load(url: str, model: str, bias: dict[str, int], *, requests: int, at_once: int, longest: int) -> Found:
    """Ask, `at_once` at a time; the random choices are the same every time."""
    found, rng, room = Found(), random.Random(0), asyncio.Semaphore(at_once)
    limits = httpx2.Limits(max_connections=at_once, max_keepalive_connections=at_once)
    async with httpx2.AsyncClient(base_url=url, timeout=600, limits=limits) as client:

        async def one(seed: int, num: int, stream: bool, leave: float | None) -> None:
            body = {"model": model, "prompt": [1, 2, 3 + seed], "seed": seed, "max_tokens": num, "logit_bias": bias}
            async with room:
                begun = time.monotonic()
                ask = _stream if stream else _whole
                answering = asyncio.ensure_future(ask(client, body, found, begun))
                done, _ = await asyncio.wait((answering,), timeout=leave)
                if not done:
                    answering.cancel()
                    await asyncio.wait((answering,))
                    found.outcomes["broken off"] += 1
                elif (error := answering.exception()) is not None:
                    found.wrong.append(f"seed {seed}: {type(error).__name__} {error}")

        plan = []
        for _ in range(requests):
            leave = rng.uniform(0.0, 0.5) if rng.random() < BROKEN_OFF else None
            plan.append((rng.randrange(SEEDS), rng.randrange(1, longest), rng.random() < 0.5, leave))
        await asyncio.gather(*(one(*each) for each in plan))
    return found


async def _whole(client: httpx2.AsyncClient, body: dict[str, Any], found: Found, begun: float) -> None:
    answer = await client.post("/v1/completions", json=body)
    answer.raise_for_status()
    whole = answer.json()
    (choice,) = whole["choices"]
    if whole["usage"]["completion_tokens"] != body["max_tokens"]:
        found.wrong.append(f"seed {body['seed']}: {whole['usage']['completion_tokens']} tokens")
    found.answered(body["seed"], body["max_tokens"], choice["text"], choice["finish_reason"], begun)


async def _stream(client: httpx2.AsyncClient, body: dict[str, Any], found: Found, begun: float) -> None:
    text, finish, last = "", "", ""
    async with client.stream("POST", "/v1/completions", json={**body, "stream": True}) as answer:
        answer.raise_for_status()
        async for line in answer.aiter_lines():
            if not line:
                continue
            last = line
            if line == "data: [DONE]":
                break
            (choice,) = json_of(line)["choices"]
            if not text:
                found.first_s.append(time.monotonic() - begun)
            text += choice["text"]
            finish = choice["finish_reason"] or finish
    if last != "data: [DONE]":
        found.wrong.append(f"seed {body['seed']}: a stream without an end")
    found.answered(body["seed"], body["max_tokens"], text, finish, begun)


def json_of(line: str) -> dict[str, Any]:
    """The object of a `data:` line."""
    found = json.loads(line.removeprefix("data: "))
    if "error" in found:
        raise RuntimeError(found["error"]["message"])
    return dict(found)


def left_behind(url: str, timeout_s: float = 30.0) -> dict[str, int]:
    """What still runs, waits or is held once the clients are gone; all of it has to be 0."""
    end = time.monotonic() + timeout_s
    while True:
        health = httpx2.get(f"{url}/health").json()
        left = {key: health[key] for key in ("running", "waiting", "blocks_used", "cache_used_bytes")}
        if not any(left.values()) or time.monotonic() > end:
            return left
        time.sleep(0.1)


def percentiles(values: list[float]) -> dict[str, float]:
    """Median, p90, p99 and the largest, in seconds."""
    cuts = statistics.quantiles(values, n=100, method="inclusive")
    return {"p50": cuts[49], "p90": cuts[89], "p99": cuts[98], "max": max(values)}


# --- the benchmark's own server, and the engine alone beside it


def make_model(folder: Path) -> Path:
    """The demo shape with random weights and a small vocabulary."""
    from ossia.harmony import o200k_harmony_tokenizer_json, prune
    from ossia.model.arch import SHAPES
    from ossia.model.tiny import make_tiny

    text, _ = prune(o200k_harmony_tokenizer_json(), [chr(code) for code in range(32, 127)])
    (folder / "tokenizer.json").write_text(text, encoding="utf-8")
    make_tiny(folder / "model", SHAPES["demo"], weights="bf16", tokenizer=folder / "tokenizer.json")
    return folder / "model"


def first_tokens(url: str, model: Path, bias: dict[str, int], repeats: int, threads: int) -> dict[str, Any]:
    """Milliseconds to the first token: of the engine in this process, and through the server, in turn."""
    import torch

    from ossia.engine import Engine, Request, Sampling
    from ossia.model.open import open_model

    torch.set_num_threads(threads)
    transformer, _ = open_model(str(model), dtype="float32", device="cpu")
    session = Engine(transformer).session()
    ids = [random.Random(0).randrange(200) for _ in range(256)]
    rules = Sampling(logit_bias={int(name): float(value) for name, value in bias.items()})
    times_ms: dict[str, list[float]] = {"engine": [], "server": []}
    with httpx2.Client(base_url=url, timeout=60) as client:
        for _ in range(repeats + 1):
            begun = time.perf_counter()
            session.add(Request(ids, rules, 1))
            while not session.step():
                pass
            times_ms["engine"].append((time.perf_counter() - begun) * 1e3)
            body = {"model": "model", "prompt": ids, "max_tokens": 2, "logit_bias": bias, "stream": True}
            begun = time.perf_counter()
            with client.stream("POST", "/v1/completions", json=body) as answer:
                lines = answer.iter_lines()
                next(line for line in lines if line.startswith("data: {"))
                times_ms["server"].append((time.perf_counter() - begun) * 1e3)
                deque(lines, maxlen=0)
    counted = {name: times[1:] for name, times in times_ms.items()}
    medians = {name: statistics.median(times) for name, times in counted.items()}
    return {**medians, "server_adds": medians["server"] - medians["engine"], "raw": counted}


def memory_bytes(pid: int) -> int:
    """Resident memory of a process."""
    status = Path(f"/proc/{pid}/status").read_text()
    return int(re.findall(r"VmRSS:\s+(\d+) kB", status)[0]) * 1024


def main() -> None:
    """Runs it, writes benchmarks/results/serve_load.json, prints what was found; exit code 1 if anything was lost."""
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as `ossia` itself: waiting threads sleep, on both sides
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=1000)
    parser.add_argument("--at-once", type=int, default=64)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--longest", type=int, default=48, help="tokens of an answer, at most")
    options = vars(parser.parse_args())
    with tempfile.TemporaryDirectory() as folder:
        result = run(make_model(Path(folder)), **options)
    print(write_result("serve_load", result))
    shown = {key: result[key] for key in ("outcomes", "wrong", "left", "first_s", "whole_s", "first_token_ms")}
    shown["first_token_ms"] = {key: value for key, value in shown["first_token_ms"].items() if key != "raw"}
    for name, value in shown.items():
        print(f"{name:<16}{value}")
    sys.exit(1 if result["wrong"] or any(result["left"].values()) else 0)


def run(model: Path, *, requests: int, at_once: int, longest: int, threads: int) -> dict[str, Any]:
    """The whole benchmark on a model's folder."""
    from ossia.engine import harmony_stops
    from ossia.harmony import Vocabulary

    bias = {str(number): -100 for number in harmony_stops(Vocabulary.from_file(model))}
    words = [sys.executable, "-m", "ossia", "serve", str(model), "--port", "0", "--dtype", "float32"]
    env = {**os.environ, "OMP_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "false"}
    server = subprocess.Popen(words, cwd=ROOT, env=env, stderr=subprocess.PIPE, text=True)
    assert server.stderr is not None
    try:
        line = next(line for line in server.stderr if "http://" in line)
        url = line.split()[-1]
        _drop(server.stderr)
        first = first_tokens(url, model, bias, 20, threads)
        asyncio.run(load(url, "model", bias, requests=100, at_once=at_once, longest=longest))  # caches find their size
        before = memory_bytes(server.pid)
        begun = time.monotonic()
        found = asyncio.run(load(url, "model", bias, requests=requests, at_once=at_once, longest=longest))
        wall_s = time.monotonic() - begun
        left = left_behind(url)
        after = memory_bytes(server.pid)
        server.terminate()
        code = server.wait(30)
    finally:
        server.kill()
    lost = requests - sum(found.outcomes.values())
    return {
        "question": (__doc__ or "").splitlines()[0],
        "config": {
            "requests": requests,
            "at_once": at_once,
            "longest": longest,
            "threads": threads,
            "broken_off": BROKEN_OFF,
        },
        **where(PACKAGES),
        "outcomes": dict(found.outcomes),
        "wrong": found.wrong + ([f"{lost} requests without an outcome"] if lost else []) + ([] if not code else [code]),
        "left": left,
        "wall_s": wall_s,
        "tokens_per_s": found.tokens / wall_s,
        "first_s": percentiles(found.first_s),
        "whole_s": percentiles(found.whole_s),
        "memory_bytes": {"before": before, "after": after},
        "first_token_ms": first,
    }


def _drop(lines: Any) -> None:
    """Read what the server says, so that it never waits for a reader."""
    threading.Thread(target=deque, args=(lines, 0), daemon=True).start()


if __name__ == "__main__":
    main()
