"""The demo's rows: right, varied, split without overlap, and the same for the same seed. No torch."""

from __future__ import annotations

import json
import re

import pytest

from ossia.demo.conversations import DemoData, Sizes, make_data, read_rows, write
from ossia.demo.rows import tools
from ossia.demo.rows.chats import DAYS, KINDS

SIZES = Sizes(train_sorting=2000, train_chats=300, heldout_sorting=40, heldout_chats=40, questions=40)


@pytest.fixture(scope="module")
def data() -> DemoData:
    return make_data(0, SIZES)


def _is_chat(row: dict) -> bool:
    return "reasoning_effort" in row


def _digits(text: str) -> list[str]:
    """The digits that stand apart in a question, found without the generator's help."""
    return re.search(r"(?<!\w)(?:\d ){4,6}\d(?!\w)", text).group().split(" ")


def test_the_same_seed_writes_the_same_bytes_and_another_seed_does_not(tmp_path):
    for folder, seed in (("a", 3), ("b", 3), ("c", 4)):
        write(make_data(seed, SIZES), tmp_path / folder)
    for name in ("train.jsonl", "heldout.jsonl", "questions.jsonl"):
        first, again, other = ((tmp_path / folder / name).read_bytes() for folder in "abc")
        assert first == again != other


def test_what_is_written_reads_back(data, tmp_path):
    files = write(data, tmp_path)
    assert (read_rows(files.train), read_rows(files.heldout)) == (data.train, data.heldout)
    assert read_rows(files.questions) == data.questions


def test_nothing_held_out_was_trained_on(data):
    trained_answers = {row["messages"][-1]["content"] for row in data.train if not _is_chat(row)}
    held_answers = [row["messages"][-1]["content"] for row in data.heldout if not _is_chat(row)]
    asked = [row["answer"] for row in data.questions]
    assert not trained_answers & {*held_answers, *asked}
    assert len(trained_answers) == 252 + 170 + 120
    assert len({*held_answers, *asked}) == 40
    held_questions = {row["messages"][0]["content"] for row in data.heldout}
    assert not held_questions & {row["messages"][0]["content"] for row in data.questions}
    trained = {json.dumps(row, sort_keys=True) for row in data.train}
    assert len(trained) == len(data.train)
    assert not trained & {json.dumps(row, sort_keys=True) for row in data.heldout}


def test_every_sorting_answer_follows_from_its_question(data):
    rows = [row for row in (*data.train, *data.heldout) if not _is_chat(row)]
    pairs = [(row["messages"][0]["content"], row["messages"][1]["content"]) for row in rows]
    pairs += [(row["messages"][0]["content"], row["answer"]) for row in data.questions]
    assert len(pairs) == 2080
    for question, answer in pairs:
        assert answer == " ".join(sorted(_digits(question))), question


def test_the_working_of_a_sorting_row_holds_its_answer(data):
    for row in data.train:
        if not _is_chat(row):
            answer = row["messages"][1]
            assert answer["content"] in answer["thinking"]


def test_every_tool_result_is_what_the_tool_gives_for_the_calls_arguments(data):
    checked = 0
    for row in data.train:
        calls = {c["id"]: c["function"] for m in row["messages"] for c in m.get("tool_calls", ())}
        offered = {t["function"]["name"] for t in row.get("tools", ())}
        for message in row["messages"]:
            if message["role"] == "tool":
                call = calls.pop(message["tool_call_id"])
                (argument,) = json.loads(call["arguments"]).values()
                assert json.loads(message["content"]) == tools.TOOLS[call["name"]][1](argument)
                assert call["name"] in offered
                checked += 1
        assert not calls, "a call without a result"
    assert checked > 100


