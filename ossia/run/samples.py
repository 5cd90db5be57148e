"""What a model answers to held-out prompts, before and after training: lines of RUN/samples.jsonl, shown in the report.

A held-out sample is asked up to its first trained token, and answered greedily, so the only difference is training.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from ossia.data.sample import Sample
from ossia.engine import Engine, Request, Sampling, harmony_stops
from ossia.harmony.messages import Message
from ossia.harmony.parse import StreamParser, parse_completion
from ossia.harmony.to_openai import messages_to_openai
from ossia.harmony.vocab import Vocabulary
from ossia.model.transformer import Transformer
from ossia.train.state import write_file


def questions_of(samples: Sequence[Sample], limit: int) -> list[Sample]:
    """The first `limit` samples that ask something: a prompt that ends where the model speaks."""
    asking = (sample for sample in samples if any(span.role == "assistant" for span in sample.spans))
    return list(islice(asking, limit))


def record_samples(
    path: Path, model: Transformer, vocab: Vocabulary, questions: Sequence[Sample], *, step: int, max_tokens: int
) -> None:
    """Append the answers after `step` to `path`; those of a step that is there already are not asked for again.

    Raises  RunError, with the older answers as they were, if the disk refuses it
    """
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.is_file() else []
    whole = [line for line in lines if line.endswith("\n")]
    if not questions or any(json.loads(line)["step"] == step for line in whole):
        return
    prompts = [sample.ids[: _first_trained(sample)].tolist() for sample in questions]
    sampling, stops = Sampling(temperature=0.0), harmony_stops(vocab)
    answers = Engine(model).generate([Request(ids, sampling, max_tokens, stops) for ids in prompts])
    for sample, ids, answer in zip(questions, prompts, answers, strict=True):
        asked = _messages(vocab, ids)
        wanted = [m for m in _messages(vocab, sample.ids.tolist()) if m not in asked]
        record = {
            "step": step,
            "messages": messages_to_openai(asked),
            "completions": [_completion(vocab, answer.ids, answer.finish)],
            "expected": "\n".join(m.content for m in wanted if m.channel == "final") or None,
        }
        whole.append(json.dumps(record) + "\n")
    write_file(path, "".join(whole))


def _first_trained(sample: Sample) -> int:
    return int((sample.weights > 0).argmax())


def _messages(vocab: Vocabulary, ids: Sequence[int]) -> list[Message]:
    parser = StreamParser(vocab, role=None)
    for number in ids:
        parser.push(number)
    return parser.messages


def _completion(vocab: Vocabulary, ids: list[int], finish: str) -> dict[str, Any]:
    messages = messages_to_openai(parse_completion(vocab, ids))
    return {"ids": ids, "text": vocab.decode(ids), "messages": messages, "finish": finish}
