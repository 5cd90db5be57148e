"""lm-evaluation-harness on a task of local rows: `--model hf`, its likelihoods and its generated texts, row by row."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_TASK = """\
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {rows}}}}}
test_split: test
doc_to_text: "{{{{prompt}}}}"
target_delimiter: ""
"""
_CHOICES = """\
output_type: multiple_choice
doc_to_choice: "{{choices}}"
doc_to_target: answer
metric_list: [{metric: acc}]
"""
_TEXT = """\
output_type: generate_until
doc_to_target: "{{answer}}"
generation_kwargs: {until: ["<|return|>"], do_sample: false, max_gen_toks: 60}
metric_list: [{metric: exact_match}]
"""


@dataclass(frozen=True, slots=True)
class Question:
    """A prompt and what may follow as text, special tokens and all: the first is right, `plain` without them."""

    prompt: str
    choices: tuple[str, ...]
    plain: str


@dataclass(frozen=True, slots=True)
class Found:
    """What the harness made of the questions.

    accuracy, exact_match  as it reports them
    logprobs               of each choice of each question, nats
    texts                  what it let the model say to each prompt
    """

    accuracy: float
    exact_match: float
    logprobs: list[list[float]]
    texts: list[str]


def run_harness(python: Path, model: Path, questions: Sequence[Question], scratch: Path) -> Found:
    """Both kinds of task over the same questions. Raises CalledProcessError where it fails."""
    choices = [{"prompt": one.prompt, "choices": list(one.choices), "answer": 0} for one in questions]
    texts = [{"prompt": one.prompt, "answer": one.plain} for one in questions]
    for name, rows, rest in (("choices", choices, _CHOICES), ("text", texts, _TEXT)):
        file = scratch / f"{name}.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        (scratch / f"{name}.yaml").write_text(_TASK.format(name=f"ossia_{name}", rows=file) + rest, encoding="utf-8")
    command = [str(python), "-m", "lm_eval", "run", "--model", "hf", "--tasks", "ossia_choices,ossia_text"]
    command += ["--model_args", f"pretrained={model},dtype=float32", "--include_path", str(scratch)]
    command += ["--device", "cpu", "--batch_size", "1", "--log_samples", "--output_path", str(scratch / "found")]
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    env |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": str(scratch / "cache")}
    subprocess.run(command, check=True, env=env, stdout=sys.stderr)
    (results,) = (scratch / "found").rglob("results_*.json")
    scores = json.loads(results.read_text())["results"]
    logprobs = [[float(one[0][0]) for one in row["resps"]] for row in _samples(scratch, "choices")]
    said = [row["resps"][0][0] for row in _samples(scratch, "text")]
    return Found(scores["ossia_choices"]["acc,none"], scores["ossia_text"]["exact_match,none"], logprobs, said)


def _samples(scratch: Path, name: str) -> list[dict[str, Any]]:
    (file,) = (scratch / "found").rglob(f"samples_ossia_{name}_*.jsonl")
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    return sorted(rows, key=lambda row: row["doc_id"])
