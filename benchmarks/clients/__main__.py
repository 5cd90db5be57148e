"""Question: which programs load what `ossia export` writes, and how near do they come to what Ossia computes?

Run: python -m benchmarks.clients      Needs: 2 cores, 8 GB, 5 GB of disk, packages      Quoted in: docs/export.md

Trains a small model and an adapter, exports them in every format, and asks every client for logits, greedy answers,
chats and tool calls. Clients that don't fit into this environment get one of their own in `--cache`, the first time:
vLLM takes minutes to install, llama-cpp-python ten to compile. `--only NAME ...` asks some and keeps the results of the
others.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.clients.checks import CHECKS, Case
from benchmarks.clients.exports import MAX_NEW, TEXT_TOKENS, Exports, add_exports, make_exports, questions
from benchmarks.common import RESULTS, ROOT, where, write_result
from ossia.demo.fixture import FIXTURE_PLAN, trained_fixture
from ossia.demo.prepare import DATA
from ossia.harmony.o200k import write_o200k_harmony

PACKAGES = ("torch", "tokenizers", "numpy", "safetensors", "gguf")


def main() -> None:
    """Ask, write benchmarks/results/clients.json, print a line an entry; exit code 1 where one is out of bounds."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=CHECKS, default=list(CHECKS))
    parser.add_argument("--cache", type=Path, default=ROOT / "runs" / "clients")
    parser.add_argument("--reuse", action="store_true", help="the exports of the run before, kept by --keep")
    parser.add_argument("--keep", action="store_true", help="keep the exports, 2 GB")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    cache = options.cache.absolute()
    trained = trained_fixture(cache)
    tokenizer = cache / "tokenizer.json"
    if not tokenizer.is_file():
        write_o200k_harmony(cache)
    made = cache / "exports"
    exports = Exports(made)
    if not options.reuse:
        shutil.rmtree(made, ignore_errors=True)
        make_exports(trained, made)
        add_exports(exports, tokenizer)
    asked = questions(exports.base, trained.parent / DATA)
    case = Case(exports, asked, trained.parent / DATA, cache / "venvs")
    entries, here = earlier(leaving_out=options.only), where(PACKAGES)
    asked_on = {"device": here["device"], "commit": here["commit"]}  # an entry may stay from another day's run
    for name in options.only:
        begun = time.perf_counter()
        for found in CHECKS[name](case):
            told = {key: f"{value:.2e}" if isinstance(value, float) else value for key, value in found["found"].items()}
            print("ok" if found["passed"] else "FAILED", found["client"], found["format"], told, flush=True)
            entries.append({"check": name, **found, **asked_on})
        print(f"{name}: {time.perf_counter() - begun:.0f} s", file=sys.stderr, flush=True)
    entries.sort(key=lambda one: list(CHECKS).index(one["check"]))
    result = {
        "question": (__doc__ or "").splitlines()[0],
        "config": {
            "plan": repr(FIXTURE_PLAN),
            "texts": len(asked.texts),
            "tokens_a_text": TEXT_TOKENS,
            "prompts": len(asked.prompts),
            "max_new": MAX_NEW,
            "threads": options.threads,
        },
        "clients": entries,
        **here,
    }
    print(write_result("clients", result))
    if not options.keep:
        shutil.rmtree(made)
    raise SystemExit(0 if all(one["passed"] for one in entries) else 1)


def earlier(*, leaving_out: list[str]) -> list[dict[str, Any]]:
    """What an earlier run found of the clients that aren't asked now."""
    file = RESULTS / "clients.json"
    if not file.is_file():
        return []
    return [one for one in json.loads(file.read_text())["clients"] if one["check"] not in leaving_out]


if __name__ == "__main__":
    main()
