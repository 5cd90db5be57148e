"""The share of questions that a model answers exactly: greedy answers to a file of rows, each with its own `answer`.

Run: python examples/exact_match.py MODEL questions.jsonl [--adapter RUN]

A row is {"messages": [...], "answer": "..."}; whatever else it holds comes back. `ossia demo` leaves such rows in
runs/demo/data/questions.jsonl.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
options.add_argument("model", help="a gpt-oss checkpoint's folder, or owner/name on the hub")
options.add_argument("questions", type=Path)
options.add_argument("--adapter", help="a run folder")
options.add_argument("--max-tokens", type=int, default=80)
options.add_argument("--dtype", default="bfloat16")
options.add_argument("--answers", type=Path, default=Path("answers.jsonl"), help="where the answered rows go")
given = options.parse_args()

command = [sys.executable, "-m", "ossia", "generate", given.model, "--in", str(given.questions)]
command += ["--out", str(given.answers), "--temperature", "0", "--max-tokens", str(given.max_tokens)]
command += ["--dtype", given.dtype] + (["--adapter", given.adapter] if given.adapter else [])
subprocess.run(command, check=True)


def final_answer(row: dict) -> str | None:
    """The final message of a row's completion; thinking is `reasoning_content`, other commentary has a `channel`."""
    messages = row["completions"][0]["messages"]
    answers = [m["content"] for m in messages if m.get("content") and "channel" not in m]
    return answers[-1] if answers else None


rows = [json.loads(line) for line in given.answers.read_text(encoding="utf-8").splitlines()]
wrong = [row for row in rows if final_answer(row) != row["answer"]]
for row in wrong[:5]:
    print(f"{row['messages'][-1]['content']}\n  expected {row['answer']!r}\n  found    {final_answer(row)!r}")
print(f"exact match: {1 - len(wrong) / len(rows):.2f} of {len(rows)} rows")