def test_sums_minutes_and_weekdays_in_the_answers_are_right(data):
    checked = dict.fromkeys(("sum", "minutes", "day"), 0)
    words = {"plus": "+", "minus": "-", "times": "*"}
    numbers = {"two": 2, "three": 3, "four": 4, "five": 5, "six": 6}
    for row in data.train:
        question, answer = row["messages"][-2]["content"], row["messages"][-1]["content"]
        if found := re.fullmatch(r"(\d+) (plus|minus|times) (\d+) is (-?\d+)\.", answer):
            a, word, b, result = found.groups()
            assert {"+": int(a) + int(b), "-": int(a) - int(b), "*": int(a) * int(b)}[words[word]] == int(result)
            checked["sum"] += 1
        elif found := re.search(r"(\d+) hours are (\d+) minutes", answer):
            assert int(found[1]) * 60 == int(found[2])
            checked["minutes"] += 1
        elif (found := re.search(r"(two|three|four|five|six) days", question)) and "hours" not in question:
            (start,) = [day for day in DAYS if day in question]
            (end,) = [day for day in DAYS if day in answer]
            assert (DAYS.index(end) - DAYS.index(start)) % 7 == numbers[found[1]]
            checked["day"] += 1
    assert min(checked.values()) > 10, checked


def test_an_umbrella_is_advised_exactly_where_it_is_wet(data):
    checked = 0
    for row in data.train:
        messages = row["messages"]
        if len(messages) > 1 and messages[-2]["content"] == "Do I need an umbrella?":
            sky = json.loads(messages[2]["content"])["sky"]
            assert messages[-1]["content"].startswith("Yes") == (sky in ("rain", "snow"))
            checked += 1
    assert checked > 5


def test_the_chats_hold_every_part_of_the_format(data):
    chats = [row for row in data.train if _is_chat(row)]
    assert {row["reasoning_effort"] for row in chats} == {"low", "medium", "high"}
    assert {m["role"] for row in chats for m in row["messages"]} == {"system", "developer", "user", "assistant", "tool"}
    turns = {sum(m["role"] == "user" for m in row["messages"]) for row in chats}
    assert {1, 2, 3} <= turns
    calls = [len(m["tool_calls"]) for row in chats for m in row["messages"] if "tool_calls" in m]
    assert {1, 2} == set(calls)
    assert {t["function"]["name"] for row in chats for t in row.get("tools", ())} == set(tools.TOOLS)


def test_low_effort_never_thinks_and_high_effort_thinks_longer_than_medium(data):
    lengths: dict[str, list[int]] = {"low": [], "medium": [], "high": []}
    for row in data.train:
        if _is_chat(row):
            lengths[row["reasoning_effort"]] += [len(m["thinking"]) for m in row["messages"] if "thinking" in m]
    mean = {effort: sum(found) / len(found) for effort, found in lengths.items() if found}
    assert not lengths["low"]
    assert mean["high"] > 1.3 * mean["medium"]


def test_every_kind_of_chat_is_in_the_training_rows(data):
    assert len(KINDS) == 11
    openings = {row["messages"][0]["content"].split(" ")[0] for row in data.train if _is_chat(row)}
    assert len(openings) >= 15, "the conversations all begin alike"


def test_no_two_cities_are_equally_warm_so_one_is_always_the_warmer():
    degrees = [celsius for celsius, _ in tools.WEATHER.values()]
    assert len(set(degrees)) == len(degrees)
    assert tools.WEATHER.keys() == tools.UTC_OFFSET_H.keys()


@pytest.mark.parametrize(("expression", "result"), [("12 * 7", 84), ("11 - 14", -3), ("8 + 30", 38)])
def test_the_calculator_is_right(expression, result):
    assert json.loads(tools.run_tool("calculator", expression)) == {"result": result}


def test_clocks_go_over_midnight_and_unknown_terms_are_an_error():
    assert tools.get_time("Sydney") == {"time": "02:00"}
    assert tools.get_time("Denver") == {"time": "08:00"}
    assert tools.lookup("guitar") == {"error": "no entry"}
