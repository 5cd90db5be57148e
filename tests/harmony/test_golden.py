"""The goldens of tests/golden/harmony.json: read by a person once, held to the token from then on."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest

from ossia.harmony import conversation_from_messages, messages_to_openai, parse_completion
from tests.golden.write_harmony import CASES, FILE, conversation, readable, train_on
from tests.harmony.support import library_completion, library_messages, library_training, o200k, renderer

GOLDEN: list[dict[str, Any]] = json.loads(FILE.read_text(encoding="utf-8"))
BY_NAME = pytest.mark.parametrize("case", GOLDEN, ids=[case["name"] for case in GOLDEN])


def test_the_golden_file_holds_the_cases_that_its_writer_makes() -> None:
    written = [{key: value for key, value in case.items() if key != "samples"} for case in GOLDEN]
    assert written == [{key: value for key, value in case.items() if key != "samples"} for case in CASES]


@BY_NAME
def test_a_golden_conversation_renders_to_its_samples(case: dict[str, Any]) -> None:
    samples = renderer().samples(conversation(case), train_on(case))
    assert [readable(o200k(), sample).split("\n") for sample in samples] == [s["text"] for s in case["samples"]]
    assert [" ".join(map(str, sample.ids)) for sample in samples] == [s["ids"] for s in case["samples"]]
    assert [sorted(set(sample.weights)) for sample in samples] == [s["weights"] for s in case["samples"]]


@BY_NAME
def test_a_golden_conversation_renders_like_the_library(case: dict[str, Any]) -> None:
    made = conversation(case)
    assert renderer().completion(made) == library_completion(library_messages(made))
    assert renderer().training_ids(made) == library_training(library_messages(made))


@BY_NAME
def test_a_golden_conversation_survives_the_way_to_openai_messages_and_back(case: dict[str, Any]) -> None:
    made = conversation(case)
    rows = messages_to_openai(made.messages)
    read = conversation_from_messages(json.loads(json.dumps(rows)), tools=case.get("tools"), system=made.system)
    assert read.messages == made.messages


@BY_NAME
def test_the_rendered_messages_of_a_golden_conversation_parse_back(case: dict[str, Any]) -> None:
    made = conversation(case)
    parsed = parse_completion(o200k(), renderer().training_ids(made), role=None)
    kept = [message for message in parsed if message.role in ("user", "assistant", "tool")]
    said = [replace(message, train=None, weight=1.0) for message in made.messages]
    assert kept == [message for message in said if message in kept]
    assert {message.channel for message in said if message not in kept} <= {"analysis"}
